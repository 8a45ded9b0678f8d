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

template <typename T>
void store_rows(const AppendParams& p, int batch, int head) {
    constexpr int32_t kRowsMask = (1 << kRowsBits) - 1;
    const int32_t* const slots = p.write.data + batch * p.write.batch_stride + head * p.write.head_stride;
    const Rows* const sides[] = {&p.k, &p.v};
    int64_t token = p.tokens;
    for (int i = 0; i < p.write.count; ++i) token -= slots[i] & kRowsMask;  // below 0: rows that the first page holds
    for (int i = 0; i < p.write.count; ++i) {
        const int rows = slots[i] & kRowsMask;
        if (rows == 0) continue;
        const int64_t page = p.pool.arena[batch * p.kv_heads + head] + (slots[i] >> kRowsBits);
        int64_t to = page * 2 * p.pool.page_size;
        for (const Rows* const x : sides) {
            const T* const from = static_cast<const T*>(x->data) + batch * x->batch_stride + head * x->head_stride;
            for (int64_t row = token < 0 ? -token : 0; row < rows; ++row)
                keep_row(p.pool, to + row, from + (token + row) * x->token_stride, p.head_dim);
            if (!p.write.leave_rest) blank_rows<T>(p.pool, to + rows, p.pool.page_size - rows, p.head_dim);
            to += p.pool.page_size;
        }
        token += rows;
    }
    end_copies();
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

}  // namespace
}  // namespace amskv::cpu
