// Rows of int8 with a scale each: exact to 16-bit elements, and from them as amskv_kernels/ops/quantise.py rounds.
#pragma once

#include <cmath>

#include "common/device.cuh"

namespace amskv {

// Makes pairs of 16-bit elements of four int8, the first in the low byte: every byte becomes the low mantissa bits of a
// number whose unit is 1.
template <typename T>
struct Widening;

// 1024 + (x + 128), of which fp16 has all bits.
template <>
struct Widening<Half> {
    uint32_t factor = 0x3c003c00, offset = 0xe480e480;  // 1 and −1152

    __device__ __forceinline__ void operator()(uint32_t (&pairs)[2], uint32_t bytes) const {
        bytes ^= 0x80808080;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            pairs[i] = fma_pair<Half>(byte_permute(bytes, 0x64646464, i == 0 ? 0x4140 : 0x4342), factor, offset);
        }
    }

    // For a row whose weights the scale would take out of fp16's range: as far as fp16 has it, the scale's power of two
    // goes to the elements. `scale` keeps the rest, 1 … 2 mostly.
    __device__ __forceinline__ static Widening by_power_of(float& scale) {
        constexpr uint32_t kLeast = (127 - 24) << 23, kMost = (127 + 5) << 23;  // of the offset, 1152 · 32 is the most
        const uint32_t exponent = bits_of(scale) & 0x7f800000;
        const uint32_t power = exponent < kLeast ? kLeast : exponent > kMost ? kMost : exponent;
        const float factor = float_of(power), offset = -1152 * factor;
        scale *= float_of((254 << 23) - power);
        return {pack<Half>(factor, factor), pack<Half>(offset, offset)};
    }
};

// bf16 has one bit less: 128 + the low seven bits, minus 128, or minus 256 where the eighth is set.
template <>
struct Widening<BFloat16> {
    __device__ __forceinline__ void operator()(uint32_t (&pairs)[2], uint32_t bytes) const {
        constexpr uint32_t kEighth = 0x00800080, kHigh = 0xff80ff80, kMinusOne = 0xbf80bf80;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const uint32_t raised = byte_permute(bytes, 0x43434343, i == 0 ? 0x4140 : 0x4342);
            pairs[i] = fma_pair<BFloat16>(raised & kHigh, kMinusOne, raised & ~kEighth);
        }
    }
};

// How a row is rounded, from the largest magnitude of its elements, given as fp32's bits. All of it happens at the size
// where that is 2 … 4: no residue underflows there, and no division needs the slow path of CUDA's own.
struct RowScale {
    float scale;
    bool holds;  // else every byte is 0: a row that counts as zero, or with NaN or an infinity

    __device__ __forceinline__ explicit RowScale(uint32_t largest) {
        constexpr float kLevels = 127, kLeast = kLevels * 0x1p-126f;  // below, the scale would not be a normal number
        const uint32_t exponent = largest & 0x7f800000;
        const float most = float_of(largest), from_unit = float_of(exponent - 0x00800000);
        holds = most >= kLeast && most < INFINITY;
        to_unit_ = float_of(0x7f800000 - exponent);
        unit_scale_ = quotient(most * to_unit_, kLevels, 1 / kLevels);
        inverse_ = reciprocal(unit_scale_);
        inverse_ = fmaf(fmaf(-unit_scale_, inverse_, 1), inverse_, inverse_);
        scale = holds ? unit_scale_ * from_unit : most < kLeast ? 0 : float_of(0x7fc00000);
    }

    // Four elements, in pairs.
    template <typename T>
    __device__ __forceinline__ uint32_t round(uint32_t low, uint32_t high) const {
        const uint32_t first = byte_permute(byte<T>(low, 0), byte<T>(low, 1), 0x0040);
        const uint32_t second = byte_permute(byte<T>(high, 0), byte<T>(high, 1), 0x0040);
        return holds ? byte_permute(first, second, 0x5410) : 0;
    }

private:
    float to_unit_, unit_scale_, inverse_;

    // The fp32 number nearest to x / divisor, given the one nearest to 1 / divisor (Markstein).
    __device__ __forceinline__ static float quotient(float x, float divisor, float inverse) {
        const float near = x * inverse;
        return fmaf(fmaf(-near, divisor, x), inverse, near);
    }

    // The nearest whole number, half to even, in the low byte.
    template <typename T>
    __device__ __forceinline__ uint32_t byte(uint32_t pair, int index) const {
        constexpr float kWhole = 0x1.8p23f;  // adding it leaves the nearest whole number in the low bits
        return bits_of(quotient(element<T>(pair, index) * to_unit_, unit_scale_, inverse_) + kWhole);
    }
};

template <typename T>
__device__ __forceinline__ uint32_t larger_magnitude(uint32_t largest, uint32_t pair) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const uint32_t magnitude = bits_of(element<T>(pair, i)) & 0x7fffffff;  // NaN above infinity above all others
        largest = magnitude > largest ? magnitude : largest;
    }
    return largest;
}

}  // namespace amskv
