// The warps of the Hopper kernel that move data: one fetches into the ring, one stores from it, two store the rest.
#pragma once

#include "hopper_ring.cuh"
#include "store.cuh"

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

// One box of keys, a lane's share of a tile.
struct KeyBox {
    int rows;  // that are keys
    bool paged;
    Box box;  // of K in `pages`, else of either in k and v

    __device__ __forceinline__ KeyBox(const Args& args, const Item& item, const Source& source, int index) {
        const int page_size = args.params.pool.page_size;
        paged = index < source.count;
        if (paged) {
            const int slot = source.slots[index];
            rows = slot & kRowsMask;
            box = {0, rows == 0 ? page_size : 0, 0, source.page(slot)};  // an empty entry: past the page, all zero
        } else {
            const int row = (index - source.count) << args.page_shift, left = args.params.tokens - row;
            rows = left < 0 ? 0 : left < page_size ? left : page_size;
            box = {0, row, item.kv_head, item.batch};
        }
    }
};

// Bit i: whether key i of the tile is there, from the rows of the boxes that the first lanes hold.
__device__ __forceinline__ Chunk named_keys(int rows, int page_shift, int lane) {
    Chunk named;
#pragma unroll
    for (int part = 0; part < 4; ++part) {
        const int key = part * kWarpLanes + lane;
        const int of_box = shuffle_from(rows, key >> page_shift);
        named.word[part] = ballot((key & ((1 << page_shift) - 1)) < of_box);
    }
    return named;
}

template <class Tile>
__device__ __forceinline__ void fetch_queries(const Args& args, const Item& item, const Ring<Tile>& ring) {
    const int blocks = args.stride == 1 ? kConsumers : 1;
    mbarrier_expect(ring.query_full(), blocks * Tile::kRowBlockBytes);
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
    for (int index = blockIdx.x; index < args.items; index += args.blocks, ++round) {
        const Item item(args, index);
        const Source source(args.params, args.params.read, item);
        mbarrier_wait(ring.query_empty(), (round & 1) ^ 1);
        if (lane == 0) fetch_queries(args, item, ring);
        for (int step = 0; step < 2 * args.key_tiles; ++step) {
            const auto [tile, part, spot] = Turn(args, round, step);
            const KeyTile<Tile> keys(args, tile);
            KeyBox key_box(args, item, source, keys.first_box + lane);
            ring.wait_empty(spot);
            if (part == 0) {
                const Chunk named = named_keys(key_box.rows, args.page_shift, lane);
                if (lane == 0) store_shared_16(ring.mask(spot), named);
            }
            if (lane == 0) mbarrier_expect(ring.full(spot), tile == 0 ? first_bytes : Tile::kSlotBytes);
            warp_barrier();
            if (lane >= keys.boxes) continue;
            if (key_box.paged) key_box.box.third = part;
            const TensorMap& map = key_box.paged ? args.pages : part == 0 ? args.k : args.v;
            const SharedAddress to = ring.tile(spot) + (lane << args.page_shift) * kSwizzleBytes;
            for (int panel = 0; panel < Tile::kPanels; ++panel) {
                key_box.box.column = panel * kSwizzleElements;
                tma_load(to + panel * Tile::kKeys * kSwizzleBytes, map, key_box.box, ring.full(spot));
            }
        }
    }
}

// Whether the write table takes the current scale box by box: full pages in order, then the rest.
__device__ __forceinline__ bool takes_boxes(const Args& args, const Source& pages, int lane) {
    const AttnParams& p = args.params;
    bool fits = (p.tokens + p.pool.page_size - 1) >> args.page_shift <= p.write.count;
    for (int i = lane; i < p.write.count; i += kWarpLanes) {
        const int left = p.tokens - (i << args.page_shift);
        const int rows = left < 0 ? 0 : left < p.pool.page_size ? left : p.pool.page_size;
        fits = fits && (pages.slots[i] & kRowsMask) == rows;
    }
    return ballot(fits) == ~0u;
}

// Whether this item's tile takes part in the store of its KV head: those of the first query head do.
__device__ __forceinline__ bool stores(const Args& args, const Item& item) {
    return args.params.write.count > 0 && item.head == item.kv_head * args.group;
}

// Warp 1 of the movers: stores each box of the current scale once, from the slot that the consumers read. The tiles of
// query rows share the boxes among themselves.
template <class Tile>
__device__ __forceinline__ void keep_boxes(const Args& args, const Ring<Tile>& ring, int lane) {
    const AttnParams& p = args.params;
    int round = 0;
    for (int index = blockIdx.x; index < args.items; index += args.blocks, ++round) {
        const Item item(args, index);
        const Source pages(p, p.write, item);
        const bool boxwise = stores(args, item) && takes_boxes(args, pages, lane);
        for (int step = 0; step < 2 * args.key_tiles; ++step) {
            const auto [tile, part, spot] = Turn(args, round, step);
            const KeyTile<Tile> keys(args, tile);
            const int index_in_scale = keys.first_box + lane - p.read.count;
            ring.wait_full(spot);
            const bool mine = boxwise && lane < keys.boxes && index_in_scale >= 0 &&
                              index_in_scale << args.page_shift < p.tokens &&
                              index_in_scale % args.row_tiles == item.row_tile;
            if (mine) {
                const int page = pages.page(pages.slots[index_in_scale]);
                const SharedAddress from = ring.tile(spot) + (lane << args.page_shift) * kSwizzleBytes;
                for (int panel = 0; panel < Tile::kPanels; ++panel) {
                    const Box box{panel * kSwizzleElements, 0, part, page};
                    tma_store(args.pages, box, from + panel * Tile::kKeys * kSwizzleBytes);
                }
                tma_store_commit();
                tma_store_wait_read();
            }
            ring.release(spot, lane);
        }
    }
}

// Warps 2 and 3 of the movers: store the rows that do not fall on pages box by box, such as those that join a page
// already begun, from global memory.
template <class Tile>
__device__ __forceinline__ void keep_rows(const Args& args, int worker, int lane) {
    const AttnParams& p = args.params;
    for (int index = blockIdx.x; index < args.items; index += args.blocks) {
        const Item item(args, index);
        if (!stores(args, item) || takes_boxes(args, Source(p, p.write, item), lane)) continue;
        const int workers = 2 * args.row_tiles, mine = 2 * item.row_tile + worker;
        store_rows<Tile::kHeadDim, 1>(p, item.batch, item.kv_head, mine, workers, lane);
    }
}

}  // namespace amskv::hopper
