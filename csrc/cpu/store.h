// Stores into pages: rows as they are, or in eight bits, to the bit as amskv_kernels/ops/quantise.py rounds them.
#pragma once

#include "cpu/cpu.h"
#include "cpu/vector.h"

namespace amskv::cpu {
namespace {

// The largest magnitude of a row's elements; NaN if one is NaN.
template <typename T>
float largest_of(const T* row, int head_dim) {
    Bits most = {};  // as bits, NaN is above infinity, and that above all others
    for (int d = 0; d < head_dim; d += kLanes) most = larger(bits_of(load(row + d)) & 0x7fffffff, most);
#pragma GCC unroll 4
    for (int step = kLanes / 2; step > 0; step /= 2) most = larger(bits_of(rotate(from_bits(most), step)), most);
    return from_bits(most)[0];
}

// The power of two that takes a number to 2 … 4.
inline float unit_of(float x) { return from_bits(0x7f800000 - (bits_of(broadcast(x)) & 0x7f800000))[0]; }

// Bytes of a row, and what they are multiplied by to have it back.
template <typename T>
float quantise(const T* row, int head_dim, int8_t* to) {
    constexpr float kLevels = 127, kLeast = kLevels * 0x1p-126f;  // below, the scale would not be a normal number
    constexpr float kRound = 0x1.8p23f;  // adding it leaves the nearest whole number, half to even, in the low bits
    const float most = largest_of(row, head_dim);
    if (!(most >= kLeast && most < kInfinity)) {
        for (int d = 0; d < head_dim; d += kLanes) narrow(to + d, Bits{});
        return most < kLeast ? 0 : __builtin_nanf("");
    }
    const float scale = most / kLevels, unit = unit_of(most), unit_scale = scale * unit;
    const Vec divisor = broadcast(unit_scale), inverse = broadcast(1 / unit_scale);
    for (int d = 0; d < head_dim; d += kLanes)
        narrow(to + d, bits_of(quotient(load(row + d) * unit, divisor, inverse) + kRound));
    return scale;
}

// One row into row `at` of the pool.
template <typename T>
void keep_row(const Pool& pool, int64_t at, const T* row, int head_dim) {
    if (pool.scales)
        pool.scales[at] = quantise(row, head_dim, static_cast<int8_t*>(pool.pages) + at * head_dim);
    else
        copy_past_caches(static_cast<T*>(pool.pages) + at * head_dim, row, head_dim * sizeof(T));
}

template <typename T>
void blank_rows(const Pool& pool, int64_t at, int64_t count, int head_dim) {
    const int64_t size = pool.scales ? 1 : sizeof(T), bytes = size * head_dim;
    __builtin_memset(static_cast<char*>(pool.pages) + at * bytes, 0, count * bytes);
    if (pool.scales) __builtin_memset(pool.scales + at, 0, count * sizeof(float));
}

// One row of the pool into another, to the bit.
template <typename T>
void move_row(const Pool& pool, int64_t to, int64_t from, int head_dim) {
    const int64_t bytes = head_dim * (pool.scales ? 1 : sizeof(T));
    char* const pages = static_cast<char*>(pool.pages);
    copy_past_caches(pages + to * bytes, pages + from * bytes, static_cast<int>(bytes));
    if (pool.scales) pool.scales[to] = pool.scales[from];
}

// Calls keep(side, to, token) for each of so many rows that `write` takes: K's and V's, into row `to` of the pool.
template <typename T, typename Keep>
void fill_pages(const AppendParams& p, int batch, int head, int64_t rows_kept, const Keep& keep) {
    constexpr int32_t kRowsMask = (1 << kRowsBits) - 1;
    const int32_t* const slots = p.write.data + batch * p.write.batch_stride + head * p.write.head_stride;
    int64_t token = rows_kept;
    for (int i = 0; i < p.write.count; ++i) token -= slots[i] & kRowsMask;  // below 0: rows that the first page holds
    for (int i = 0; i < p.write.count; ++i) {
        const int rows = slots[i] & kRowsMask;
        if (rows == 0) continue;
        const int64_t page = p.pool.arena[batch * p.kv_heads + head] + (slots[i] >> kRowsBits);
        int64_t to = page * 2 * p.pool.page_size;
        for (int side = 0; side < 2; ++side, to += p.pool.page_size) {
            for (int64_t row = token < 0 ? -token : 0; row < rows; ++row) keep(side, to + row, token + row);
            if (!p.write.leave_rest) blank_rows<T>(p.pool, to + rows, p.pool.page_size - rows, p.head_dim);
        }
        token += rows;
    }
    end_copies();
}

// Row `token` of k, side 0, or of v.
template <typename T>
const T* current_row(const AppendParams& p, int side, int batch, int head, int64_t token) {
    const Rows& x = side ? p.v : p.k;
    return static_cast<const T*>(x.data) + batch * x.batch_stride + head * x.head_stride + token * x.token_stride;
}

template <typename T>
void store_rows(const AppendParams& p, int batch, int head) {
    fill_pages<T>(p, batch, head, p.tokens, [&](int side, int64_t to, int64_t token) {
        keep_row(p.pool, to, current_row<T>(p, side, batch, head, token), p.head_dim);
    });
}

template <typename T>
void compact_rows(const CompactParams& c, int batch, int head) {
    const AppendParams& p = c.into;
    const int32_t* const slots = c.history.data + batch * c.history.batch_stride + head * c.history.head_stride;
    const int64_t* const keys = c.keep + (batch * int64_t{p.kv_heads} + head) * c.kept;
    const int64_t page_size = p.pool.page_size, paged = c.history.count * page_size;
    fill_pages<T>(p, batch, head, c.kept, [&](int side, int64_t to, int64_t i) {
        const int64_t key = keys[i];
        if (key >= paged) return keep_row(p.pool, to, current_row<T>(p, side, batch, head, key - paged), p.head_dim);
        const int64_t page = p.pool.arena[batch * p.kv_heads + head] + (slots[key / page_size] >> kRowsBits);
        move_row<T>(p.pool, to, (2 * page + side) * page_size + key % page_size, p.head_dim);
    });
}

// Rows of k and v of one sequence and head into the pages that `write` names; the rest of every such page becomes 0, or
// is left.
inline void append_any(const AppendParams& p, int batch, int head) {
    switch (p.dtype) {
        case DType::kFloat32: return store_rows<float>(p, batch, head);
        case DType::kFloat16: return store_rows<Half>(p, batch, head);
        case DType::kBFloat16: return store_rows<BFloat16>(p, batch, head);
    }
}

inline void compact_any(const CompactParams& c, int batch, int head) {
    switch (c.into.dtype) {
        case DType::kFloat32: return compact_rows<float>(c, batch, head);
        case DType::kFloat16: return compact_rows<Half>(c, batch, head);
        case DType::kBFloat16: return compact_rows<BFloat16>(c, batch, head);
    }
}

}  // namespace
}  // namespace amskv::cpu
