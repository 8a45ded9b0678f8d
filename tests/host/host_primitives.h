// The host meaning of csrc/common/primitives.cuh, name by name.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "amskv/amskv.h"
#include "executor.h"

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

namespace amskv {

using host::Executor;
using host::Where;

using SharedAddress = uint32_t;

struct alignas(16) Chunk {
    uint32_t word[4];
};

struct alignas(8) float2 {
    float x, y;
};

struct alignas(8) uint2 {
    uint32_t x, y;
};

struct Half {};
struct BFloat16 {};

inline uint16_t to_bits(float value, BFloat16) {
    if (std::isnan(value)) return 0x7fff;
    const uint32_t bits = std::bit_cast<uint32_t>(value);
    return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline float to_float(uint16_t bits, BFloat16) { return std::bit_cast<float>(uint32_t{bits} << 16); }

inline uint16_t to_bits(float value, Half) {
    const uint32_t bits = std::bit_cast<uint32_t>(value), sign = bits >> 16 & 0x8000;
    const float size = std::fabs(value);
    if (std::isnan(value)) return 0x7fff;
    if (size >= 65520.0f) return static_cast<uint16_t>(sign | 0x7c00);
    if (size < 6.103515625e-5f) {  // subnormal: units of 2^−24; nearbyint rounds to even
        return static_cast<uint16_t>(sign | static_cast<uint32_t>(std::nearbyint(size * 16777216.0f)));
    }
    const uint32_t magnitude = bits & 0x7fffffff;
    return static_cast<uint16_t>(sign | ((magnitude + 0xfff + (magnitude >> 13 & 1) - 0x38000000) >> 13));
}

inline float to_float(uint16_t bits, Half) {
    const float scaled = std::bit_cast<float>((bits & 0x7fffu) << 13) * 0x1p112f;  // exponent bias 15 → 127
    const float size = (bits & 0x7c00) == 0x7c00 ? (bits & 0x3ff ? NAN : INFINITY) : scaled;
    return bits & 0x8000 ? -size : size;
}

template <typename T>
float element(uint32_t packed, int half) {
    return to_float(static_cast<uint16_t>(packed >> 16 * half), T{});
}

inline SharedAddress dynamic_shared() { return 0; }

inline void named_barrier(int id, int threads, Where where = Where::current()) {
    Executor::get().barrier(id, threads, true, where);
}

inline void warp_barrier(Where where = Where::current()) {
    int none = 0;
    Executor::get().together("warp_barrier", where, none, [](int**) { Executor::get().warp_barrier(); });
}

inline uint32_t ballot(bool value, Where where = Where::current()) {
    struct Slot {
        bool value;
        uint32_t result;
    } mine{value, 0};
    Executor::get().together("ballot", where, mine, [](Slot** lanes) {
        uint32_t bits = 0;
        for (int i = 0; i < host::kLanes; ++i) bits |= uint32_t{lanes[i]->value} << i;
        for (int i = 0; i < host::kLanes; ++i) lanes[i]->result = bits;
    });
    return mine.result;
}

template <typename V>
V shuffle(const char* name, V value, int from, const Where& where) {
    struct Slot {
        V value;
        int from;
        V result;
    } mine{value, from, value};
    Executor::get().together(name, where, mine, [](Slot** lanes) {
        for (int i = 0; i < host::kLanes; ++i) lanes[i]->result = lanes[lanes[i]->from]->value;
    });
    return mine.result;
}

inline int lane_of_fiber() { return Executor::get().fiber().lane; }

template <typename V>
V shuffle_xor(V value, int mask, Where where = Where::current()) {
    return shuffle("shuffle_xor", value, lane_of_fiber() ^ mask, where);
}

inline int shuffle_from(int value, int lane, Where where = Where::current()) {
    return shuffle("shuffle_from", value, lane, where);
}

inline int shuffle_up(int value, int delta, Where where = Where::current()) {
    const int lane = lane_of_fiber();
    return shuffle("shuffle_up", value, lane >= delta ? lane - delta : lane, where);
}

inline void cp_async_16(SharedAddress to, const void* from, bool valid, Where where = Where::current()) {
    Executor::get().copy_async(to, from, 16, valid, where);
}

inline void cp_async_4(SharedAddress to, const void* from, bool valid, Where where = Where::current()) {
    Executor::get().copy_async(to, from, 4, valid, where);
}

inline void cp_async_commit() { Executor::get().commit(); }

template <int kPending>
void cp_async_wait() {
    Executor::get().wait_copies(kPending);
}

inline void ldmatrix(const char* name, uint32_t (&r)[4], SharedAddress row, bool transposed, const Where& where) {
    struct Slot {
        SharedAddress row;
        uint32_t* r;
        bool transposed;
        Where where;
    } mine{row, r, transposed, where};
    Executor::get().together(name, where, mine, [](Slot** lanes) {
        Executor& executor = Executor::get();
        for (int m = 0; m < 4; ++m) {
            uint16_t matrix[8][8];
            uint32_t rows[8];
            for (int i = 0; i < 8; ++i) {
                rows[i] = lanes[m * 8 + i]->row;
                std::memcpy(matrix[i], executor.read(rows[i], 16, host::kAllLanes, lanes[0]->where), 16);
            }
            executor.count_conflicts(rows, 8);
            for (int l = 0; l < host::kLanes; ++l) {
                const int i = l / 4, j = 2 * (l % 4);
                const bool t = lanes[l]->transposed;
                lanes[l]->r[m] = t ? matrix[j][i] | matrix[j + 1][i] << 16 : matrix[i][j] | matrix[i][j + 1] << 16;
            }
        }
    });
}

inline void ldmatrix_x4(uint32_t (&r)[4], SharedAddress row, Where where = Where::current()) {
    ldmatrix("ldmatrix_x4", r, row, false, where);
}

inline void ldmatrix_x4_trans(uint32_t (&r)[4], SharedAddress row, Where where = Where::current()) {
    ldmatrix("ldmatrix_x4_trans", r, row, true, where);
}

template <typename T>
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Where where = Where::current()) {
    struct Slot {
        float* d;
        const uint32_t* a;
        uint32_t b[2];
    } mine{d, a, {b0, b1}};
    Executor::get().together("mma_m16n8k16", where, mine, [](Slot** lanes) {
        float a[16][16], b[16][8];
        for (int l = 0; l < host::kLanes; ++l) {
            const int i = l / 4, j = 2 * (l % 4);
            for (int half = 0; half < 2; ++half) {
                for (int r = 0; r < 4; ++r) a[i + r % 2 * 8][j + r / 2 * 8 + half] = element<T>(lanes[l]->a[r], half);
                for (int r = 0; r < 2; ++r) b[j + r * 8 + half][i] = element<T>(lanes[l]->b[r], half);
            }
        }
        float sums[16][8] = {};
        for (int i = 0; i < 16; ++i)
            for (int k = 0; k < 16; ++k)
                for (int j = 0; j < 8; ++j) sums[i][j] += a[i][k] * b[k][j];
        for (int l = 0; l < host::kLanes; ++l)
            for (int r = 0; r < 4; ++r) lanes[l]->d[r] += sums[l / 4 + r / 2 * 8][2 * (l % 4) + r % 2];
        ++Executor::get().counters.products;
    });
}

template <typename T>
uint32_t pack(float low, float high) {
    return to_bits(low, T{}) | uint32_t{to_bits(high, T{})} << 16;
}

template <typename T>
uint32_t fma_pair(uint32_t a, uint32_t b, uint32_t c) {  // fp32 holds the product and the sum of what the kernels pass
    const auto at = [&](int i) { return std::fma(element<T>(a, i), element<T>(b, i), element<T>(c, i)); };
    return pack<T>(at(0), at(1));
}

inline uint32_t byte_permute(uint32_t a, uint32_t b, uint32_t selector) {
    const uint64_t bytes = uint64_t{b} << 32 | a;
    uint32_t result = 0;
    for (int i = 0; i < 4; ++i) result |= static_cast<uint32_t>(bytes >> 8 * (selector >> 4 * i & 7) & 0xff) << 8 * i;
    return result;
}

inline float exp2_fast(float x) { return std::exp2(x); }
inline float reciprocal(float x) { return 1 / x; }

inline void store_shared_4(SharedAddress to, uint32_t value, Where where = Where::current()) {
    struct Slot {
        SharedAddress to;
        uint32_t value;
        Where where;
    } mine{to, value, where};
    Executor::get().together("store_shared_4", where, mine, [](Slot** lanes) {
        uint32_t addresses[host::kLanes];
        for (int i = 0; i < host::kLanes; ++i) {
            addresses[i] = lanes[i]->to;
            Executor::get().write(addresses[i], &lanes[i]->value, 4, i, lanes[i]->where);
        }
        Executor::get().count_conflicts(addresses, host::kLanes);
    });
}

inline uint32_t bits_of(float x) { return std::bit_cast<uint32_t>(x); }
inline float float_of(uint32_t bits) { return std::bit_cast<float>(bits); }

// By one lane or by all.
inline void store_shared_16(SharedAddress to, const Chunk& value, Where where = Where::current()) {
    Executor::get().write(to, &value, 16, lane_of_fiber(), where);
}

// What every lane reads, and the bank conflicts of `together` lanes at a time.
template <typename V>
V load_shared(const char* name, SharedAddress from, int together, const Where& where) {
    struct Slot {
        SharedAddress from;
        V result;
        int together;
        Where where;
    } mine{from, {}, together, where};
    Executor::get().together(name, where, mine, [](Slot** lanes) {
        uint32_t addresses[host::kLanes];
        for (int i = 0; i < host::kLanes; ++i) {
            addresses[i] = lanes[i]->from;
            std::memcpy(&lanes[i]->result, Executor::get().read(addresses[i], sizeof(V), i, lanes[i]->where), sizeof(V));
        }
        const int step = lanes[0]->together;
        for (int i = 0; i < host::kLanes; i += step) Executor::get().count_conflicts(addresses + i, step);
    });
    return mine.result;
}

inline uint32_t load_shared_4(SharedAddress from, Where where = Where::current()) {
    return load_shared<uint32_t>("load_shared_4", from, 32, where);
}

inline float2 load_shared_8(SharedAddress from, Where where = Where::current()) {
    return load_shared<float2>("load_shared_8", from, 16, where);
}

inline Chunk load_shared_16(SharedAddress from, Where where = Where::current()) {
    return load_shared<Chunk>("load_shared_16", from, 8, where);
}

template <typename Args>
Error launch(const char* name, void (*kernel)(Args), int blocks, int threads, int shared_bytes, Stream, Args args) {
    Executor::get().run(name, blocks, threads, shared_bytes, [&] { kernel(args); });
    return kOk;
}

}  // namespace amskv
