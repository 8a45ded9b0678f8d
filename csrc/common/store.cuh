// The store of the current scale's K, V rows into their pages, by any number of warps.
#pragma once

#include <type_traits>

#include "amskv/amskv.h"
#include "common/device.cuh"
#include "common/int8.cuh"
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
    void* page;  // row 0 of K
    int page_size, first_row, rows, source;
    float* scales = nullptr;  // the same, of int8 pages

    __device__ __forceinline__ bool takes(int row) const { return row < rows && source + row >= 0; }
    __device__ __forceinline__ bool writes(int row) const { return row >= rows || source + row >= 0; }
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
        uint16_t* const to = static_cast<uint16_t*>(unit.page) + part * unit.page_size * kHeadDim;
        Chunk chunks[kInFlight];
#pragma unroll
        for (int turn = 0; turn < kInFlight; ++turn) {  // all loads first, so that they overlap
            const int i = (step % kTurns + turn) * kWarpLanes + lane;
            const int row = unit.first_row + i / kChunks, source = unit.source + row;
            chunks[turn] = Chunk{};
            if (unit.takes(row)) {
                chunks[turn] = *reinterpret_cast<const Chunk*>(from + source * stride + i % kChunks * kChunkElements);
            }
        }
#pragma unroll
        for (int turn = 0; turn < kInFlight; ++turn) {
            const int i = (step % kTurns + turn) * kWarpLanes + lane;
            const int row = unit.first_row + i / kChunks;
            if (unit.writes(row)) {
                *reinterpret_cast<Chunk*>(to + row * kHeadDim + i % kChunks * kChunkElements) = chunks[turn];
            }
        }
    }
}

// The same into int8 pages. Four lanes share a row, and find its scale together.
template <int kHeadDim, typename T>
__device__ __forceinline__ void store_rounded_unit(
    const Unit& unit, const uint16_t* k, const uint16_t* v, int64_t k_stride, int64_t v_stride, int lane) {
    constexpr int kLanes = 4, kRows = kWarpLanes / kLanes, kTurns = kHeadDim / kChunkElements / kLanes;
#pragma unroll 1
    for (int step = 0; step < 2 * kUnitRows; step += kRows) {
        const int part = step / kUnitRows, row = unit.first_row + step % kUnitRows + lane / kLanes;
        const uint16_t* const from = (part == 0 ? k : v) + (unit.source + row) * (part == 0 ? k_stride : v_stride);
        Chunk chunks[kTurns];
        uint32_t largest = 0;
#pragma unroll
        for (int turn = 0; turn < kTurns; ++turn) {
            const int column = (turn * kLanes + lane % kLanes) * kChunkElements;
            chunks[turn] = unit.takes(row) ? *reinterpret_cast<const Chunk*>(from + column) : Chunk{};
        }
#pragma unroll
        for (int i = 0; i < kTurns * 4; ++i) largest = larger_magnitude<T>(largest, chunks[i / 4].word[i % 4]);
#pragma unroll
        for (int other = 1; other < kLanes; other *= 2) {
            const uint32_t theirs = shuffle_xor(largest, other);
            largest = theirs > largest ? theirs : largest;
        }
        if (!unit.writes(row)) continue;
        const RowScale scale(largest);
        const int at = part * unit.page_size + row;
        uint8_t* const to = static_cast<uint8_t*>(unit.page) + at * kHeadDim + lane % kLanes * kChunkElements;
#pragma unroll
        for (int turn = 0; turn < kTurns; ++turn) {
            const uint32_t(&words)[4] = chunks[turn].word;
            *reinterpret_cast<uint2*>(to + turn * kLanes * kChunkElements) =
                uint2{scale.round<T>(words[0], words[1]), scale.round<T>(words[2], words[3])};
        }
        if (lane % kLanes == 0) unit.scales[at] = scale.scale;
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

// The share of warp `worker` of `workers` in the store of one sequence and head. All lanes of the warp take part. Rows of
// `Rounded`, where it is given, go to int8 pages; else pages hold what they are.
template <
    int kHeadDim, typename Rounded = void, int kInFlight = kUnitRows * kHeadDim / kChunkElements / kWarpLanes,
    typename Params>
__device__ __forceinline__ void store_rows(const Params& p, int batch, int kv_head, int worker, int workers, int lane) {
    constexpr bool kRounds = !std::is_void_v<Rounded>;
    const SlotTable& table = p.write;
    const int32_t* const slots = slots_of(table, batch, kv_head);
    const int units = p.pool.page_size / kUnitRows;
    int named = 0;
    for (int i = lane; i < table.count; i += kWarpLanes) named += slots[i] & kRowsMask;
    int source = p.tokens - shuffle_from(inclusive_sum(named, lane), kWarpLanes - 1);  // minus the rows already there
    const int64_t page_rows = int64_t{2} * p.pool.page_size, first_page = p.pool.arena[batch * p.kv_heads + kv_head];
    const int64_t page_bytes = page_rows * kHeadDim * (kRounds ? 1 : kElementBytes);
    unsigned char* const arena = static_cast<unsigned char*>(p.pool.pages) + first_page * page_bytes;
    const uint16_t *const k = row_of(p.k, batch, kv_head), *const v = row_of(p.v, batch, kv_head);
    for (int base = 0; base < table.count; base += kWarpLanes) {
        const int mine = base + lane < table.count ? slots[base + lane] : 0;
        const int end = source + inclusive_sum(mine & kRowsMask, lane);
        const int entries = table.count - base < kWarpLanes ? table.count - base : kWarpLanes;
        for (int i = 0; i < entries; ++i) {
            const int slot = shuffle_from(mine, i), rows = slot & kRowsMask;
            Unit unit{
                arena + (slot >> kRowsBits) * page_bytes, p.pool.page_size, 0, rows, shuffle_from(end, i) - rows};
            if (rows == 0) continue;
            if constexpr (kRounds) unit.scales = p.pool.scales + (first_page + (slot >> kRowsBits)) * page_rows;
            const int before = (base + i) * units;  // units of earlier entries: they are dealt to the workers in turn
            for (int u = (worker + workers - before % workers) % workers; u < units; u += workers) {
                unit.first_row = u * kUnitRows;
                if constexpr (kRounds) {
                    store_rounded_unit<kHeadDim, Rounded>(unit, k, v, p.k.token_stride, p.v.token_stride, lane);
                } else {
                    store_unit<kHeadDim, kInFlight>(unit, k, v, p.k.token_stride, p.v.token_stride, lane);
                }
            }
        }
        source = shuffle_from(end, kWarpLanes - 1);
    }
}

}  // namespace amskv
