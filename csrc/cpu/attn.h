// Attention of one task: tiles of query rows against the history in its pages and the current scale.
#pragma once

#include "cpu/cpu.h"
#include "cpu/tile.h"

namespace amskv::cpu {
namespace {

// Turns kLanes rows of as many elements into columns, scaled: to[i][j] = scale · from[j][first + i], rows of `to` kTile
// apart; a row that is null is zeros.
template <typename T>
void transpose(const T* const* from, int first, float scale, float* to) {
    if (!from[2]) {  // one row or two: cheaper element by element
        for (int i = 0; i < kLanes; ++i) store(to + i * kTile, Vec{});
        for (int j = 0; j < 2 && from[j]; ++j) {
            float row[kLanes];
            store(row, load(from[j] + first) * scale);
            for (int i = 0; i < kLanes; ++i) to[i * kTile + j] = row[i];
        }
        return;
    }
    Vec x[kLanes], y[kLanes];
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) x[i] = from[i] ? load(from[i] + first) * scale : Vec{};
#pragma GCC unroll 4
    for (int step = 1; step < kLanes; step *= 2) {  // a perfect shuffle of rows and lanes each time
#pragma GCC unroll 8
        for (int i = 0; i < kLanes / 2; ++i) {
            y[2 * i] = interleave(x[i], x[i + kLanes / 2], false);
            y[2 * i + 1] = interleave(x[i], x[i + kLanes / 2], true);
        }
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) x[i] = y[i];
    }
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) store(to + i * kTile, x[i]);
}

// Where query row `row` of KV head `head` stands: rows run through the tokens of each of the group's heads.
inline int64_t query_offset(const AttnParams& p, int batch, int head, int row) {
    const int group = p.heads / p.kv_heads;
    return batch * p.q.batch_stride + row % p.tokens * p.q.token_stride +
           (head * group + row / p.tokens) * p.q.head_stride;
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
        for (int d = 0; d < p.head_dim; d += kLanes) transpose(from, d, scale, tile.q + d * kTile + begin);
        store(tile.largest + begin, broadcast(-kInfinity));
        store(tile.total + begin, Vec{});
    }
    for (int i = 0; i < rows * p.head_dim; i += kLanes) store(tile.out + i, Vec{});
}

// Walks the keys of one sequence and head, the rows that the slots name and then the current scale, a block at a time.
template <typename T>
class Keys {
public:
    Keys(const AttnParams& p, int batch, int head) : p_(p) {
        slots_ = p.read.data + batch * p.read.batch_stride + head * p.read.head_stride;
        arena_ = p.pool.arena[batch * p.kv_heads + head];
        k_ = static_cast<const T*>(p.k.data) + batch * p.k.batch_stride + head * p.k.head_stride;
        v_ = static_cast<const T*>(p.v.data) + batch * p.v.batch_stride + head * p.v.head_stride;
    }

    // The next block, as pointers in `scratch`; how many rows it has, 0 at the end. fp32 rows of a page are read where
    // they lie; those of the current scale are far apart and read many times, so they are copied.
    int next(Scratch& scratch) {
        list();
        const int count = count_;
        const int in_place = sizeof(T) == sizeof(float) ? paged_ : 0;
        for (int i = 0; i < in_place; ++i) {
            scratch.keys[i] = reinterpret_cast<const float*>(keys_[i]);
            scratch.values[i] = reinterpret_cast<const float*>(values_[i]);
        }
        for (int i = in_place; i < count; ++i) {
            scratch.keys[i] = copy(keys_[i], scratch.key_copies + i * p_.head_dim);
            scratch.values[i] = copy(values_[i], scratch.value_copies + i * p_.head_dim);
        }
        for (int i = 0; count > 0 && i < kPastEnd; ++i) scratch.keys[count + i] = scratch.keys[count - 1];
        return count;
    }

private:
    void list() {
        count_ = 0;
        for (; count_ < kBlock && slot_ < p_.read.count; ++slot_, row_ = 0) {
            const int rows = slots_[slot_] & ((1 << kRowsBits) - 1);
            const int64_t page = arena_ + (slots_[slot_] >> kRowsBits), page_elements = p_.pool.page_size * p_.head_dim;
            const T* const k = static_cast<const T*>(p_.pool.pages) + page * 2 * page_elements;
            for (; row_ < rows && count_ < kBlock; ++row_, ++count_) {
                keys_[count_] = k + row_ * p_.head_dim;
                values_[count_] = keys_[count_] + page_elements;
            }
            if (row_ < rows) break;
        }
        paged_ = count_;
        for (; token_ < p_.tokens && count_ < kBlock; ++token_, ++count_) {
            keys_[count_] = k_ + token_ * p_.k.token_stride;
            values_[count_] = v_ + token_ * p_.v.token_stride;
        }
    }

