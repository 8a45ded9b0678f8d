// Joins the parts of split keys, in a fixed order, so that a result never depends on timing.
#pragma once

#include <cmath>

#include "amskv/amskv.h"
#include "common/device.cuh"
#include "common/softmax.cuh"
#include "common/tiles.h"

namespace amskv {

struct MergeArgs {
    AttnParams params;
    int splits;
    const float* partial_out;  // (splits, B, n, H, D)
    const float* partial_sums;  // (splits, 2, B, H, n): shifts and sums
};

// One warp per row of the output.
__global__ void __launch_bounds__(kMaxWarps* kWarpLanes) merge_kernel(const __grid_constant__ MergeArgs args) {
    const AttnParams& p = args.params;
    const int lane = threadIdx.x % kWarpLanes;
    const int64_t rows = int64_t{p.batch} * p.tokens * p.heads;
    const int64_t row = int64_t{blockIdx.x} * kMaxWarps + threadIdx.x / kWarpLanes;
    if (row >= rows) return;
    const int head = row % p.heads, token = row / p.heads % p.tokens;
    const int64_t lse_row = (row / p.heads / p.tokens * p.heads + head) * p.tokens + token;
    const auto shift_of_part = [&](int i) { return args.partial_sums[2 * i * rows + lse_row]; };
    const auto sum_of_part = [&](int i) { return args.partial_sums[(2 * i + 1) * rows + lse_row]; };
    float shift = kNoShift, sum = 0;
    for (int i = 0; i < args.splits; ++i) shift = fmaxf(shift, shift_of_part(i));
    for (int i = 0; i < args.splits; ++i) sum += exp2_fast(shift_of_part(i) - shift) * sum_of_part(i);
    const float inverse = sum == 0 ? 0 : 1 / sum;
    for (int column = 2 * lane; column < p.head_dim; column += 2 * kWarpLanes) {
        float low = 0, high = 0;
        for (int i = 0; i < args.splits; ++i) {
            const float weight = exp2_fast(shift_of_part(i) - shift) * sum_of_part(i) * inverse;
            const auto pair =
                *reinterpret_cast<const float2*>(args.partial_out + (i * rows + row) * p.head_dim + column);
            low += weight * pair.x;
            high += weight * pair.y;
        }
        const bool half = p.dtype == DType::kFloat16;
        uint16_t* const out = static_cast<uint16_t*>(p.out) + row * p.head_dim + column;
        *reinterpret_cast<uint32_t*>(out) = half ? pack<Half>(low, high) : pack<BFloat16>(low, high);
    }
    if (lane == 0) p.lse[lse_row] = log2_sum(shift, sum, p.softmax_scale * kLog2E) * kLn2;
}

}  // namespace amskv
