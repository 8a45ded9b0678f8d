// Matrix products of bf16, added in fp32: AMX where the file is compiled for it, else AVX-512's dot products of pairs.
//
// Elements that are multiplied together come in pairs, one pair in 32 bits: a pair of one row of A times a pair of one
// column of B adds two products to an element of C.
#pragma once

#include <immintrin.h>

#include "cpu/cpu.h"
#include "cpu/vector.h"

namespace amskv::cpu {
namespace {

// What multiply works on: C (rows, 16 · kColumns) += A (rows, pairs) · B (pairs, 16 · kColumns), or = without `add`.
// `rows` is a multiple of 32, `pairs` of 16; strides count elements of 32 bits.
struct Product {
    const uint32_t* a;
    int a_stride;
    const uint32_t* b;
    int b_stride;
    float* c;
    int c_stride;
    int rows, pairs;
    bool add;
};

#ifdef __AMX_BF16__

// What ldtilecfg reads: eight tiles of 16 rows of 64 bytes.
struct alignas(64) TileShapes {
    uint8_t palette = 1, first_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
inline constexpr TileShapes kTileShapes;

// Takes the tiles for as long as it lives.
class Tiles {
public:
    Tiles() { _tile_loadconfig(&kTileShapes); }
    ~Tiles() { _tile_release(); }
    Tiles(const Tiles&) = delete;
};

// Tiles 0 … 3 hold C, 4 and 5 A, 6 and 7 B. The intrinsics do not tell the compiler that they touch memory.
template <int kColumns>
void multiply(const Product& p) {
    const int64_t a_bytes = 4 * int64_t{p.a_stride}, b_bytes = 4 * int64_t{p.b_stride};
    const int64_t c_bytes = 4 * int64_t{p.c_stride};
    __atomic_signal_fence(__ATOMIC_SEQ_CST);
    for (int row = 0; row < p.rows; row += 32) {
        const uint32_t* const a = p.a + row * p.a_stride;
        float* const c = p.c + row * p.c_stride;
        float* const c1 = c + 16 * p.c_stride;
        if (p.add) {
            _tile_loadd(0, c, c_bytes);
            _tile_loadd(1, c1, c_bytes);
            if (kColumns > 1) _tile_loadd(2, c + 16, c_bytes);
            if (kColumns > 1) _tile_loadd(3, c1 + 16, c_bytes);
        } else {
            _tile_zero(0);
            _tile_zero(1);
            if (kColumns > 1) _tile_zero(2);
            if (kColumns > 1) _tile_zero(3);
        }
        for (int pair = 0; pair < p.pairs; pair += 16) {
            _tile_loadd(6, p.b + pair * p.b_stride, b_bytes);
            _tile_loadd(4, a + pair, a_bytes);
            _tile_dpbf16ps(0, 4, 6);
            _tile_loadd(5, a + 16 * p.a_stride + pair, a_bytes);
            _tile_dpbf16ps(1, 5, 6);
            if (kColumns > 1) _tile_loadd(7, p.b + pair * p.b_stride + 16, b_bytes);
            if (kColumns > 1) _tile_dpbf16ps(2, 4, 7);
            if (kColumns > 1) _tile_dpbf16ps(3, 5, 7);
        }
        _tile_stored(0, c, c_bytes);
        _tile_stored(1, c1, c_bytes);
        if (kColumns > 1) _tile_stored(2, c + 16, c_bytes);
        if (kColumns > 1) _tile_stored(3, c1 + 16, c_bytes);
    }
    __atomic_signal_fence(__ATOMIC_SEQ_CST);
}

#else

struct Tiles {
    ~Tiles() {}
};

// Eight rows of C at a time: 16 sums in 32 registers.
template <int kColumns>
void multiply(const Product& p) {
    for (int row = 0; row < p.rows; row += 8) {
        const uint32_t* const a = p.a + row * p.a_stride;
        float* const c = p.c + row * p.c_stride;
        Vec sum[8][kColumns] = {};
        if (p.add) {
#pragma GCC unroll 8
            for (int i = 0; i < 8; ++i) {
#pragma GCC unroll 2
                for (int j = 0; j < kColumns; ++j) sum[i][j] = load(c + i * p.c_stride + 16 * j);
            }
        }
        for (int pair = 0; pair < p.pairs; ++pair) {
            __m512bh part[kColumns];
#pragma GCC unroll 2
            for (int j = 0; j < kColumns; ++j)
                part[j] = reinterpret_cast<__m512bh>(_mm512_loadu_si512(p.b + pair * p.b_stride + 16 * j));
#pragma GCC unroll 8
            for (int i = 0; i < 8; ++i) {
                const auto each = reinterpret_cast<__m512bh>(_mm512_set1_epi32(a[i * p.a_stride + pair]));
#pragma GCC unroll 2
                for (int j = 0; j < kColumns; ++j) sum[i][j] = _mm512_dpbf16_ps(sum[i][j], each, part[j]);
            }
        }
#pragma GCC unroll 8
        for (int i = 0; i < 8; ++i) {
#pragma GCC unroll 2
            for (int j = 0; j < kColumns; ++j) store(c + i * p.c_stride + 16 * j, sum[i][j]);
        }
    }
}

#endif

// 2 · kLanes elements of eight bits as bf16, which has them all.
inline Vec load_pairs(const int8_t* from) {
    return reinterpret_cast<Vec>(_mm512_cvtne2ps_pbh(load(from + kLanes), load(from)));
}

// bf16 of `first` and `second` side by side in each lane, rounded to nearest.
inline Bits pair_of(Vec first, Vec second) {
    const Bits both = reinterpret_cast<Bits>(_mm512_cvtne2ps_pbh(second, first));
    Words order;
    for (int i = 0; i < 2 * kLanes; ++i) order[i] = i / 2 + i % 2 * kLanes;
    return reinterpret_cast<Bits>(__builtin_shuffle(reinterpret_cast<Words>(both), order));
}

}  // namespace
}  // namespace amskv::cpu
