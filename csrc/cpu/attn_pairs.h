// Attention of one task in bf16: products of pairs, sums, softmax and all that is kept from block to block in fp32.
//
// Both products of attention are the same one (products.h), with query rows in the lanes: scores[key][row] are
// K (key, d) · Q (d, row), and out[d][row] is V (d, key) · weights (key, row). So K goes in as it lies, and V is turned
// on its side, once for all query rows of the task. Weights are rounded to bf16, their sum is not.
//
// Rows of eight bits go in without their scales, exactly; a key's scale multiplies its scores, a value's its weights.
#pragma once

#include "cpu/cpu.h"
#include "cpu/products.h"
#include "cpu/rows.h"

namespace amskv::cpu {
namespace {

template <typename Page>
using PairKeys = Keys<BFloat16, Page, kPairBlock>;

inline const uint32_t* pairs_of(const BFloat16* row) { return reinterpret_cast<const uint32_t*>(row); }

constexpr int padded_keys(int count) { return (count + 31) / 32 * 32; }

// Q of a tile, [pair of d][row].
inline void begin_pairs(const AttnParams& p, int batch, int head, int first, int rows, Tile& tile) {
    const BFloat16* const q = static_cast<const BFloat16*>(p.q.data);
    tile.rows = rows, tile.vectors = (rows + kLanes - 1) / kLanes;
    for (int begin = 0; begin < rows; begin += kLanes) {
        const BFloat16* from[kLanes] = {};
        for (int i = 0; i < kLanes && begin + i < rows; ++i)
            from[i] = q + query_offset(p, batch, head, first + begin + i);
        for (int d = 0; d < p.head_dim; d += 2 * kLanes) {
            Vec x[kLanes];
#pragma GCC unroll 16
            for (int i = 0; i < kLanes; ++i) x[i] = from[i] ? load_pairs(from[i] + d) : Vec{};
            transpose(x);
#pragma GCC unroll 16
            for (int i = 0; i < kLanes; ++i) store(tile.q + (d / 2 + i) * kTile + begin, x[i]);
        }
        store(tile.largest + begin, broadcast(-kInfinity));
        store(tile.total + begin, Vec{});
    }
    for (int i = 0; i < p.head_dim * kTile; i += kLanes) store(tile.out + i, Vec{});
}

// Rows of Page one after the other; eight bits are exact in bf16 without their scale.
template <typename Page>
BFloat16* pack_rows(const void* const* rows, int first, int end, int head_dim, BFloat16* to) {
    for (int i = first; i < end; ++i, to += head_dim) {
        const auto row = static_cast<const Page*>(rows[i]);
        for (int d = 0; d < head_dim; d += 2 * kLanes) store_pairs(to + d, load_pairs(row + d));
    }
    return to;
}

// K of a block, [key][d].
template <typename Page>
void pack_keys(const PairKeys<Page>& keys, int head_dim, BFloat16* to) {
    to = pack_rows<Page>(keys.k, 0, keys.paged, head_dim, to);
    pack_rows<BFloat16>(keys.k, keys.paged, keys.count, head_dim, to);
}

// V of a block, [d][key]; `count` is a multiple of 32.
inline void turn_values(const void* const* rows, int count, int head_dim, BFloat16* to) {
    for (int key = 0; key < count; key += 2 * kLanes) {
        for (int d = 0; d < head_dim; d += 2 * kLanes) {
            // The lower or upper 4 of each 8 d, as pairs of keys: [pair of keys][d], then [d][pair of keys].
            for (int upper = 0; upper < 2; ++upper) {
                Vec x[kLanes];
#pragma GCC unroll 16
                for (int i = 0; i < kLanes; ++i) {
                    const auto first = static_cast<const BFloat16*>(rows[key + 2 * i]);
                    const auto second = static_cast<const BFloat16*>(rows[key + 2 * i + 1]);
                    x[i] = interleave_words(load_pairs(first + d), load_pairs(second + d), upper);
                }
                transpose(x);
                BFloat16* const target = to + (d + 4 * upper) * kPairBlock + key;
#pragma GCC unroll 16
                for (int i = 0; i < kLanes; ++i) store_pairs(target + (i / 4 * 8 + i % 4) * kPairBlock, x[i]);
            }
        }
    }
}

// The same of the listed rows, zeros up to a multiple of 32.
template <typename Page>
void pack_values(PairKeys<Page>& keys, int head_dim, Scratch& scratch) {
    if constexpr (kEightBits<Page>) {
        pack_rows<Page>(keys.v, 0, keys.paged, head_dim, scratch.value_rows);
        for (int i = 0; i < keys.paged; ++i) keys.v[i] = scratch.value_rows + i * head_dim;
    }
    const int padded = padded_keys(keys.count);
    for (int i = keys.count; i < padded; ++i) keys.v[i] = scratch.zeros;
    turn_values(keys.v, padded, head_dim, scratch.packed_values);
}

// A block's scales, 1 past its end; whether there are any.
template <typename Page>
bool keep_scales(const PairKeys<Page>& keys, Scratch& scratch) {
    if (!kEightBits<Page> || keys.paged == 0) return false;
    for (int i = 0; i < kPairBlock; ++i) {
        scratch.key_scales[i] = i < keys.count ? keys.k_scale[i] : 1;
        scratch.value_scales[i] = i < keys.count ? keys.v_scale[i] : 1;
    }
    return true;
}

// Scores of one vector of rows become pairs of weights relative to the largest so far, what was kept before is scaled
// down to it. `unit` is what a score counts in units of log 2; `count` is a multiple of 4.
template <bool kScaled>
void weigh_pairs(const AttnParams& p, float unit, int count, int column, Scratch& scratch, Tile& tile, int row) {
    float* const scores = scratch.pair_scores + column;
    const Vec before = load(tile.largest + row);
    Vec most[4] = {before, before, before, before};
    for (int i = 0; i < count; i += 4) {
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) {
            float* const at = scores + (i + j) * kPairRows;
            if (kScaled) store(at, load(at) * scratch.key_scales[i + j]);
            most[j] = larger(load(at), most[j]);
        }
    }
    const Vec now = larger(larger(most[0], most[1]), larger(most[2], most[3]));
    const Vec shift = now == -kInfinity ? Vec{} : now;  // −∞ − (−∞) would be NaN
    Vec sums[2] = {};
    for (int i = 0; i < count; i += 2) {
        const Vec first = exp2((load(scores + i * kPairRows) - shift) * unit);
        const Vec second = exp2((load(scores + (i + 1) * kPairRows) - shift) * unit);
        uint32_t* const pair = scratch.pair_weights + i / 2 * kPairRows + column;
        if (kScaled)
            store(pair, pair_of(first * scratch.value_scales[i], second * scratch.value_scales[i + 1]));
        else
            store(pair, pair_of(first, second));
        sums[0] += first, sums[1] += second;
    }
    const Vec kept = exp2((before - shift) * unit);
    store(tile.largest + row, now);
    store(tile.total + row, load(tile.total + row) * kept + (sums[0] + sums[1]));
    if (all_are(kept, 1)) return;
    for (int d = 0; d < p.head_dim; ++d) store(tile.out + d * kTile + row, load(tile.out + d * kTile + row) * kept);
}

// One block of keys for up to kPairRows rows of a tile, from `row` on.
template <int kColumns, bool kScaled>
void attend_pairs(const AttnParams& p, float unit, int count, Scratch& scratch, Tile& tile, int row) {
    const int padded = padded_keys(count);
    multiply<kColumns>({
        pairs_of(scratch.packed_keys), p.head_dim / 2, reinterpret_cast<const uint32_t*>(tile.q) + row, kTile,
        scratch.pair_scores, kPairRows, padded, p.head_dim / 2, false});
    for (int i = count; i < padded; ++i) {
        for (int j = 0; j < kColumns; ++j)
            store(scratch.pair_scores + i * kPairRows + j * kLanes, broadcast(-kInfinity));
    }
    for (int j = 0; j < kColumns; ++j)
        weigh_pairs<kScaled>(p, unit, padded, j * kLanes, scratch, tile, row + j * kLanes);
    multiply<kColumns>({
        pairs_of(scratch.packed_values), kPairBlock / 2, scratch.pair_weights, kPairRows, tile.out + row, kTile,
        p.head_dim, padded / 2, true});
}

inline void end_pairs(const AttnParams& p, float unit, int batch, int head, int first, Tile& tile) {
    constexpr float kLn2 = 0.69314718f;
    BFloat16* const out = static_cast<BFloat16*>(p.out);
    for (int begin = 0; begin < tile.rows; begin += kLanes) {
        const int rows = tile.rows - begin < kLanes ? tile.rows - begin : kLanes;
        const Vec total = load(tile.total + begin);
        const Vec inverse = total == 0 ? Vec{} : 1 / total;  // 0: no key, or a score of −∞ with each
        for (int d = 0; d < p.head_dim; d += kLanes) {
            Vec x[kLanes];
#pragma GCC unroll 16
            for (int i = 0; i < kLanes; ++i) x[i] = load(tile.out + (d + i) * kTile + begin) * inverse;
            transpose(x);
            for (int i = 0; i < rows; ++i)
                store(out + out_row(p, batch, head, first + begin + i) * p.head_dim + d, x[i]);
        }
        for (int i = 0; i < rows; ++i) {
            const float largest = tile.largest[begin + i] * unit;
            p.lse[lse_row(p, batch, head, first + begin + i)] =
                (largest + __builtin_log2f(tile.total[begin + i])) * kLn2;
        }
    }
}

template <typename Page>
void attn_pairs(const AttnParams& p, const AttnCut& cut, int64_t task, Scratch& scratch) {
    constexpr double kLog2E = 1.4426950408889634;
    const float unit = static_cast<float>(p.softmax_scale * kLog2E);
    const AttnTask part = task_of(p, cut, task);
    for (int i = 0; i < part.tiles; ++i)
        begin_pairs(p, part.batch, part.head, part.row + i * cut.rows_per_tile, part.rows_of(cut, i), scratch.tiles[i]);
    const Tiles tiles;
    PairKeys<Page> keys(p, part.batch, part.head);
    for (int count = keys.next(); count > 0;) {
        pack_keys(keys, p.head_dim, scratch.packed_keys);
        pack_values(keys, p.head_dim, scratch);
        const bool scaled = keep_scales(keys, scratch);
        const auto attend_two = scaled ? attend_pairs<2, true> : attend_pairs<2, false>;
        const auto attend_one = scaled ? attend_pairs<1, true> : attend_pairs<1, false>;
        const int next = keys.next();
        for (int i = 0; i < part.tiles; ++i) {
            Tile& tile = scratch.tiles[i];
            keys.prefetch(i, part.tiles);
            if (next == 0) prefetch_out(p, part, part.row + i * cut.rows_per_tile, tile.rows);
            for (int row = 0; row < tile.rows; row += kPairRows) {
                const auto attend = tile.rows - row > kLanes ? attend_two : attend_one;
                attend(p, unit, count, scratch, tile, row);
            }
        }
        count = next;
    }
    for (int i = 0; i < part.tiles; ++i)
        end_pairs(p, unit, part.batch, part.head, part.row + i * cut.rows_per_tile, scratch.tiles[i]);
    store_task(p, part);
}

}  // namespace
}  // namespace amskv::cpu
