// The store of the current scale's K, V rows into their pages, by any number of warps.
#pragma once

#include "amskv/amskv.h"
#include "common/device.cuh"
#include "common/tiles.h"

namespace amskv {

inline constexpr int kRowsMask = (1 << kRowsBits) - 1;
inline constexpr int kUnitRows = 16;  // rows a warp stores at a time: the smallest page, so that units never straddle

// One sequence-and-head's part of a slot table.
__device__ __forceinline__ const int32_t* slots_of(const SlotTable& table, int batch, int kv_head) {
    return table.data + batch * table.batch_stride + kv_head * table.head_stride;
}

__device__ __forceinline__ const uint16_t* row_of(const Rows& rows, int batch, int head) {
    return static_cast<const uint16_t*>(rows.data) + batch * rows.batch_stride + head * rows.head_stride;
}

// Where one unit of a page gets its rows: row i from row `source` + i of k, v if i < `rows`, else zeros. Rows with
// source + i < 0 are in the page already.
struct Unit {
    uint16_t* page;  // row 0 of K
    int page_size, first_row, rows, source;
};

// A lane holds `kInFlight` chunks at a time: as many as its share of K where registers allow.
template <int kHeadDim, int kInFlight>
__device__ __forceinline__ void store_unit(
    const Unit& unit, const uint16_t* k, const uint16_t* v, int64_t k_stride, int64_t v_stride, int lane) {
    constexpr int kChunks = kHeadDim / kChunkElements;
    constexpr int kTurns = kUnitRows * kChunks / kWarpLanes;  // chunks of K that each lane moves, and as many of V
#pragma unroll(kInFlight == kTurns ? 2 : 1)
    for (int step = 0; step < 2 * kTurns; step += kInFlight) {
        const int part = step / kTurns;
        const uint16_t* const from = part == 0 ? k : v;
        const int64_t stride = part == 0 ? k_stride : v_stride;
        uint16_t* const to = unit.page + part * unit.page_size * kHeadDim;
        Chunk chunks[kInFlight];
#pragma unroll
        for (int turn = 0; turn < kInFlight; ++turn) {  // all loads first, so that they overlap
            const int i = (step % kTurns + turn) * kWarpLanes + lane;
            const int row = unit.first_row + i / kChunks, source = unit.source + row;
            chunks[turn] = Chunk{};
            if (row < unit.rows && source >= 0) {
                chunks[turn] = *reinterpret_cast<const Chunk*>(from + source * stride + i % kChunks * kChunkElements);
            }
        }
#pragma unroll
        for (int turn = 0; turn < kInFlight; ++turn) {
            const int i = (step % kTurns + turn) * kWarpLanes + lane;
            const int row = unit.first_row + i / kChunks;
            if (row >= unit.rows || unit.source + row >= 0) {
                *reinterpret_cast<Chunk*>(to + row * kHeadDim + i % kChunks * kChunkElements) = chunks[turn];
            }
        }
    }
}

__device__ __forceinline__ int inclusive_sum(int value, int lane) {
#pragma unroll
    for (int delta = 1; delta < kWarpLanes; delta *= 2) {
        const int below = shuffle_up(value, delta);
        value += lane >= delta ? below : 0;
    }
    return value;
}

// The share of warp `worker` of `workers` in the store of one sequence and head. All lanes of the warp take part.
template <int kHeadDim, int kInFlight = kUnitRows * kHeadDim / kChunkElements / kWarpLanes, typename Params>
__device__ __forceinline__ void store_rows(const Params& p, int batch, int kv_head, int worker, int workers, int lane) {
    const SlotTable& table = p.write;
    const int32_t* const slots = slots_of(table, batch, kv_head);
    const int units = p.pool.page_size / kUnitRows;
    int named = 0;
    for (int i = lane; i < table.count; i += kWarpLanes) named += slots[i] & kRowsMask;
    int source = p.tokens - shuffle_from(inclusive_sum(named, lane), kWarpLanes - 1);  // minus the rows already there
    const int64_t page_elements = int64_t{2} * p.pool.page_size * kHeadDim;
    uint16_t* const arena =
        static_cast<uint16_t*>(p.pool.pages) + p.pool.arena[batch * p.kv_heads + kv_head] * page_elements;
    const uint16_t *const k = row_of(p.k, batch, kv_head), *const v = row_of(p.v, batch, kv_head);
    for (int base = 0; base < table.count; base += kWarpLanes) {
        const int mine = base + lane < table.count ? slots[base + lane] : 0;
        const int end = source + inclusive_sum(mine & kRowsMask, lane);
        const int entries = table.count - base < kWarpLanes ? table.count - base : kWarpLanes;
        for (int i = 0; i < entries; ++i) {
            const int slot = shuffle_from(mine, i), rows = slot & kRowsMask;
            Unit unit{
                arena + (slot >> kRowsBits) * page_elements, p.pool.page_size, 0, rows, shuffle_from(end, i) - rows};
            if (rows == 0) continue;
            const int before = (base + i) * units;  // units of earlier entries: they are dealt to the workers in turn
            for (int u = (worker + workers - before % workers) % workers; u < units; u += workers) {
                unit.first_row = u * kUnitRows;
                store_unit<kHeadDim, kInFlight>(unit, k, v, p.k.token_stride, p.v.token_stride, lane);
            }
        }
        source = shuffle_from(end, kWarpLanes - 1);
    }
}

}  // namespace amskv
