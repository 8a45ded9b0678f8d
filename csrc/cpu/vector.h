// Vectors of fp32 as wide as the instruction set this file is compiled for, in the compiler's own vector types: g++ and
// clang have them without a header, and nothing here is shared between files compiled for different sets.
#pragma once

#include <cstdint>

namespace amskv::cpu {
namespace {

#if defined(__AVX512F__)
inline constexpr int kVectorBytes = 64;
#elif defined(__AVX__)
inline constexpr int kVectorBytes = 32;
#else
inline constexpr int kVectorBytes = 16;  // SSE2, NEON
#endif
inline constexpr int kLanes = kVectorBytes / 4;

typedef float Vec __attribute__((vector_size(kVectorBytes), may_alias));
typedef int32_t Ints __attribute__((vector_size(kVectorBytes), may_alias));
typedef float VecAnywhere __attribute__((vector_size(kVectorBytes), aligned(4), may_alias));
typedef uint16_t Halves __attribute__((vector_size(kVectorBytes / 2), aligned(2), may_alias));

inline Vec load(const float* from) { return *reinterpret_cast<const VecAnywhere*>(from); }
inline void store(float* to, Vec x) { *reinterpret_cast<VecAnywhere*>(to) = x; }
inline Vec broadcast(float x) { return x - Vec{}; }
inline Vec larger(Vec a, Vec b) { return a > b ? a : b; }  // b where either is NaN

// a0 b0 a1 b1 … of the lower or upper halves.
#ifdef __clang__
template <int... kLane>
Vec interleave(Vec a, Vec b, int first, Lanes<kLane...>);
#else
inline Vec interleave_low(Vec a, Vec b) {
    Ints lanes;
    for (int i = 0; i < kLanes; ++i) lanes[i] = i / 2 + i % 2 * kLanes;
    return __builtin_shuffle(a, b, lanes);
}
inline Vec interleave_high(Vec a, Vec b) {
    Ints lanes;
    for (int i = 0; i < kLanes; ++i) lanes[i] = (i + kLanes) / 2 + i % 2 * kLanes;
    return __builtin_shuffle(a, b, lanes);
}
#endif

// 2 to the power of x ≤ 0, within 2 units in the last place; 0 below −126.5, NaN for NaN.
inline Vec exp2(Vec x) {
    constexpr float kRound = 12582912 + 127;  // 1.5 · 2²³: adding it leaves the nearest whole number, plus fp32's bias
    x = larger(broadcast(-127), x);
    const Vec shifted = x + kRound;
    const Vec f = x - (shifted - kRound);  // −½ … ½
    Vec y = f * 1.32647e-3f + 9.67151e-3f;
    y = f * y + 5.550734e-2f;
    y = f * y + 2.4022242e-1f;
    y = f * y + 6.9314698e-1f;
    y = f * y + 1.0f;
    return y * reinterpret_cast<Vec>(reinterpret_cast<Ints>(shifted) << 23);
}

}  // namespace
}  // namespace amskv::cpu
