// One warp's products: scores, exponents and output of its query rows, in registers from the first key to the last.
#pragma once

#include <cmath>

#include "common/device.cuh"
#include "common/softmax.cuh"
#include "common/tiles.h"
#include "portable/work.cuh"

namespace amskv {

// The registers of one warp. A thread holds, of each 16 × 8 block, columns 2 (lane % 4) and the next of rows lane / 4
// (elements 0, 1) and lane / 4 + 8 (elements 2, 3).
template <class Tile>
struct Registers {
    using Layout = Swizzled<Tile::kHeadDim>;
    static constexpr int kSteps = Tile::kHeadDim / kMmaRows;
    static constexpr int kKeyBlocks = Tile::kKeys / kMmaColumns;
    static constexpr int kOutBlocks = Tile::kHeadDim / kMmaColumns;

    uint32_t q[Tile::kQueryInRegisters ? Tile::kRowBlocks : 1][Tile::kQueryInRegisters ? kSteps : 1][4];
    float scores[Tile::kRowBlocks][kKeyBlocks][4];  // then the probabilities, not yet normalised
    float out[Tile::kRowBlocks][kOutBlocks][4];
    float row_shift[Tile::kRowBlocks][2];  // what the exponents are measured from
    float row_sum[Tile::kRowBlocks][2];  // this thread's columns only, until the end

    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int r = 0; r < Tile::kRowBlocks; ++r) {
#pragma unroll
            for (int i = 0; i < kOutBlocks * 4; ++i) out[r][i / 4][i % 4] = 0;
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                row_shift[r][half] = kNoShift;
                row_sum[r][half] = 0;
            }
        }
    }

    __device__ __forceinline__ void load_query(SharedAddress queries, int lane) {
        if constexpr (Tile::kQueryInRegisters) {
#pragma unroll
            for (int r = 0; r < Tile::kRowBlocks; ++r)
#pragma unroll
                for (int step = 0; step < kSteps; ++step) load_query_fragment<Tile>(q[r][step], queries, r, step, lane);
        }
    }

    // scores = Q Kᵀ
    __device__ __forceinline__ void score(SharedAddress queries, SharedAddress k, int lane) {
#pragma unroll
        for (int i = 0; i < Tile::kRowBlocks * kKeyBlocks * 4; ++i) {
            scores[i / (kKeyBlocks * 4)][i / 4 % kKeyBlocks][i % 4] = 0;
        }
        k += Layout::offset(lane / 16 * 8 + lane % 8, lane / 8 % 2);
#pragma unroll
        for (int step = 0; step < kSteps; ++step) {
            uint32_t left[Tile::kRowBlocks][4];
#pragma unroll
            for (int r = 0; r < Tile::kRowBlocks; ++r) {
                if constexpr (Tile::kQueryInRegisters) {
#pragma unroll
                    for (int i = 0; i < 4; ++i) left[r][i] = q[r][step][i];
                } else {
                    load_query_fragment<Tile>(left[r], queries, r, step, lane);
                }
            }
#pragma unroll
            for (int block = 0; block < kKeyBlocks; block += 2) {
                uint32_t right[4];
                ldmatrix_x4(right, Layout::advance(k, 2 * step) + block * kMmaColumns * Layout::kRowBytes);
#pragma unroll
                for (int r = 0; r < Tile::kRowBlocks; ++r) {
                    mma_m16n8k16<typename Tile::Element>(scores[r][block], left[r], right[0], right[1]);
                    mma_m16n8k16<typename Tile::Element>(scores[r][block + 1], left[r], right[2], right[3]);
                }
            }
        }
    }

    // Scores, or probabilities, times what stands for each key in shared memory.
    __device__ __forceinline__ void multiply(SharedAddress factors, int lane) {
#pragma unroll
        for (int block = 0; block < kKeyBlocks; ++block) {
            const float2 pair = load_shared_8(factors + (block * kMmaColumns + lane % 4 * 2) * 4);
#pragma unroll
            for (int i = 0; i < Tile::kRowBlocks * 4; ++i) scores[i / 4][block][i % 4] *= i % 2 == 0 ? pair.x : pair.y;
        }
    }

    // Scores of keys that are not there become −∞.
    __device__ __forceinline__ void mask(typename Tile::KeyMask named, int lane) {
        named >>= 2 * (lane % 4);
#pragma unroll
        for (int i = 0; i < Tile::kRowBlocks * kKeyBlocks * 4; ++i) {
            const int block = i / 4 % kKeyBlocks;
            const bool there = named >> (block * kMmaColumns + i % 2) & 1;
            float& score = scores[i / (kKeyBlocks * 4)][block][i % 4];
            score = there ? score : -INFINITY;
        }
    }

    // Takes the tile into the row maxima, and scales what was summed under the old ones. Few tiles of a long row raise
    // a maximum, so the scaling is skipped where none of the warp's rows needs it.
    __device__ __forceinline__ void raise_shift(float scale_log2) {
        float shift[Tile::kRowBlocks][2];
        bool raised = false;
#pragma unroll
        for (int r = 0; r < Tile::kRowBlocks; ++r)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                float top = -INFINITY;
#pragma unroll
                for (int i = 0; i < kKeyBlocks * 2; ++i) top = fmaxf(top, scores[r][i / 2][2 * half + i % 2]);
                top = fmaxf(top, shuffle_xor(top, 1));
                top = fmaxf(top, shuffle_xor(top, 2));
                shift[r][half] = fmaxf(row_shift[r][half], shift_of(top, scale_log2));
                raised |= shift[r][half] != row_shift[r][half];
            }
        if (ballot(raised) == 0) return;
