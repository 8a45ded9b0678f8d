// The warps of the Hopper kernel that move data: one fetches into the ring, one stores from it, two store the rest.
#pragma once

#include "hopper/ring.cuh"
#include "common/store.cuh"

// Loops are not unrolled here: movers wait more than they work, and with less code of theirs ptxas finds registers to
// keep the consumers' products under way (it says C7511 where it does not).
namespace amskv::hopper {

// The keys of a tile, in boxes.
template <class Tile>
struct KeyTile {
    int first_box, boxes;

    __device__ __forceinline__ KeyTile(const Args& args, int tile) {
        const int of_first = args.first_keys >> args.page_shift, of_others = Tile::kKeys >> args.page_shift;
        first_box = tile == 0 ? 0 : of_first + (tile - 1) * of_others;
        boxes = tile == 0 ? of_first : of_others;
    }
};

// Where the keys of one item lie.
struct Source {
    const int32_t* slots;
    int count, arena;

    __device__ __forceinline__ Source(const AttnParams& p, const SlotTable& table, const Item& item)
        : slots(slots_of(table, item.batch, item.kv_head)),
          count(table.count),
          arena(p.pool.arena[item.batch * p.kv_heads + item.kv_head]) {}

    __device__ __forceinline__ int page(int slot) const { return arena + (slot >> kRowsBits); }
};

// How the current scale meets its pages. Where the write table takes it page by page, in order, its boxes are cut as the
// pages are: box i begins at row i · page_size − joined, so that all but the first fill pages of their own.
struct Landing {
    bool boxwise;
    int joined;  // rows that the first page holds already

    __device__ __forceinline__ Landing(const Args& args, const Source& pages, int lane) {
        const AttnParams& p = args.params;
        const int page_size = p.pool.page_size;
        int named = 0;
#pragma unroll 1
        for (int i = lane; i < pages.count; i += kWarpLanes) named += pages.slots[i] & kRowsMask;
        named = shuffle_from(inclusive_sum(named, lane), kWarpLanes - 1);
        joined = named - p.tokens;
        bool fits = joined >= 0 && joined < page_size;
#pragma unroll 1
        for (int i = lane; i < pages.count; i += kWarpLanes) {
            const int left = named - (i << args.page_shift);
            const int rows = left < 0 ? 0 : left < page_size ? left : page_size;
            fits = fits && (pages.slots[i] & kRowsMask) == rows;
        }
        boxwise = ballot(fits) == ~0u;
        if (!boxwise) joined = 0;
    }
};

// One box of keys, a lane's share of a tile.
struct KeyBox {
    int first, end;  // rows of the box that are keys
    bool paged;
    Box box;  // of K in `pages`, else of either in k and v

