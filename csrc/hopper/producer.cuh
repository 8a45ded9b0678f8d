// The producer of the Hopper kernel, four warps with tasks of their own: one loads queries and K, one loads V, one stores
// from shared memory what later steps read, one stores what does not lie there page by page.
#pragma once

#include "common/store.cuh"
#include "hopper/pipeline.cuh"

// Loops are not unrolled here: with less code of the producer's, ptxas finds registers to keep the consumers' products
// under way (it says C7511 where it does not).
namespace amskv::hopper {

// One KV head's part of a slot table.
struct Table {
    const int32_t* slots;
    int count, arena;

    __device__ __forceinline__ Table(const AttnParams& p, const SlotTable& table, const Item& item)
        : slots(slots_of(table, item.batch, item.kv_head)),
          count(table.count),
          arena(p.pool.arena[item.batch * p.kv_heads + item.kv_head]) {}

    __device__ __forceinline__ int page(int slot) const { return arena + (slot >> kRowsBits); }
};

// How the current scale meets its pages. Where the write table takes it page by page, in order, its boxes are cut as the
// pages are: box i begins at row i · page_size − joined, so that all but the first fill pages of their own.
struct StoreLayout {
    bool boxwise;
    int joined;  // rows that the first page holds already

    __device__ __forceinline__ StoreLayout(const Args& args, const Item& item, int lane) : boxwise(false), joined(0) {
        const AttnParams& p = args.params;
        if (p.write.count == 0) return;
        const int32_t* const slots = slots_of(p.write, item.batch, item.kv_head);
        const int page_size = p.pool.page_size;
        int named = 0;
#pragma unroll 1
        for (int i = lane; i < p.write.count; i += kWarpLanes) named += slots[i] & kRowsMask;
        named = shuffle_from(inclusive_sum(named, lane), kWarpLanes - 1);
        joined = named - p.tokens;
        bool fits = joined >= 0 && joined < page_size;
#pragma unroll 1
        for (int i = lane; i < p.write.count; i += kWarpLanes) {
            const int left = named - (i << args.page_shift);
            const int rows = left < 0 ? 0 : left < page_size ? left : page_size;
            fits = fits && (slots[i] & kRowsMask) == rows;
        }
        boxwise = ballot(fits) == ~0u;
        if (!boxwise) joined = 0;
    }
};

// The boxes of a tile of pages.
template <class Tile>
struct TileBoxes {
    int first, count;

    __device__ __forceinline__ TileBoxes(const Args& args, int tile) {
        const int of_first = args.first_keys >> args.page_shift, of_others = Tile::kKeys >> args.page_shift;
        first = args.first_box + (tile == 0 ? 0 : of_first + (tile - 1) * of_others);
        count = tile == 0 ? of_first : of_others;
    }
};

// A box of keys, a lane's share of a tile.
struct KeyBox {
    int first, end;  // rows of the box that are keys
    bool paged;
    Box box;  // of K in `pages`, else of either in k and v

