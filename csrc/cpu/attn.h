// Attention of one task in fp32: tiles of query rows against the history in its pages and the current scale.
#pragma once

#include "cpu/attn_few.h"
#include "cpu/cpu.h"
#include "cpu/rows.h"
#include "cpu/tile.h"
#ifdef __AVX512BF16__
#include "cpu/attn_pairs.h"
#endif

namespace amskv::cpu {
namespace {

// kLanes rows of as many elements, as columns: to[i][j] = scale · from[j][first + i], rows of `to` kTile apart; a row
// that is null is zeros.
template <typename T>
void load_columns(const T* const* from, int first, float scale, float* to) {
    if (!from[2]) {  // one row or two: cheaper element by element
        for (int i = 0; i < kLanes; ++i) store(to + i * kTile, Vec{});
        for (int j = 0; j < 2 && from[j]; ++j) {
            float row[kLanes];
            store(row, load(from[j] + first) * scale);
            for (int i = 0; i < kLanes; ++i) to[i * kTile + j] = row[i];
        }
        return;
    }
    Vec x[kLanes];
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) x[i] = from[i] ? load(from[i] + first) * scale : Vec{};
    transpose(x);
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) store(to + i * kTile, x[i]);
}

template <typename T>
void begin_tile(const AttnParams& p, int batch, int head, int first, int rows, Tile& tile) {
    constexpr double kLog2E = 1.4426950408889634;
    const float scale = static_cast<float>(p.softmax_scale * kLog2E);
    const T* const q = static_cast<const T*>(p.q.data);
    tile.rows = rows, tile.vectors = (rows + kLanes - 1) / kLanes;
    for (int j = 0; j < tile.vectors; ++j) {
        const int begin = j * kLanes, end = rows - begin < kLanes ? rows - begin : kLanes;
        const T* from[kLanes] = {};
        for (int i = 0; i < end; ++i) from[i] = q + query_offset(p, batch, head, first + begin + i);
        for (int d = 0; d < p.head_dim; d += kLanes) load_columns(from, d, scale, tile.q + d * kTile + begin);
        store(tile.largest + begin, broadcast(-kInfinity));
        store(tile.total + begin, Vec{});
    }
    for (int i = 0; i < rows * p.head_dim; i += kLanes) store(tile.out + i, Vec{});
}

// A row of T as fp32.
template <typename T>
const float* copy(const void* row, float scale, int head_dim, float* to) {
    for (int d = 0; d < head_dim; d += kLanes) {
        const Vec x = load(static_cast<const T*>(row) + d);
        store(to + d, kEightBits<T> ? x * scale : x);
    }
    return to;
}

// K and V of a block as fp32, as pointers to its rows. fp32 rows of a page are read where they lie; those of the
// current scale are far apart and read many times, so they are copied.
template <typename T, typename Page>
void load_block(const Keys<T, Page, kBlock>& keys, int head_dim, Scratch& scratch) {
    const int in_place = sizeof(Page) == sizeof(float) ? keys.paged : 0;
    for (int i = 0; i < in_place; ++i) {
        scratch.keys[i] = static_cast<const float*>(keys.k[i]);
        scratch.values[i] = static_cast<const float*>(keys.v[i]);
    }
    for (int i = in_place; i < keys.count; ++i) {
        const auto copy_row = i < keys.paged ? copy<Page> : copy<T>;
        const bool scaled = kEightBits<Page>;  // others have no scales
        const float k_scale = scaled ? keys.k_scale[i] : 1, v_scale = scaled ? keys.v_scale[i] : 1;
        scratch.keys[i] = copy_row(keys.k[i], k_scale, head_dim, scratch.key_copies + i * head_dim);
        scratch.values[i] = copy_row(keys.v[i], v_scale, head_dim, scratch.value_copies + i * head_dim);
    }
    for (int i = 0; i < kPastEnd; ++i) scratch.keys[keys.count + i] = scratch.keys[keys.count - 1];
}

template <typename T>
void end_tile(const AttnParams& p, int batch, int head, int first, const Tile& tile) {
    constexpr float kLn2 = 0.69314718f;
    for (int i = 0; i < tile.rows; ++i) {
        T* const out = static_cast<T*>(p.out) + out_row(p, batch, head, first + i) * p.head_dim;
        const float inverse = tile.total[i] == 0 ? 0 : 1 / tile.total[i];  // 0: no key, or a score of −∞ with each
        for (int d = 0; d < p.head_dim; d += kLanes) store(out + d, load(tile.out + i * p.head_dim + d) * inverse);
        p.lse[lse_row(p, batch, head, first + i)] = (tile.largest[i] + __builtin_log2f(tile.total[i])) * kLn2;
    }
}

template <typename T, typename Page>
void attn_fp32(const AttnParams& p, const AttnCut& cut, int64_t task, Scratch& scratch) {
    const AttnTask part = task_of(p, cut, task);
    Keys<T, Page, kBlock> keys(p, part.batch, part.head);
    int count = keys.next();
    for (int i = 0; i < part.tiles; ++i) {
        keys.prefetch(i, part.tiles);
        const int row = part.row + i * cut.rows_per_tile;
        begin_tile<T>(p, part.batch, part.head, row, part.rows_of(cut, i), scratch.tiles[i]);
    }
    while (count > 0) {
        load_block(keys, p.head_dim, scratch);
        const int next = keys.next();
        for (int i = 0; i < part.tiles; ++i) {
            Tile& tile = scratch.tiles[i];
            keys.prefetch(i, part.tiles);
            if (next == 0) prefetch_out(p, part, part.row + i * cut.rows_per_tile, tile.rows);
            for (int j = 0; j < tile.vectors * kLanes; j += kLanes) store(scratch.largest + j, load(tile.largest + j));
            score_keys(scratch.keys, count, tile.q, p.head_dim, tile.vectors, scratch.scores, scratch.largest);
            weigh_keys(
                scratch.scores, count, tile.vectors, scratch.largest, tile.largest, tile.total, scratch.decay);
            add_values(scratch.values, count, scratch.scores, scratch.decay, tile.rows, p.head_dim, tile.out);
        }
        count = next;
    }
    for (int i = 0; i < part.tiles; ++i)
        end_tile<T>(p, part.batch, part.head, part.row + i * cut.rows_per_tile, scratch.tiles[i]);
    store_task(p, part);
}

template <typename T, typename Page>
void attn_as(const AttnParams& p, const AttnCut& cut, int64_t task, Scratch& scratch) {
    if (cut.rows <= kFewRows) return attn_few<T, Page>(p, cut, task);
#ifdef __AVX512BF16__
    if constexpr (__is_same(T, BFloat16)) return attn_pairs<Page>(p, cut, task, scratch);
#endif
    return attn_fp32<T, Page>(p, cut, task, scratch);
}

// The same elements in pages as in the current scale, or eight bits.
template <typename T>
void attn_of(const AttnParams& p, const AttnCut& cut, int64_t task, Scratch& scratch) {
    p.pool.scales ? attn_as<T, int8_t>(p, cut, task, scratch) : attn_as<T, T>(p, cut, task, scratch);
}

inline void attn_any(const AttnParams& p, const AttnCut& cut, int64_t task, Scratch& scratch) {
    switch (p.dtype) {
        case DType::kFloat32: return attn_of<float>(p, cut, task, scratch);
        case DType::kFloat16: return attn_of<Half>(p, cut, task, scratch);
        case DType::kBFloat16: return attn_of<BFloat16>(p, cut, task, scratch);
    }
}

}  // namespace
}  // namespace amskv::cpu
