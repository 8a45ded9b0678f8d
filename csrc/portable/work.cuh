// What a team of warps works on: its tile of query rows, its keys, and how both come into shared memory.
#pragma once

#include <cmath>

#include "amskv/amskv.h"
#include "common/device.cuh"
#include "common/tiles.h"

namespace amskv {

struct AttnArgs {
    AttnParams params;
    AttnPlan plan;
    int page_shift;  // log2(page_size)
    int row_tiles;   // of one sequence and KV head
    int key_tiles;
    int items;  // row_tiles · splits · kv_heads · batch
    int team_bytes;
    int k_step, v_step;  // bytes from one token to the next
    int group;           // query heads of a KV head
    float* partial_out;  // (splits, B, n, H, D), where splits > 1
    float* partial_sums;  // (splits, 2, B, H, n): what a part is measured from, and its sum
};

// The warps that work on one tile of query rows. Barrier 0 is the whole block's.
struct Team {
    int index, warp, warps, lane;
    SharedAddress shared;

    __device__ __forceinline__ int thread() const { return warp * kWarpLanes + lane; }
    __device__ __forceinline__ int threads() const { return warps * kWarpLanes; }
    __device__ __forceinline__ void barrier() const { named_barrier(index + 1, threads()); }
};

// What a team computes: query rows from `first_row` on, over key tiles [first_key_tile, end_key_tile).
struct Work {
    int batch, kv_head, row_tile, first_row, first_key_tile, end_key_tile;

    // Which part of split keys, told from what is known anyway: wide tiles have no register to keep it in.
    __device__ __forceinline__ int split(const AttnArgs& args) const { return (end_key_tile - 1) / key_share(args); }

    __device__ __forceinline__ static int key_share(const AttnArgs& args) {
        return (args.key_tiles + args.plan.splits - 1) / args.plan.splits;
    }
};

template <class Tile>
__device__ __forceinline__ Work work_of(const AttnArgs& args, const Team& team, int item) {
    Work work;
    work.row_tile = item % args.row_tiles;  // fastest: neighbours read the same keys
    item /= args.row_tiles;
    const int split = item % args.plan.splits;
    item /= args.plan.splits;
    work.kv_head = item % args.params.kv_heads;
    work.batch = item / args.params.kv_heads;
    work.first_row = work.row_tile * team.warps * Tile::kRowsPerWarp;
    const int share = Work::key_share(args);
    work.first_key_tile = split * share;
    const int left = args.key_tiles - work.first_key_tile;
    work.end_key_tile = work.first_key_tile + (left < share ? left : share);
    return work;
}

// Where the keys of one sequence and head lie. The pointers are at the chunk that this thread copies of every row.
template <class Tile>
struct Keys {
    using Layout = Swizzled<Tile::kHeadDim>;
    using Bytes = const unsigned char*;

    Bytes pages, k, v;
    const float* scales;  // of int8 pages
    const int32_t* slots;
    int arena;  // its first page
    int k_step, v_step, page_shift, history, tokens;

    struct Row {
        Bytes k, v;
        const float* scale;  // of this row of K in an int8 page; that of V is page_size further
        bool named;
    };

    // The chunks: of a row of a page, and of one of the current scale.
    __device__ __forceinline__ Keys(const AttnArgs& args, const Work& work, int page_chunk, int chunk)
        : slots(slots_of(args.params.read, work.batch, work.kv_head)),
          k_step(args.k_step),
          v_step(args.v_step),
          page_shift(args.page_shift),
          history(args.params.read.count << args.page_shift),
          tokens(args.params.tokens) {
        arena = args.params.pool.arena[work.batch * args.params.kv_heads + work.kv_head];
        pages = static_cast<Bytes>(args.params.pool.pages) + page_chunk * kChunkBytes;
        scales = args.params.pool.scales;
        k = reinterpret_cast<Bytes>(row_of(args.params.k, work.batch, work.kv_head)) + chunk * kChunkBytes;
        v = reinterpret_cast<Bytes>(row_of(args.params.v, work.batch, work.kv_head)) + chunk * kChunkBytes;
    }

    __device__ __forceinline__ int row_in_page(int key) const { return key & ((1 << page_shift) - 1); }

    __device__ __forceinline__ bool named(int key) const {
        if (key >= history) return key - history < tokens;
        return row_in_page(key) < (slots[key >> page_shift] & kRowsMask);
    }