    __device__ __forceinline__ KeyBox(
        const Args& args, const Item& item, const Table& history, const StoreLayout& layout, int index) {
        const int page_size = args.params.pool.page_size;
        paged = index < history.count;
        first = 0;
        if (paged) {
            const int slot = index < 0 ? 0 : history.slots[index];
            end = slot & kRowsMask;
            box = {0, end == 0 ? page_size : 0, 0, history.page(slot)};  // no rows: past the page, all zero
        } else {
            const int row = ((index - history.count) << args.page_shift) - layout.joined;
            const int left = args.params.tokens - row;
            first = row < 0 ? -row : 0;
            end = left < 0 ? 0 : left < page_size ? left : page_size;
            box = {0, row, item.kv_head, item.batch};
        }
    }
};

// Bit i: whether key i of the tile is there, from the boxes that the first lanes hold.
__device__ __forceinline__ Chunk named_keys(const KeyBox& box, int page_shift, int lane) {
    Chunk named;
    const int rows = box.first << 16 | box.end;
#pragma unroll
    for (int word = 0; word < 4; ++word) {
        const int key = word * kWarpLanes + lane, row = key & ((1 << page_shift) - 1);
        const int of_box = shuffle_from(rows, key >> page_shift);
        named.word[word] = ballot(row >= of_box >> 16 && row < (of_box & 0xffff));
    }
    return named;
}

// The same of a tile with `left` keys.
__device__ __forceinline__ Chunk leading_keys(int left, int lane) {
    Chunk named;
#pragma unroll
    for (int word = 0; word < 4; ++word) named.word[word] = ballot(word * kWarpLanes + lane < left);
    return named;
}

template <class Tile>
__device__ __forceinline__ void load_queries(const Args& args, const Item& item, const Pipeline<Tile>& pipeline) {
    const int blocks = args.shares_rows ? 1 : kConsumers;
    mbarrier_expect(pipeline.query_full(), blocks * Tile::kRowBlockBytes);
#pragma unroll 1
    for (int i = 0; i < blocks * Tile::kPanels; ++i) {
        const int block = i / Tile::kPanels, panel = i % Tile::kPanels;
        const Box box{panel * kSwizzleElements, item.first_row + block * kWarpgroupRows, item.head, item.batch};
        tma_load(pipeline.query(block) + panel * kWarpgroupRows * kSwizzleBytes, args.q, box, pipeline.query_full());
    }
}

// Loads a box into a tile, a panel of its columns after the other.
template <class Tile>
__device__ __forceinline__ void load_panels(SharedAddress to, const TensorMap& map, Box box, SharedAddress barrier) {
#pragma unroll 1
    for (int panel = 0; panel < Tile::kPanels; ++panel) {
        box.column = panel * kSwizzleElements;
        tma_load(to + panel * Tile::kKeys * kSwizzleBytes, map, box, barrier);
    }
}

// Loads K, with the queries, or V: tile after tile, as stages become empty.
template <class Tile>
__device__ __forceinline__ void load(const Args& args, const Pipeline<Tile>& pipeline, Part part, int lane) {
    const TensorMap& current = part == kKeys ? args.k : args.v;
    const int first_bytes = args.first_keys * Tile::kHeadDim * kElementBytes;
    ProducerState<Tile> state(args);
    int round = 0;
#pragma unroll 1
    for (int index = blockIdx.x; index < args.items; index += args.blocks, ++round) {
        const Item item(args, index);
        const Table history(args.params, args.params.read, item);
        const StoreLayout layout(args, item, lane);
        if (part == kKeys) {
            mbarrier_wait(pipeline.query_empty(), (round & 1) ^ 1);
            if (lane == 0) load_queries(args, item, pipeline);
        }
#pragma unroll 1
        for (int tile = 0; tile < args.paged_tiles; ++tile, state.advance()) {
            const TileBoxes<Tile> boxes(args, tile);
            KeyBox mine(args, item, history, layout, boxes.first + lane);
            const SharedAddress full = pipeline.full(part, state.now), to = pipeline.tile(part, state.now);
            pipeline.wait_empty(part, state.now);
            if (part == kKeys) {
                const Chunk named = named_keys(mine, args.page_shift, lane);
                if (lane == 0) store_shared_16(pipeline.mask(state.now), named);
            }
            if (lane == 0) mbarrier_expect(full, tile == 0 ? first_bytes : Tile::kStageBytes);
            warp_barrier();
            if (lane >= boxes.count) continue;
            if (mine.paged) mine.box.third = part;
            load_panels<Tile>(to + (lane << args.page_shift) * kSwizzleBytes, mine.paged ? args.pages : current,
                              mine.box, full);
        }
#pragma unroll 1
        for (int tile = args.paged_tiles; tile < args.key_tiles; ++tile, state.advance()) {
            const int row = (tile - args.paged_tiles) * Tile::kKeys;
            const SharedAddress full = pipeline.full(part, state.now), to = pipeline.tile(part, state.now);
            pipeline.wait_empty(part, state.now);
            const Chunk named = leading_keys(args.params.tokens - row, lane);
            if (lane > 0) continue;
            if (part == kKeys) store_shared_16(pipeline.mask(state.now), named);
            mbarrier_expect(full, Tile::kStageBytes);
            load_panels<Tile>(to, current, {0, row, item.kv_head, item.batch}, full);
        }
        state.end_item(args.key_tiles);
    }
}

// Whether this item's tile takes part in the store of its KV head: those of the first query head do.
__device__ __forceinline__ bool stores(const Args& args, const Item& item) {
    return item.head == item.kv_head * args.group;
}

// Stores each box of the current scale that fills a page of its own, once, from the stage that the consumers read. The
// tiles of query rows share the boxes among themselves.
template <class Tile>
__device__ __forceinline__ void store_boxes(const Args& args, const Pipeline<Tile>& pipeline, int lane) {
    const AttnParams& p = args.params;
    ProducerState<Tile> state(args);
#pragma unroll 1
    for (int index = blockIdx.x; index < args.items; index += args.blocks) {
        const Item item(args, index);
        const Table pages(p, p.write, item);
        const StoreLayout layout(args, item, lane);
        const int first_whole = layout.joined > 0 ? 1 : 0;
        const int boxes_kept = stores(args, item) && layout.boxwise ? pages.count : 0;
#pragma unroll 1
        for (int tile = 0; tile < args.key_tiles; ++tile, state.advance()) {
            const TileBoxes<Tile> boxes(args, tile);
            const int box = boxes.first + lane - p.read.count;  // of the current scale
            const bool mine = lane < boxes.count && box >= first_whole && box < boxes_kept &&
                              (box << args.page_shift) - layout.joined < p.tokens &&
                              box % args.row_tiles == item.row_tile;
#pragma unroll 1
            for (int i = 0; i < 2; ++i) {
                const Part part = static_cast<Part>(i);
                pipeline.wait_full(part, state.now);
                if (mine) {
                    const int page = pages.page(pages.slots[box]);
                    const SharedAddress from = pipeline.tile(part, state.now) + (lane << args.page_shift) * kSwizzleBytes;
#pragma unroll 1
                    for (int panel = 0; panel < Tile::kPanels; ++panel) {
                        const Box to{panel * kSwizzleElements, 0, part, page};
                        tma_store(args.pages, to, from + panel * Tile::kKeys * kSwizzleBytes);
                    }
                    tma_store_commit();
                    tma_store_wait_read();
                }
                pipeline.release(part, state.now, lane);
            }
        }
        state.end_item(args.key_tiles);
    }
}

// Stores from global memory the rows that join a page already begun, or all rows where the write table leaves gaps.
template <class Tile>
__device__ __forceinline__ void store_rest(const Args& args, int lane) {
    const AttnParams& p = args.params;
#pragma unroll 1
    for (int index = blockIdx.x; index < args.items; index += args.blocks) {
        const Item item(args, index);
        if (!stores(args, item)) continue;
        const Table pages(p, p.write, item);
        const StoreLayout layout(args, item, lane);
        if (!layout.boxwise) {
            store_rows<Tile::kHeadDim, void, 1>(p, item.batch, item.kv_head, item.row_tile, args.row_tiles, lane);
        } else if (layout.joined > 0 && item.row_tile == 0) {
            const int64_t at = int64_t{pages.page(pages.slots[0])} * 2 * p.pool.page_size * Tile::kHeadDim;
            const int rows = pages.slots[0] & kRowsMask;
            Unit unit{static_cast<uint16_t*>(p.pool.pages) + at, p.pool.page_size, 0, rows, -layout.joined};
            const uint16_t* const k = row_of(p.k, item.batch, item.kv_head);
            const uint16_t* const v = row_of(p.v, item.batch, item.kv_head);
#pragma unroll 1
            for (unit.first_row = 0; unit.first_row < unit.page_size; unit.first_row += kUnitRows) {
                store_unit<Tile::kHeadDim, 1>(unit, k, v, p.k.token_stride, p.v.token_stride, lane);
            }
        }
    }
}

// Which warp does what.
template <class Tile>
__device__ __forceinline__ void produce(const Args& args, const Pipeline<Tile>& pipeline, int warp, int lane) {
    const bool keeps = args.params.write.count > 0;
    if (warp < 2) {
        load(args, pipeline, static_cast<Part>(warp), lane);
    } else if (keeps && warp == 2) {
        store_boxes(args, pipeline, lane);
    } else if (keeps && warp == 3) {
        store_rest<Tile>(args, lane);
    }
}

}  // namespace amskv::hopper
