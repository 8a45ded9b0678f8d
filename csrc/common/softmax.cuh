// Online softmax in powers of two: what the exponents of a row are measured from, and how far that is exact.
//
// An exponent is scale · score − shift, one fused multiply-add: its product is exact, the shift is rounded, the largest
// weight of a row is 2 to the power of that rounding. Below kMaxShift it is 8 at most, which fp16 weights bear. Scores
// beyond, being fp32, are at least 16 powers of two apart: at kCoarseScale, a power of two so that the shift is exact,
// only the largest keep a weight, and none above 2⁻¹⁶ is lost. So every weight is right as long as logits are finite.
#pragma once

#include <cmath>

#include "common/device.cuh"

namespace amskv {

inline constexpr float kLn2 = 0.693147180559945f, kLog2E = 1.44269504088896f;
inline constexpr float kMaxShift = 0x1p28f;         // logits of 1.8 · 10⁸
inline constexpr float kCoarseScale = 0x1p10f;      // above every other scale
inline constexpr float kNoShift = -3.402823466e38f;  // of a row without keys: finite, so that −∞ minus it is −∞
inline constexpr float kNoScore = kNoShift / kCoarseScale;  // the largest score of such a row

__device__ __forceinline__ float shift_of(float largest_score, float scale) {
    const float shift = largest_score * scale;
    return fabsf(shift) < kMaxShift ? shift : largest_score * kCoarseScale;
}

// The scale of a row with this shift, be it from shift_of or the largest score times `scale`.
__device__ __forceinline__ float scale_of(float shift, float scale) {
    return fabsf(shift) < kMaxShift ? scale : kCoarseScale;
}

// log2 of the sum of 2^(scale · score), given the sum of what is measured from the shift.
__device__ __forceinline__ float log2_sum(float shift, float sum, float scale) {
    const float exact = fabsf(shift) < kMaxShift ? shift : shift * (1 / kCoarseScale) * scale;
    return sum == 0 ? -INFINITY : exact + log2f(sum);
}

}  // namespace amskv