    __device__ __forceinline__ KeyBox(
        const Args& args, const Item& item, const Source& source, const Landing& landing, int index) {
        const int page_size = args.params.pool.page_size;
        paged = index < source.count;
        first = 0;
        if (paged) {
            const int slot = source.slots[index];
            end = slot & kRowsMask;
            box = {0, end == 0 ? page_size : 0, 0, source.page(slot)};  // an empty entry: past the page, all zero
        } else {
            const int row = ((index - source.count) << args.page_shift) - landing.joined;
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
    for (int part = 0; part < 4; ++part) {
        const int key = part * kWarpLanes + lane, row = key & ((1 << page_shift) - 1);
        const int of_box = shuffle_from(rows, key >> page_shift);
        named.word[part] = ballot(row >= of_box >> 16 && row < (of_box & 0xffff));
    }
    return named;
}

template <class Tile>
__device__ __forceinline__ void fetch_queries(const Args& args, const Item& item, const Ring<Tile>& ring) {
    const int blocks = args.stride == 1 ? kConsumers : 1;
    mbarrier_expect(ring.query_full(), blocks * Tile::kRowBlockBytes);
#pragma unroll 1
    for (int i = 0; i < blocks * Tile::kPanels; ++i) {
        const int block = i / Tile::kPanels, panel = i % Tile::kPanels;
        const Box box{panel * kSwizzleElements, item.first_row + block * kWarpgroupRows, item.head, item.batch};
        tma_load(ring.query(block) + panel * kWarpgroupRows * kSwizzleBytes, args.q, box, ring.query_full());
    }
}

// Warp 0 of the movers: fetches what the consumers need, in their order, as slots become empty.
template <class Tile>
__device__ __forceinline__ void fetch(const Args& args, const Ring<Tile>& ring, int lane) {
    const int first_bytes = args.first_keys * Tile::kHeadDim * kElementBytes;
    int round = 0;
#pragma unroll 1
    for (int index = blockIdx.x; index < args.items; index += args.blocks, ++round) {
        const Item item(args, index);
        const Source source(args.params, args.params.read, item);
        const Landing landing(args, Source(args.params, args.params.write, item), lane);
        mbarrier_wait(ring.query_empty(), (round & 1) ^ 1);
        if (lane == 0) fetch_queries(args, item, ring);
#pragma unroll 1
        for (int step = 0; step < 2 * args.key_tiles; ++step) {
            const auto [tile, part, spot] = Turn(args, round, step);
            const KeyTile<Tile> keys(args, tile);
            KeyBox key_box(args, item, source, landing, keys.first_box + lane);
            ring.wait_empty(spot);
            if (part == 0) {
                const Chunk named = named_keys(key_box, args.page_shift, lane);
                if (lane == 0) store_shared_16(ring.mask(spot), named);
            }
            if (lane == 0) mbarrier_expect(ring.full(spot), tile == 0 ? first_bytes : Tile::kSlotBytes);
            warp_barrier();
            if (lane >= keys.boxes) continue;
            if (key_box.paged) key_box.box.third = part;
            const TensorMap& map = key_box.paged ? args.pages : part == 0 ? args.k : args.v;
            const SharedAddress to = ring.tile(spot) + (lane << args.page_shift) * kSwizzleBytes;
#pragma unroll 1
            for (int panel = 0; panel < Tile::kPanels; ++panel) {
                key_box.box.column = panel * kSwizzleElements;
                tma_load(to + panel * Tile::kKeys * kSwizzleBytes, map, key_box.box, ring.full(spot));
            }
        }
    }
}

// Whether this item's tile takes part in the store of its KV head: those of the first query head do.
__device__ __forceinline__ bool stores(const Args& args, const Item& item) {
    return args.params.write.count > 0 && item.head == item.kv_head * args.group;
}

// Warp 1 of the movers: stores each box of the current scale that fills a page of its own, once, from the slot that the
// consumers read. The tiles of query rows share the boxes among themselves.
template <class Tile>
__device__ __forceinline__ void keep_boxes(const Args& args, const Ring<Tile>& ring, int lane) {
    const AttnParams& p = args.params;
    int round = 0;
#pragma unroll 1
    for (int index = blockIdx.x; index < args.items; index += args.blocks, ++round) {
        const Item item(args, index);
        const Source pages(p, p.write, item);
        const Landing landing(args, pages, lane);
        const int first_whole = landing.joined > 0 ? 1 : 0;
        const int boxes_kept = stores(args, item) && landing.boxwise ? pages.count : 0;
#pragma unroll 1
        for (int step = 0; step < 2 * args.key_tiles; ++step) {
            const auto [tile, part, spot] = Turn(args, round, step);
            const KeyTile<Tile> keys(args, tile);
            const int box = keys.first_box + lane - p.read.count;  // of the current scale
            ring.wait_full(spot);
            const bool mine = lane < keys.boxes && box >= first_whole && box < boxes_kept &&
                              (box << args.page_shift) - landing.joined < p.tokens &&
                              box % args.row_tiles == item.row_tile;
            if (mine) {
                const int page = pages.page(pages.slots[box]);
                const SharedAddress from = ring.tile(spot) + (lane << args.page_shift) * kSwizzleBytes;
#pragma unroll 1
                for (int panel = 0; panel < Tile::kPanels; ++panel) {
                    const Box to{panel * kSwizzleElements, 0, part, page};
                    tma_store(args.pages, to, from + panel * Tile::kKeys * kSwizzleBytes);
                }
                tma_store_commit();
                tma_store_wait_read();
            }
            ring.release(spot, lane);
        }
    }
}

// Warps 2 and 3 of the movers: store from global memory the rows that join a page already begun, or all rows where the
// write table leaves gaps.
template <class Tile>
__device__ __forceinline__ void keep_rows(const Args& args, int worker, int lane) {
    const AttnParams& p = args.params;
#pragma unroll 1
    for (int index = blockIdx.x; index < args.items; index += args.blocks) {
        const Item item(args, index);
        const Source pages(p, p.write, item);
        if (!stores(args, item)) continue;
        const Landing landing(args, pages, lane);
        if (!landing.boxwise) {
            const int workers = 2 * args.row_tiles, mine = 2 * item.row_tile + worker;
            store_rows<Tile::kHeadDim, 1>(p, item.batch, item.kv_head, mine, workers, lane);
        } else if (landing.joined > 0 && item.row_tile == 0) {
            const int64_t at = int64_t{pages.page(pages.slots[0])} * 2 * p.pool.page_size * Tile::kHeadDim;
            const int rows = pages.slots[0] & kRowsMask;
            Unit unit{static_cast<uint16_t*>(p.pool.pages) + at, p.pool.page_size, 0, rows, -landing.joined};
            const uint16_t* const k = row_of(p.k, item.batch, item.kv_head);
            const uint16_t* const v = row_of(p.v, item.batch, item.kv_head);
#pragma unroll 1
            for (unit.first_row = worker * kUnitRows; unit.first_row < unit.page_size; unit.first_row += 2 * kUnitRows) {
                store_unit<Tile::kHeadDim, 1>(unit, k, v, p.k.token_stride, p.v.token_stride, lane);
            }
        }
    }
}

}  // namespace amskv::hopper
