// 16-bit elements to and from vectors of fp32, in integer arithmetic that every instruction set has.
#pragma once

#include "cpu/vector.h"

namespace amskv::cpu {
namespace {

struct Half {
    uint16_t bits;
};
struct BFloat16 {
    uint16_t bits;
};

inline Ints widen(const void* from) { return __builtin_convertvector(*static_cast<const Halves*>(from), Ints); }
inline void narrow(void* to, Ints bits) { *static_cast<Halves*>(to) = __builtin_convertvector(bits, Halves); }
inline Ints bits_of(Vec x) { return reinterpret_cast<Ints>(x); }
inline Vec from_bits(Ints x) { return reinterpret_cast<Vec>(x); }

inline Vec load(const BFloat16* from) { return from_bits(widen(from) << 16); }

inline Vec load(const Half* from) {
    constexpr float kRebias = 0x1p112f;  // from fp16's exponent bias, 15, to fp32's, 127
    const Ints x = widen(from), magnitude = (x & 0x7fff) << 13;
    const Ints finite = bits_of(from_bits(magnitude) * kRebias);
    return from_bits(((x & 0x8000) << 16) | (magnitude >= (0x7c00 << 13) ? magnitude | 0x7f800000 : finite));
}

// Round to nearest, ties to even.
inline void store(BFloat16* to, Vec x) {
    const Ints bits = bits_of(x);
    narrow(to, x != x ? Ints{} + 0x7fc0 : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

inline void store(Half* to, Vec x) {
    constexpr int kSmallestNormal = (127 - 14) << 23, kInfinite = (127 + 16) << 23;
    const Ints sign = (bits_of(x) >> 16) & 0x8000, bits = bits_of(x) & 0x7fffffff;
    const Ints normal = (bits - (112 << 23) + 0xfff + ((bits >> 13) & 1)) >> 13;
    const Ints subnormal = bits_of(from_bits(bits) + 0.5f) - bits_of(Vec{} + 0.5f);  // ½'s last place is 2⁻²⁴
    Ints rounded = bits < kSmallestNormal ? subnormal : normal;
    rounded = rounded > 0x7c00 || bits >= kInfinite ? Ints{} + 0x7c00 : rounded;
    narrow(to, sign | (x != x ? Ints{} + 0x7e00 : rounded));
}

}  // namespace
}  // namespace amskv::cpu
