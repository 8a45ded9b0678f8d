// What the Hopper kernel's warpgroups share: the items of work, and the ring of K and V tiles with its barriers.
#pragma once

#include "amskv/amskv.h"
#include "hopper/device.cuh"
#include "common/tiles.h"

namespace amskv::hopper {

struct Args {
    TensorMap q, k, v, pages, out;  // boxes of 64 rows in q and out, of a page in k, v and pages
    AttnParams params;
    int page_shift;  // log2(page_size)
    int row_tiles;   // of one sequence and head
    int key_tiles;
    int first_keys;  // of the first tile of keys: all, or half where that covers what would be left over
    int items;   // row_tiles · heads · batch
    int blocks;  // of the grid
    int group;   // query heads of a KV head
    int stride;  // from one tile of keys of a consumer to its next; 2: the consumers share their rows
    int slot_bits;  // log2 of the slots that a consumer goes through
};

// A tile of query rows of one head. Tiles of a head, and heads of a KV head, are neighbours: they read the same keys
// at the same time, so L2 serves all but the first.
struct Item {
    int batch, head, kv_head, row_tile, first_row;

    __device__ __forceinline__ Item(const Args& args, int index) {
        row_tile = index % args.row_tiles;
        index /= args.row_tiles;
        head = index % args.params.heads;
        batch = index / args.params.heads;
        kv_head = args.group == 1 ? head : head / args.group;
        first_row = row_tile * (args.stride == 1 ? kConsumers * kWarpgroupRows : kWarpgroupRows);
    }
};

// A slot of the ring, and the parity of the rounds it has been through.
struct Spot {
    int slot, parity;
};

// The order in which the tiles of K and V of one item reach a consumer: K₀ K₁ V₀ K₂ V₁ …, since a tile's scores are
// computed before the values of the one before are needed. Consumers that share their rows have half of the ring each:
// a phase is known by its parity alone, so every reader of a slot must see all of its rounds.
struct Order {
    int tiles, first, group, slot_bits;

    __device__ __forceinline__ Order(const Args& args, int round, int ring)
        : tiles((args.key_tiles + args.stride - 1 - ring) / args.stride),
          first(2 * tiles * round),
          group(ring),
          slot_bits(args.slot_bits) {}

    __device__ __forceinline__ Spot k(int tile) const { return spot(tile == 0 ? 0 : 2 * tile - 1); }
    __device__ __forceinline__ Spot v(int tile) const { return spot(tile + 1 < tiles ? 2 * tile + 2 : 2 * tile + 1); }

    __device__ __forceinline__ Spot spot(int step) const {
        const int position = first + step;
        return {group << slot_bits | (position & ((1 << slot_bits) - 1)), position >> slot_bits & 1};
    }
};

// What a step of the movers is about: the consumers' orders, by turns while both have tiles left.
struct Turn {
    int tile, part;  // of the item's tiles of keys; 0: K, 1: V
    Spot spot;

    __device__ __forceinline__ Turn(const Args& args, int round, int step) {
        const int both = args.stride == 1 ? 0 : args.key_tiles / 2 * 4;  // steps
        const int ring = step < both ? step % 2 : 0, own = step < both ? step / 2 : step - both / 2;
        const Order order(args, round, ring);
        part = own > 0 && (own % 2 == 0 || own == 2 * order.tiles - 1);
        tile = (part == 0 ? (own + 1) / 2 : (own - 1) / 2) * args.stride + ring;
        spot = order.spot(own);
    }
};

// Shared memory and its barriers. Every slot is read by the warps of its consumers and by the warp that stores.
template <class Tile>
struct Ring {
    SharedAddress shared;

    __device__ __forceinline__ SharedAddress query(int group) const {
        return shared + Tile::kQuery + group * Tile::kRowBlockBytes;
    }
    __device__ __forceinline__ SharedAddress out(int group) const {
        return shared + Tile::kOut + group * Tile::kRowBlockBytes;
    }
    __device__ __forceinline__ SharedAddress tile(Spot spot) const {
        return shared + Tile::kRing + spot.slot * Tile::kSlotBytes;
    }
    __device__ __forceinline__ SharedAddress mask(Spot spot) const {
        return shared + Tile::kMasks + spot.slot * kChunkBytes;
    }
    __device__ __forceinline__ SharedAddress full(Spot spot) const { return shared + Tile::kBarriers + spot.slot * 8; }
    __device__ __forceinline__ SharedAddress empty(Spot spot) const { return full(spot) + Tile::kSlots * 8; }
    __device__ __forceinline__ SharedAddress query_full() const {
        return shared + Tile::kBarriers + 2 * Tile::kSlots * 8;
    }
    __device__ __forceinline__ SharedAddress query_empty() const { return query_full() + 8; }

    __device__ __forceinline__ void wait_full(Spot spot) const { mbarrier_wait(full(spot), spot.parity); }
    __device__ __forceinline__ void wait_empty(Spot spot) const {
        mbarrier_wait(empty(spot), spot.parity ^ 1);  // the first round finds every slot empty
    }
    // By all lanes of a warp that has read the slot.
    __device__ __forceinline__ void release(Spot spot, int lane) const {
        warp_barrier();
        if (lane == 0) mbarrier_arrive(empty(spot));
    }

    __device__ __forceinline__ void release_query(int lane) const {
        warp_barrier();
        if (lane == 0) mbarrier_arrive(query_empty());
    }

    __device__ __forceinline__ void init(const Args& args) const {
        const int readers = (args.stride == 1 ? kConsumers : 1) * kWarpgroupWarps + 1;
        for (int slot = 0; slot < Tile::kSlots; ++slot) {
            mbarrier_init(full({slot, 0}), 1);
            mbarrier_init(empty({slot, 0}), readers);
        }
        mbarrier_init(query_full(), 1);
        mbarrier_init(query_empty(), kConsumers * kWarpgroupWarps);
        mbarrier_init_fence();
    }
};

}  // namespace amskv::hopper
