// What producer and consumers of the Hopper kernel share: the items of work, and the pipeline of K and V tiles.
#pragma once

#include "amskv/amskv.h"
#include "common/tiles.h"
#include "hopper/device.cuh"

namespace amskv::hopper {

struct Args {
    TensorMap q, k, v, pages, out;  // boxes of 64 rows in q and out, of a page in pages, of `box_rows` in k and v
    AttnParams params;
    int page_shift;   // log2(page_size)
    int row_tiles;    // of one sequence and head
    int key_tiles;    // those of pages first, then, where nothing is stored, those of k and v in one box each
    int paged_tiles;  // in boxes of a page, of the history and, where something is stored, of the current scale
    int first_keys;   // of the first tile of keys: all, or half where that covers what would be left over
    int first_box;    // of the first tile, at most 0: the boxes before 0 hold no keys
    int items;        // row_tiles · heads · batch
    int blocks;       // of the grid
    int group;        // query heads of a KV head
    bool shares_rows;  // both consumers take the same rows, and tiles of keys by turns
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
        first_row = row_tile * (args.shares_rows ? kWarpgroupRows : kConsumers * kWarpgroupRows);
    }
};

enum Part { kKeys, kValues };

// A stage of the pipeline, and the parity of the rounds it has been through. Tile after tile of keys takes the next
// stage, its K and its V the same. Consumers that share their rows have half of the stages each: a phase is known by
// its parity alone, so whoever reads a stage must see all of its rounds.
struct PipelineState {
    int stage, first = 0, end = 0, parity = 0;

    template <class Tile>
    __device__ __forceinline__ static PipelineState begin(bool shares_rows, int consumer) {
        const int count = shares_rows ? Tile::kStages / kConsumers : Tile::kStages;
        const int first = shares_rows ? consumer * count : 0;
        return {first, first, first + count, 0};
    }

    __device__ __forceinline__ PipelineState next() const {
        const bool wraps = stage + 1 == end;
        return {wraps ? first : stage + 1, first, end, parity ^ static_cast<int>(wraps)};
    }
};

// The states of all tiles of keys, as the producer goes through them: by turns where consumers share their rows.
template <class Tile>
struct ProducerState {
    PipelineState now, other;
    bool shares_rows;

    __device__ __forceinline__ explicit ProducerState(const Args& args)
        : now(PipelineState::begin<Tile>(args.shares_rows, 0)),
          other(PipelineState::begin<Tile>(args.shares_rows, 1)),
          shares_rows(args.shares_rows) {}

    __device__ __forceinline__ void change() {
        const PipelineState before = now;
        if (shares_rows) now = other, other = before;
    }
    __device__ __forceinline__ void advance() {
        now = now.next();
        change();
    }
    // Every item begins with the first consumer.
    __device__ __forceinline__ void end_item(int key_tiles) {
        if (key_tiles % 2 == 1) change();
    }
};

// Shared memory and its barriers. Every stage is read by the warps of its consumers and, where something is stored, by
// the warp that stores.
template <class Tile>
struct Pipeline {
    SharedAddress shared;

    __device__ __forceinline__ SharedAddress query(int consumer) const {
        return shared + Tile::kQuery + consumer * Tile::kRowBlockBytes;
    }
    __device__ __forceinline__ SharedAddress out(int consumer) const {
        return shared + Tile::kOut + consumer * Tile::kRowBlockBytes;
    }
    __device__ __forceinline__ SharedAddress tile(Part part, const PipelineState& at) const {
        return shared + Tile::kPipeline + (part * Tile::kStages + at.stage) * Tile::kStageBytes;
    }
    // Which keys of the tile are there, 16 bytes.
    __device__ __forceinline__ SharedAddress mask(const PipelineState& at) const {
        return shared + Tile::kMasks + at.stage * kChunkBytes;
    }
    __device__ __forceinline__ SharedAddress full(Part part, const PipelineState& at) const {
        return shared + Tile::kBarriers + (part * Tile::kStages + at.stage) * 8;
    }
    __device__ __forceinline__ SharedAddress empty(Part part, const PipelineState& at) const {
        return full(part, at) + 2 * Tile::kStages * 8;
    }
    __device__ __forceinline__ SharedAddress query_full() const {
        return shared + Tile::kBarriers + 4 * Tile::kStages * 8;
    }
    __device__ __forceinline__ SharedAddress query_empty() const { return query_full() + 8; }

    __device__ __forceinline__ void wait_full(Part part, const PipelineState& at) const {
        mbarrier_wait(full(part, at), at.parity);
    }
    __device__ __forceinline__ void wait_empty(Part part, const PipelineState& at) const {
        mbarrier_wait(empty(part, at), at.parity ^ 1);  // the first round finds every stage empty
    }
    // By all lanes of a warp that has read the stage.
    __device__ __forceinline__ void release(Part part, const PipelineState& at, int lane) const {
        warp_barrier();
        if (lane == 0) mbarrier_arrive(empty(part, at));
    }
    __device__ __forceinline__ void release_query(int lane) const {
        warp_barrier();
        if (lane == 0) mbarrier_arrive(query_empty());
    }

    __device__ __forceinline__ void init(const Args& args) const {
        const int storing = args.params.write.count > 0 ? 1 : 0;
        const int readers = (args.shares_rows ? 1 : kConsumers) * kWarpgroupWarps + storing;
        for (int stage = 0; stage < Tile::kStages; ++stage) {
            for (const Part part : {kKeys, kValues}) {
                mbarrier_init(full(part, {stage}), 1);
                mbarrier_init(empty(part, {stage}), readers);
            }
        }
        mbarrier_init(query_full(), 1);
        mbarrier_init(query_empty(), kConsumers * kWarpgroupWarps);
        mbarrier_init_fence();
    }
};

}  // namespace amskv::hopper
