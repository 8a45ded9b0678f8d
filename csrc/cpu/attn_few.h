// Attention of a few query rows: one row at a time, elements in the lanes, so that no lane waits for rows that are not
// there. Early steps are such calls; what they take is mostly what stands around the arithmetic.
#pragma once

#include "cpu/cpu.h"
#include "cpu/rows.h"

namespace amskv::cpu {
namespace {

// What one query row carries from block to block; the last two in every lane.
struct alignas(64) FewRow {
    float q[kMostHeadDim], out[kMostHeadDim];
    Vec largest, total;
};

template <typename T>
Vec dot(const void* key, const float* q, int head_dim) {
    Vec sum{};
    for (int d = 0; d < head_dim; d += kLanes) sum += load(static_cast<const T*>(key) + d) * load(q + d);
    return sum;
}

// Scores of up to kLanes keys from `first` on, one in each lane; −∞ in the lanes past the last.
template <typename T, typename Page>
Vec score_few(const Keys<T, Page, kBlock>& keys, int first, const float* q, int head_dim) {
    Vec part[kLanes], key{};
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) {
        part[i] = Vec{}, key[i] = static_cast<float>(first + i);
        if (first + i >= keys.count) continue;
        const auto dot_of = first + i < keys.paged ? dot<Page> : dot<T>;
        part[i] = dot_of(keys.k[first + i], q, head_dim);
    }
    Vec scores = sums_of(part);
    if constexpr (kEightBits<Page>) scores *= load(keys.k_scale + first);
    return key < static_cast<float>(keys.count) ? scores : broadcast(-kInfinity);
}

// Adds the values of the keys from `first` to `last`, weighed; each has its own scale where pages are of int8_t.
template <typename T>
void add_few(const void* const* values, int first, int last, const float* weights, int head_dim, float* to) {
    for (int d = 0; d < head_dim; d += kLanes) {
        Vec out = load(to + d);
        for (int i = first; i < last; ++i) out += load(static_cast<const T*>(values[i]) + d) * weights[i];
        store(to + d, out);
    }
}

// One block of keys for one row. `scores` has room for whole vectors.
template <typename T, typename Page>
void attend_few(const Keys<T, Page, kBlock>& keys, int head_dim, float* scores, FewRow& row) {
    Vec most = row.largest, sum{};
    for (int i = 0; i < keys.count; i += kLanes) {
        const Vec some = score_few(keys, i, row.q, head_dim);
        store(scores + i, some);
        most = larger(some, most);
    }
    const Vec now = largest_lane(most);
    const Vec shift = now == -kInfinity ? Vec{} : now;  // −∞ − (−∞) would be NaN
    const Vec kept = exp2(row.largest - shift);
    for (int i = 0; i < keys.count; i += kLanes) {
        const Vec weights = exp2(load(scores + i) - shift);
        sum += weights;
        store(scores + i, kEightBits<Page> ? weights * load(keys.v_scale + i) : weights);
    }
    row.largest = now, row.total = row.total * kept + sum_of_lanes(sum);
    for (int d = 0; d < head_dim; d += kLanes) store(row.out + d, load(row.out + d) * kept);
    add_few<Page>(keys.v, 0, keys.paged, scores, head_dim, row.out);
    add_few<T>(keys.v, keys.paged, keys.count, scores, head_dim, row.out);
}

template <typename T, typename Page>
void attn_few(const AttnParams& p, const AttnCut& cut, int64_t task) {
    constexpr double kLog2E = 1.4426950408889634;
    constexpr float kLn2 = 0.69314718f;
    const float scale = static_cast<float>(p.softmax_scale * kLog2E);
    const AttnTask part = task_of(p, cut, task);
    FewRow rows[kFewRows];
    for (int i = 0; i < cut.rows; ++i) {
        const T* const q = static_cast<const T*>(p.q.data) + query_offset(p, part.batch, part.head, i);
        for (int d = 0; d < p.head_dim; d += kLanes) store(rows[i].q + d, load(q + d) * scale);
        for (int d = 0; d < p.head_dim; d += kLanes) store(rows[i].out + d, Vec{});
        rows[i].largest = broadcast(-kInfinity), rows[i].total = Vec{};
    }
    Keys<T, Page, kBlock> keys(p, part.batch, part.head);
    alignas(64) float scores[kBlock];
    while (keys.next() > 0) {
        for (int i = 0; i < cut.rows; ++i) attend_few(keys, p.head_dim, scores, rows[i]);
    }
    for (int i = 0; i < cut.rows; ++i) {
        T* const out = static_cast<T*>(p.out) + out_row(p, part.batch, part.head, i) * p.head_dim;
        const float largest = rows[i].largest[0], total = rows[i].total[0];
        const float inverse = total == 0 ? 0 : 1 / total;  // 0: no key, or a score of −∞ with each
        for (int d = 0; d < p.head_dim; d += kLanes) store(out + d, load(rows[i].out + d) * inverse);
        p.lse[lse_row(p, part.batch, part.head, i)] = (largest + __builtin_log2f(total)) * kLn2;
    }
    store_task(p, part);
}

}  // namespace
}  // namespace amskv::cpu