#pragma unroll
        for (int r = 0; r < Tile::kRowBlocks; ++r)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const float shrink = exp2_fast(row_shift[r][half] - shift[r][half]);
                row_shift[r][half] = shift[r][half];
                row_sum[r][half] *= shrink;
#pragma unroll
                for (int i = 0; i < kOutBlocks * 2; ++i) out[r][i / 2][2 * half + i % 2] *= shrink;
            }
    }

    // scores → exp2(scale · (score − row maximum))
    __device__ __forceinline__ void exponentiate(float scale_log2) {
#pragma unroll
        for (int r = 0; r < Tile::kRowBlocks; ++r)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const float shift = row_shift[r][half], scale = scale_of(shift, scale_log2);
#pragma unroll
                for (int i = 0; i < kKeyBlocks * 2; ++i) {
                    float& score = scores[r][i / 2][2 * half + i % 2];
                    score = exp2_fast(score * scale - shift);
                    row_sum[r][half] += score;
                }
            }
    }

    // out += P V
    __device__ __forceinline__ void accumulate(SharedAddress v, int lane) {
        v += Layout::offset(lane % 16, lane / 16);
#pragma unroll
        for (int block = 0; block < kKeyBlocks; block += 2) {
            uint32_t left[Tile::kRowBlocks][4];
#pragma unroll
            for (int r = 0; r < Tile::kRowBlocks; ++r)
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const float* const pair = &scores[r][block + i / 2][i % 2 * 2];
                    left[r][i] = pack<typename Tile::Element>(pair[0], pair[1]);
                }
#pragma unroll
            for (int column = 0; column < kOutBlocks; column += 2) {
                uint32_t right[4];
                ldmatrix_x4_trans(right, Layout::advance(v, column) + block * kMmaColumns * Layout::kRowBytes);
#pragma unroll
                for (int r = 0; r < Tile::kRowBlocks; ++r) {
                    mma_m16n8k16<typename Tile::Element>(out[r][column], left[r], right[0], right[1]);
                    mma_m16n8k16<typename Tile::Element>(out[r][column + 1], left[r], right[2], right[3]);
                }
            }
        }
    }

    // out becomes the mean, 0 where there was no key, and row_sum the whole row's.
    __device__ __forceinline__ void normalise() {
#pragma unroll
        for (int r = 0; r < Tile::kRowBlocks; ++r)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                float& sum = row_sum[r][half];
                sum += shuffle_xor(sum, 1);
                sum += shuffle_xor(sum, 2);
                const float inverse = sum == 0 ? 0 : 1 / sum;
#pragma unroll
                for (int i = 0; i < kOutBlocks * 2; ++i) out[r][i / 2][2 * half + i % 2] *= inverse;
            }
    }
};

}  // namespace amskv