    __device__ __forceinline__ Row row(int key) const {
        if (key >= history) {
            const int token = key - history;
            return {k + int64_t{token} * k_step, v + int64_t{token} * v_step, nullptr, token < tokens};
        }
        const int slot = slots[key >> page_shift], row = row_in_page(key), page = slot >> kRowsBits;
        const int64_t of_pool = (int64_t{arena + page} * 2 << page_shift) + row;
        const Bytes at = pages + of_pool * Tile::kPageRowBytes;
        return {at, at + (Tile::kPageRowBytes << page_shift), scales + of_pool, row < (slot & kRowsMask)};
    }
};

// Query row r of a KV head's group: token r / group, head r % group.
struct QueryRow {
    int token, head;
    bool real;

    __device__ __forceinline__ QueryRow(const AttnArgs& args, int kv_head, int row) {
        token = args.group == 1 ? row : row / args.group;  // most models have no groups: spare them the division
        head = kv_head * args.group + row - token * args.group;
        real = token < args.params.tokens;
    }
};

// Fetches the team's query rows; rows past the last become zero.
template <class Tile>
__device__ __forceinline__ void load_queries(const AttnArgs& args, const Work& work, const Team& team) {
    const AttnParams& p = args.params;
    using Layout = Swizzled<Tile::kHeadDim>;
    const uint16_t* const q = row_of(p.q, work.batch, 0);
    const int chunks = team.warps * Tile::kRowsPerWarp * Layout::kChunks;
    for (int i = team.thread(); i < chunks; i += team.threads()) {
        const int row = i / Layout::kChunks, chunk = i % Layout::kChunks;
        const QueryRow at(args, work.kv_head, work.first_row + row);
        const uint16_t* const from = q + at.token * p.q.token_stride + at.head * p.q.head_stride;
        cp_async_16(team.shared + Layout::offset(row, chunk), from + chunk * kChunkElements, at.real);
    }
}

// Fetches a tile of keys and values; rows that no slot names become zero, because 0 · NaN is not. As many threads
// share a row as chunks of it change places, so that the other chunks lie at fixed distances.
template <class Tile>
__device__ __forceinline__ void load_keys(const Keys<Tile>& keys, int tile, SharedAddress stage, const Team& team) {
    using Layout = Swizzled<Tile::kHeadDim>;
    const int chunk = team.thread() % Layout::kPermuted, rows = team.threads() / Layout::kPermuted;
#pragma unroll 2
    for (int row = team.thread() / Layout::kPermuted; row < Tile::kKeys; row += rows) {
        const auto from = keys.row(tile * Tile::kKeys + row);
        const SharedAddress to = stage + Layout::offset(row, chunk);
#pragma unroll
        for (int i = 0; i < Layout::kRowBytes; i += Layout::kPermuted * kChunkBytes) {
            cp_async_16(to + i, from.k + i, from.named);
            cp_async_16(to + i + Tile::kKeyBytes, from.v + i, from.named);
        }
    }
}

// Bit i: whether key i of the tile is there. The same in all lanes.
template <class Tile>
__device__ __forceinline__ typename Tile::KeyMask named_keys(const Keys<Tile>& keys, int tile, int lane) {
    using Mask = typename Tile::KeyMask;
    const int first = tile * Tile::kKeys;
    if (first >= keys.history) {
        const int left = keys.history + keys.tokens - first;
        return left >= Tile::kKeys ? Tile::kAllKeys : (Mask{1} << left) - 1;
    }
    Mask mask = 0;
#pragma unroll
    for (int part = 0; part < Tile::kKeys; part += kWarpLanes) {
        mask |= static_cast<Mask>(ballot(keys.named(first + part + lane))) << part;
    }
    return mask;
}

// 16 query rows × 16 elements as the left operand of a product.
template <class Tile>
__device__ __forceinline__ void load_query_fragment(
    uint32_t (&fragment)[4], SharedAddress queries, int row_block, int step, int lane) {
    using Layout = Swizzled<Tile::kHeadDim>;
    const SharedAddress first = queries + Layout::offset(lane % 16, lane / 16);
    ldmatrix_x4(fragment, Layout::advance(first, 2 * step) + row_block * kMmaRows * Layout::kRowBytes);
}

}  // namespace amskv