    const float* copy(const T* row, float* to) const {
        for (int d = 0; d < p_.head_dim; d += kLanes) store(to + d, load(row + d));
        return to;
    }

    const AttnParams& p_;
    const int32_t* slots_;
    int64_t arena_;
    const T *k_, *v_;
    int slot_ = 0, row_ = 0, token_ = 0, count_ = 0, paged_ = 0;
    const T *keys_[kBlock], *values_[kBlock];
};

template <typename T>
void end_tile(const AttnParams& p, int batch, int head, int first, const Tile& tile) {
    constexpr float kLn2 = 0.69314718f;
    const int group = p.heads / p.kv_heads;
    for (int i = 0; i < tile.rows; ++i) {
        const int64_t token = (first + i) % p.tokens, query_head = head * group + (first + i) / p.tokens;
        const int64_t row = (batch * int64_t{p.tokens} + token) * p.heads + query_head;
        T* const out = static_cast<T*>(p.out) + row * p.head_dim;
        const float inverse = tile.total[i] == 0 ? 0 : 1 / tile.total[i];  // 0: no key, or a score of −∞ with each
        for (int d = 0; d < p.head_dim; d += kLanes) store(out + d, load(tile.out + i * p.head_dim + d) * inverse);
        p.lse[(batch * int64_t{p.heads} + query_head) * p.tokens + token] =
            (tile.largest[i] + __builtin_log2f(tile.total[i])) * kLn2;
    }
}

template <typename T>
void attn_task(const AttnParams& p, const AttnCut& cut, int64_t task, Scratch& scratch) {
    const int part = task % cut.tasks_per_head, head = task / cut.tasks_per_head % p.kv_heads;
    const int batch = task / cut.tasks_per_head / p.kv_heads;
    if (part == 0) {
        const AppendParams append{p.k, p.v, p.pool, p.write, p.batch, p.tokens, p.kv_heads, p.head_dim, p.dtype};
        store_rows(append, batch, head);
    }
    const int begin = part * cut.tiles_per_task * cut.rows_per_tile;
    int tiles = 0;
    for (int row = begin; row < cut.rows && tiles < cut.tiles_per_task; row += cut.rows_per_tile, ++tiles) {
        const int rows = cut.rows - row < cut.rows_per_tile ? cut.rows - row : cut.rows_per_tile;
        begin_tile<T>(p, batch, head, row, rows, scratch.tiles[tiles]);
    }
    Keys<T> keys(p, batch, head);
    while (const int count = keys.next(scratch)) {
        for (int i = 0; i < tiles; ++i) {
            Tile& tile = scratch.tiles[i];
            for (int j = 0; j < tile.vectors * kLanes; j += kLanes) store(scratch.largest + j, load(tile.largest + j));
            score_keys(scratch.keys, count, tile.q, p.head_dim, tile.vectors, scratch.scores, scratch.largest);
            weigh_keys(scratch.scores, count, tile.vectors, scratch.largest, tile.largest, tile.total, scratch.decay);
            add_values(scratch.values, count, scratch.scores, scratch.decay, tile.rows, p.head_dim, tile.out);
        }
    }
    for (int i = 0; i < tiles; ++i) end_tile<T>(p, batch, head, begin + i * cut.rows_per_tile, scratch.tiles[i]);
}

inline void attn_any(const AttnParams& p, const AttnCut& cut, int64_t task, Scratch& scratch) {
    switch (p.dtype) {
        case DType::kFloat32: return attn_task<float>(p, cut, task, scratch);
        case DType::kFloat16: return attn_task<Half>(p, cut, task, scratch);
        case DType::kBFloat16: return attn_task<BFloat16>(p, cut, task, scratch);
    }
}

}  // namespace
}  // namespace amskv::cpu
