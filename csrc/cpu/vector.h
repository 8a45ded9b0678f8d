// Vectors of fp32 as wide as the instruction set that this file is compiled for.
//
// They are the compiler's own vector types, which g++ and clang have without a header or a library, on every machine:
// libraries of vectors are templates, whose instances a linker would merge across files compiled for different sets.
// So nothing here, nor in what includes it, may leave its file; no header of the standard library with code comes in.
#pragma once

#ifdef __x86_64__
#include <immintrin.h>
#endif

#include <cstdint>

#include "cpu/cpu.h"

namespace amskv::cpu {
namespace {

#if defined(__AVX512F__)
inline constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
inline constexpr int kVectorBytes = 32;
#else
inline constexpr int kVectorBytes = 16;  // SSE2, NEON
#endif
inline constexpr int kLanes = kVectorBytes / 4;
inline constexpr float kInfinity = __builtin_inff();

typedef float Vec __attribute__((vector_size(kVectorBytes), may_alias));
typedef uint32_t Bits __attribute__((vector_size(kVectorBytes), may_alias));
typedef uint16_t Words __attribute__((vector_size(kVectorBytes), may_alias));
typedef float VecAnywhere __attribute__((vector_size(kVectorBytes), aligned(4), may_alias));
typedef float PairsAnywhere __attribute__((vector_size(kVectorBytes), aligned(2), may_alias));
typedef uint16_t HalvesAnywhere __attribute__((vector_size(kVectorBytes / 2), aligned(2), may_alias));
typedef int8_t BytesAnywhere __attribute__((vector_size(kLanes), aligned(1), may_alias));
typedef int16_t Shorts __attribute__((vector_size(kVectorBytes / 2), may_alias));
typedef int32_t Ints __attribute__((vector_size(kVectorBytes), may_alias));

inline Bits bits_of(Vec x) { return reinterpret_cast<Bits>(x); }
inline Vec from_bits(Bits x) { return reinterpret_cast<Vec>(x); }
inline Vec broadcast(float x) { return x - Vec{}; }
inline bool all_are(Vec x, float value) {
    const Bits other = x != value;
    for (int i = 0; i < kLanes; ++i) {
        if (other[i]) return false;
    }
    return true;
}

// b where either is NaN. What x86 has one instruction for, compilers make of two.
inline Vec larger(Vec a, Vec b) {
#if defined(__AVX512F__)
    return _mm512_maskz_max_ps(0xffff, a, b);  // g++ warns of the one without a mask
#elif defined(__AVX2__)
    return _mm256_max_ps(a, b);
#else
    return a > b ? a : b;
#endif
}

inline Bits larger(Bits a, Bits b) { return a > b ? a : b; }

// x / divisor, given 1 / divisor, both to the nearest (Markstein); nothing may underflow on the way.
inline Vec quotient(Vec x, Vec divisor, [[maybe_unused]] Vec inverse) {
#if defined(__AVX512F__)
    const Vec near = x * inverse;
    return _mm512_fmadd_ps(_mm512_fnmadd_ps(near, divisor, x), inverse, near);
#elif defined(__FMA__)
    const Vec near = x * inverse;
    return _mm256_fmadd_ps(_mm256_fnmadd_ps(near, divisor, x), inverse, near);
#else
    return x / divisor;
#endif
}

inline Vec load(const float* from) { return *reinterpret_cast<const VecAnywhere*>(from); }
inline void store(float* to, Vec x) { *reinterpret_cast<VecAnywhere*>(to) = x; }

// To memory itself where whole lines allow it: what is read much later need not be in a cache, and a line need not be
// fetched to be overwritten. Before another thread reads it, end_copies must have been called.
inline void copy_past_caches(void* to, const void* from, int bytes) {
#if defined(__AVX2__)
    if (reinterpret_cast<uintptr_t>(to) % kLineBytes == 0 && bytes % kLineBytes == 0) {
        for (int i = 0; i < bytes; i += kLanes * 4) {
            const Vec x = *reinterpret_cast<const PairsAnywhere*>(static_cast<const char*>(from) + i);
            float* const target = reinterpret_cast<float*>(static_cast<char*>(to) + i);
#if defined(__AVX512F__)
            _mm512_stream_ps(target, x);
#else
            _mm256_stream_ps(target, x);
#endif
        }
        return;
    }
#endif
    __builtin_memcpy(to, from, bytes);
}

inline void end_copies() {
#if defined(__AVX2__)
    _mm_sfence();
#endif
}

// Elements of 16 bits, in integer arithmetic that every instruction set has.

inline Bits widen(const void* from) { return __builtin_convertvector(*static_cast<const HalvesAnywhere*>(from), Bits); }
inline void narrow(void* to, Bits x) { *static_cast<HalvesAnywhere*>(to) = __builtin_convertvector(x, HalvesAnywhere); }

inline Vec load(const BFloat16* from) { return from_bits(widen(from) << 16); }

inline Vec load(const Half* from) {
    constexpr float kRebias = 0x1p112f;  // from fp16's exponent bias, 15, to fp32's, 127
    const Bits x = widen(from), magnitude = (x & 0x7fff) << 13;
    const Bits finite = bits_of(from_bits(magnitude) * kRebias);
    return from_bits(((x & 0x8000) << 16) | (magnitude >= (0x7c00u << 13) ? magnitude | 0x7f800000 : finite));
}

// Stores round to nearest, ties to even.
inline void store(BFloat16* to, Vec x) {
    const Bits bits = bits_of(x);
    narrow(to, x != x ? Bits{} + 0x7fc0 : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

inline void store(Half* to, Vec x) {
    constexpr uint32_t kInfinite = 0x7c00, kNormal = (127 - 14) << 23;  // fp16's infinity; its smallest normal as fp32
    const Bits sign = (bits_of(x) >> 16) & 0x8000, bits = bits_of(x) & 0x7fffffff;
    const Bits normal = (bits - (112 << 23) + 0xfff + ((bits >> 13) & 1)) >> 13;
    const Bits subnormal = bits_of(from_bits(bits) + 0.5f) - bits_of(Vec{} + 0.5f);  // ½'s last place is 2⁻²⁴
    const Bits rounded = bits < kNormal ? subnormal : normal;
    const Bits bounded = rounded < kInfinite ? rounded : Bits{} + kInfinite;
    narrow(to, sign | (x != x ? Bits{} + 0x7e00 : bounded));
}

// Elements of eight bits, without their row's scale. From 8 to 32 bits at once, g++ 12 takes them one by one.
inline Vec load(const int8_t* from) {
#if defined(__AVX512F__)
    const auto bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    const auto x = reinterpret_cast<Ints>(_mm512_maskz_cvtepi8_epi32(0xffff, bytes));
#elif defined(__AVX2__)
    const auto bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from));
    const auto x = reinterpret_cast<Ints>(_mm256_cvtepi8_epi32(bytes));
#else
    const Shorts halves = __builtin_convertvector(*reinterpret_cast<const BytesAnywhere*>(from), Shorts);
    const Ints x = __builtin_convertvector(halves, Ints);
#endif
    return __builtin_convertvector(x, Vec);
}

// The low byte of each lane.
inline void narrow(int8_t* to, Bits x) {
#if defined(__AVX512F__)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_maskz_cvtepi32_epi8(0xffff, reinterpret_cast<__m512i>(x)));
#else
    const Shorts halves = __builtin_convertvector(x, Shorts);
    *reinterpret_cast<BytesAnywhere*>(to) = __builtin_convertvector(halves, BytesAnywhere);
#endif
}

// Two elements of 16 bits in each lane, as they are.
inline Vec load_pairs(const BFloat16* from) { return *reinterpret_cast<const PairsAnywhere*>(from); }
inline void store_pairs(BFloat16* to, Vec x) { *reinterpret_cast<PairsAnywhere*>(to) = x; }
inline void store(uint32_t* to, Bits x) { store(reinterpret_cast<float*>(to), from_bits(x)); }

// a0 b0 a1 b1 … of the lower halves of a and b, or of the upper ones.
inline Vec interleave(Vec a, Vec b, bool upper) {
    Bits lane;
    for (int i = 0; i < kLanes; ++i) lane[i] = (i + (upper ? kLanes : 0)) / 2 + i % 2 * kLanes;
#ifdef __clang__
    Vec mixed;
    for (int i = 0; i < kLanes; ++i) mixed[i] = i % 2 ? b[lane[i] - kLanes] : a[lane[i]];
    return mixed;
#else
    return __builtin_shuffle(a, b, lane);
#endif
}

// x[step], x[step + 1] … and round to the first again.
inline Vec rotate(Vec x, int step) {
    Vec turned{};
    for (int i = 0; i < kLanes; ++i) turned[i] = x[(i + step) % kLanes];
    return turned;
}

// a0 b0 a1 b1 a2 b2 a3 b3 of each 8 elements of 16 bits, the lower 4 or the upper ones.
inline Vec interleave_words(Vec a, Vec b, bool upper) {
    Words x = reinterpret_cast<Words>(a), y = reinterpret_cast<Words>(b), word;
    for (int i = 0; i < 2 * kLanes; ++i) word[i] = i / 8 * 8 + i % 8 / 2 + (upper ? 4 : 0) + i % 2 * 2 * kLanes;
#ifdef __clang__
    Words mixed;
    for (int i = 0; i < 2 * kLanes; ++i) mixed[i] = i % 2 ? y[word[i] - 2 * kLanes] : x[word[i]];
    return reinterpret_cast<Vec>(mixed);
#else
    return reinterpret_cast<Vec>(__builtin_shuffle(x, y, word));
#endif
}

// Lane i of the result is the sum of x[i]'s lanes.
inline Vec sums_of(Vec (&x)[kLanes]) {
#pragma GCC unroll 4
    for (int half = kLanes / 2; half > 0; half /= 2) {
#pragma GCC unroll 8
        for (int i = 0; i < half; ++i)
            x[i] = interleave(x[i], x[i + half], false) + interleave(x[i], x[i + half], true);
    }
    return x[0];
}

// The largest lane, or the sum of all lanes, in every lane.
inline Vec largest_lane(Vec x) {
#pragma GCC unroll 4
    for (int step = kLanes / 2; step > 0; step /= 2) x = larger(rotate(x, step), x);
    return x;
}
inline Vec sum_of_lanes(Vec x) {
#pragma GCC unroll 4
    for (int step = kLanes / 2; step > 0; step /= 2) x += rotate(x, step);
    return x;
}

// Turns the rows of a square into its columns: a perfect shuffle of rows and lanes, as often as halves them to one.
inline void transpose(Vec (&x)[kLanes]) {
    Vec y[kLanes];
#pragma GCC unroll 4
    for (int step = 1; step < kLanes; step *= 2) {
#pragma GCC unroll 8
        for (int i = 0; i < kLanes / 2; ++i) {
            y[2 * i] = interleave(x[i], x[i + kLanes / 2], false);
            y[2 * i + 1] = interleave(x[i], x[i + kLanes / 2], true);
        }
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) x[i] = y[i];
    }
}

// 2 to the power of x ≤ 0, within 2 units in the last place; 0 below −126.5, NaN for NaN.
#if defined(__AVX512F__)
inline Vec exp2(Vec x) {
    const Vec f = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF);  // 0 … 1; below, the minimax polynomial of 2ᶠ there
    Vec y = f * 1.8671304e-3f + 9.0170296e-3f;
    y = f * y + 5.5799914e-2f;
    y = f * y + 2.4016445e-1f;
    y = f * y + 6.9315131e-1f;
    y = f * y + 1.0f;
    const __mmask16 counts = _mm512_cmp_ps_mask(x, broadcast(-126.5f), _CMP_NLT_UQ);
    return _mm512_maskz_scalef_ps(counts, y, x);  // y · 2 to the power of x's floor
}
#else
inline Vec exp2(Vec x) {
    constexpr float kRound = 12582912 + 127;  // 1.5 · 2²³: adding it leaves the nearest whole number, plus fp32's bias
    x = larger(broadcast(-127), x);
    const Vec shifted = x + kRound;
    const Vec f = x - (shifted - kRound);  // −½ … ½; below, the minimax polynomial of 2ᶠ there
    Vec y = f * 1.32647e-3f + 9.67151e-3f;
    y = f * y + 5.550734e-2f;
    y = f * y + 2.4022242e-1f;
    y = f * y + 6.9314698e-1f;
    y = f * y + 1.0f;
    return y * from_bits(bits_of(shifted) << 23);
}
#endif

}  // namespace
}  // namespace amskv::cpu
