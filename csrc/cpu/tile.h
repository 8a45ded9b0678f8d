// The arithmetic of attention on one tile of query rows and one block of keys.
//
// Query rows stand in the vectors' lanes, so that a row's largest score and sum need no step across lanes; a key is one
// pointer to its row of K, which is read where it lies, element by element, and never transposed.
#pragma once

#include "cpu/cpu.h"
#include "cpu/vector.h"

namespace amskv::cpu {
namespace {

// Tiles of vectors that keep the multipliers busy within the registers: 32 of them with AVX-512 and NEON, else 16.
inline constexpr int kStrip = kLanes == 16 ? 4 : 2;  // vectors of query rows that score_strip takes
constexpr int keys_at_once(int strip) { return strip > (kLanes == 16 ? 3 : 1) ? 6 : 8; }
inline constexpr int kRowsAtOnce = kLanes == 8 ? 4 : 6;  // query rows that add_values takes, by so many vectors of V
inline constexpr int kValueVectors = kLanes == 16 ? 4 : 2;

// Scores of a block: scores[key][row] = Σ keys[key][d] · q[d][row], for kVectors vectors of rows; `largest` grows with
// them. Past `count` the last key stands again, up to a multiple of what is taken at a time.
template <int kVectors>
void score_strip(const float* const* keys, int count, const float* q, int head_dim, float* scores, float* largest) {
    constexpr int kKeys = keys_at_once(kVectors);
    for (int first = 0; first < count; first += kKeys) {
        Vec sum[kKeys][kVectors] = {};
        const float* row[kKeys];
        for (int i = 0; i < kKeys; ++i) row[i] = keys[first + i];
        for (int d = 0; d < head_dim; ++d) {
            Vec part[kVectors];
#pragma GCC unroll 8
            for (int j = 0; j < kVectors; ++j) part[j] = load(q + d * kTile + j * kLanes);
#pragma GCC unroll 8
            for (int i = 0; i < kKeys; ++i) {
                const Vec key = broadcast(row[i][d]);
#pragma GCC unroll 8
                for (int j = 0; j < kVectors; ++j) sum[i][j] += key * part[j];
            }
        }
#pragma GCC unroll 8
        for (int j = 0; j < kVectors; ++j) {
            Vec most = load(largest + j * kLanes);
#pragma GCC unroll 8
            for (int i = 0; i < kKeys; ++i) {
                store(scores + (first + i) * kTile + j * kLanes, sum[i][j]);
                most = larger(sum[i][j], most);
            }
            store(largest + j * kLanes, most);
        }
    }
}

// All vectors of a tile, strip by strip. `keys` and `scores` have room for kPastEnd more than `count`.
inline void score_keys(
    const float* const* keys, int count, const float* q, int head_dim, int vectors, float* scores, float* largest) {
    int done = 0;
    for (; done + kStrip <= vectors; done += kStrip) {
        const int at = done * kLanes;
        score_strip<kStrip>(keys, count, q + at, head_dim, scores + at, largest + at);
    }
    q += done * kLanes, scores += done * kLanes, largest += done * kLanes;
    if (vectors - done == 1) score_strip<1>(keys, count, q, head_dim, scores, largest);
    if (kStrip > 2 && vectors - done == 2) score_strip<2>(keys, count, q, head_dim, scores, largest);
    if (kStrip > 2 && vectors - done == 3) score_strip<3>(keys, count, q, head_dim, scores, largest);
}

// Scores, in units of log 2, become weights relative to the largest so far, `now`, which was `before`; `decay` is what
// earlier weights become.
inline void weigh_keys(
    float* scores, int count, int vectors, const float* now_at, float* before_at, float* total, float* decay) {
    for (int j = 0; j < vectors; ++j) {
        const Vec before = load(before_at + j * kLanes), now = load(now_at + j * kLanes);
        const Vec shift = now == -kInfinity ? Vec{} : now;  // −∞ − (−∞) would be NaN
        Vec sum = {};
        for (int i = 0; i < count; ++i) {
            float* const at = scores + i * kTile + j * kLanes;
            const Vec weight = exp2(load(at) - shift);
            store(at, weight);
            sum += weight;
        }
        const Vec kept = exp2(before - shift);
        store(before_at + j * kLanes, now);
        store(decay + j * kLanes, kept);
        store(total + j * kLanes, load(total + j * kLanes) * kept + sum);
    }
}

// out[row][d] = decay[row] · out[row][d] + Σ weights[key][row] · values[key][d], for kVectors vectors of d.
template <int kRows, int kVectors>
void add_rows(
    const float* const* values, int count, const float* weights, const float* decay, int d, int head_dim, float* out) {
    Vec sum[kRows][kVectors];
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 8
        for (int j = 0; j < kVectors; ++j) sum[i][j] = load(out + i * head_dim + d + j * kLanes) * decay[i];
    }
    for (int key = 0; key < count; ++key) {
        Vec part[kVectors];
#pragma GCC unroll 8
        for (int j = 0; j < kVectors; ++j) part[j] = load(values[key] + d + j * kLanes);
#pragma GCC unroll 8
        for (int i = 0; i < kRows; ++i) {
            const Vec weight = broadcast(weights[key * kTile + i]);
#pragma GCC unroll 8
            for (int j = 0; j < kVectors; ++j) sum[i][j] += weight * part[j];
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 8
        for (int j = 0; j < kVectors; ++j) store(out + i * head_dim + d + j * kLanes, sum[i][j]);
    }
}

// All rows of a tile, by so many vectors of V at a time, which then stay in a first-level cache; up to kPastEnd rows
// more are computed and mean nothing.
template <int kVectors>
void add_columns(
    const float* const* values, int count, const float* weights, const float* decay, int rows, int head_dim,
    float* out) {
    for (int d = 0; d < head_dim; d += kVectors * kLanes) {
        for (int row = 0; row < rows; row += kRowsAtOnce) {
            const auto add = rows - row > 4 ? add_rows<kRowsAtOnce, kVectors> : add_rows<4, kVectors>;
            add(values, count, weights + row, decay + row, d, head_dim, out + row * head_dim);
        }
    }
}

inline void add_values(
    const float* const* values, int count, const float* weights, const float* decay, int rows, int head_dim,
    float* out) {
    const auto add = head_dim % (kValueVectors * kLanes) == 0 ? add_columns<kValueVectors> : add_columns<3>;
    add(values, count, weights, decay, rows, head_dim, out);
}

}  // namespace
}  // namespace amskv::cpu
