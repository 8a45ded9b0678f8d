// All inline PTX of the project, a line or two per primitive, and the launch. tests/host gives the same names a
// host meaning, so shared memory is only reached through these, by its 32-bit address.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "amskv/amskv.h"

namespace amskv {

using SharedAddress = uint32_t;  // bytes, in the shared state space

struct alignas(16) Chunk {  // what one thread moves at a time: 8 elements
    uint32_t word[4];
};

struct Half {};      // fp16, IEEE
struct BFloat16 {};  // bf16

// First byte of the block's dynamic shared memory, on the boundary that swizzled tiles of the copy engine need.
__device__ __forceinline__ SharedAddress dynamic_shared() {
    extern __shared__ __align__(1024) unsigned char memory[];
    return static_cast<SharedAddress>(__cvta_generic_to_shared(memory));
}

// Waits until `threads` threads (whole warps) have come to barrier `id`, and orders their memory accesses.
__device__ __forceinline__ void named_barrier(int id, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// Waits for the warp's lanes, and orders their memory accesses.
__device__ __forceinline__ void warp_barrier() { __syncwarp(); }

// Bit i: what lane i passed.
__device__ __forceinline__ uint32_t ballot(bool value) { return __ballot_sync(~0u, value); }

template <typename V>
__device__ __forceinline__ V shuffle_xor(V value, int mask) {
    return __shfl_xor_sync(~0u, value, mask);
}

__device__ __forceinline__ int shuffle_from(int value, int lane) { return __shfl_sync(~0u, value, lane); }

// The value of the lane `delta` below; a lane that has none gets its own back.
__device__ __forceinline__ int shuffle_up(int value, int delta) { return __shfl_up_sync(~0u, value, delta); }

// Copies 16 bytes to shared memory without registers; where not `valid`, writes zeros and reads nothing.
__device__ __forceinline__ void cp_async_16(SharedAddress to, const void* from, bool valid) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(valid ? 16 : 0) : "memory");
}

// The same of 4 bytes.
__device__ __forceinline__ void cp_async_4(SharedAddress to, const void* from, bool valid) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to), "l"(from), "r"(valid ? 4 : 0) : "memory");
}

// Closes this thread's group of copies; a group may be empty.
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits for all of this thread's groups but the latest kPending. Other threads see the bytes after a barrier.
template <int kPending>
__device__ __forceinline__ void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Four 8×8 matrices of 16-bit elements: lane l gives the address of row l % 8 of matrix l / 8, and gets elements
// (l / 4, 2 (l % 4)) and the next of each.
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], SharedAddress row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(row)
                 : "memory");
}

// The same, each matrix transposed on the way.
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], SharedAddress row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(row)
                 : "memory");
}

// d (16×8, fp32) += a (16×16) · b (16×8).
template <typename T>
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);

template <>
__device__ __forceinline__ void mma_m16n8k16<Half>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

template <>
__device__ __forceinline__ void mma_m16n8k16<BFloat16>(
    float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Two floats rounded to nearest even, `low` in the low half.
template <typename T>
__device__ __forceinline__ uint32_t pack(float low, float high);

template <>
__device__ __forceinline__ uint32_t pack<Half>(float low, float high) {
    uint32_t packed;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
    return packed;
}

template <>
__device__ __forceinline__ uint32_t pack<BFloat16>(float low, float high) {
    uint32_t packed;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
    return packed;
}

// Element 0 or 1 of a pair, exact.
template <typename T>
__device__ __forceinline__ float element(uint32_t pair, int index);

template <>
__device__ __forceinline__ float element<Half>(uint32_t pair, int index) {
    float x;
    asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(static_cast<uint16_t>(pair >> 16 * index)));
    return x;
}

template <>
__device__ __forceinline__ float element<BFloat16>(uint32_t pair, int index) {
    return __uint_as_float(index == 0 ? pair << 16 : pair & 0xffff0000);
}

// a · b + c of pairs, rounded once.
template <typename T>
__device__ __forceinline__ uint32_t fma_pair(uint32_t a, uint32_t b, uint32_t c);

template <>
__device__ __forceinline__ uint32_t fma_pair<Half>(uint32_t a, uint32_t b, uint32_t c) {
    uint32_t d;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
}

template <>
__device__ __forceinline__ uint32_t fma_pair<BFloat16>(uint32_t a, uint32_t b, uint32_t c) {
    uint32_t d;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
}

// Byte i is byte (selector >> 4 i & 7) of a, whose bytes count 0 … 3, and b, 4 … 7.
__device__ __forceinline__ uint32_t byte_permute(uint32_t a, uint32_t b, uint32_t selector) {
    return __byte_perm(a, b, selector);
}

// 2^x to two units in the last place, subnormal results 0, 2^−∞ = 0.
__device__ __forceinline__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// 1 / x to one unit in the last place; x is normal.
__device__ __forceinline__ float reciprocal(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ uint32_t bits_of(float x) { return __float_as_uint(x); }
__device__ __forceinline__ float float_of(uint32_t bits) { return __uint_as_float(bits); }

__device__ __forceinline__ void store_shared_4(SharedAddress to, uint32_t value) {
    asm volatile("st.shared.b32 [%0], %1;" ::"r"(to), "r"(value) : "memory");
}

__device__ __forceinline__ void store_shared_16(SharedAddress to, const Chunk& c) {
    asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(c.word[0]), "r"(c.word[1]), "r"(c.word[2]),
                 "r"(c.word[3])
                 : "memory");
}

__device__ __forceinline__ uint32_t load_shared_4(SharedAddress from) {
    uint32_t value;
    asm volatile("ld.shared.b32 %0, [%1];" : "=r"(value) : "r"(from) : "memory");
    return value;
}

__device__ __forceinline__ float2 load_shared_8(SharedAddress from) {
    float2 pair;
    asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(pair.x), "=f"(pair.y) : "r"(from) : "memory");
    return pair;
}

__device__ __forceinline__ Chunk load_shared_16(SharedAddress from) {
    Chunk c;
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(c.word[0]), "=r"(c.word[1]), "=r"(c.word[2]), "=r"(c.word[3])
                 : "r"(from)
                 : "memory");
    return c;
}

// One kernel launch; blocks may ask for more than the 48 KiB of shared memory that need no asking. The first launch
// loads the kernel, which a stream under capture allows in the relaxed mode alone.
template <typename Args>
Error launch(const char*, void (*kernel)(Args), int blocks, int threads, int shared_bytes, Stream stream, Args args) {
    cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
    if (const cudaError_t error = cudaThreadExchangeStreamCaptureMode(&mode); error != cudaSuccess) return error;
    const cudaError_t loaded =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
    const cudaError_t restored = cudaThreadExchangeStreamCaptureMode(&mode);
    if (loaded != cudaSuccess) return loaded;
    if (restored != cudaSuccess) return restored;
    void* arguments[] = {&args};
    const void* function = reinterpret_cast<const void*>(kernel);
    return cudaLaunchKernel(function, dim3(blocks), dim3(threads), arguments, shared_bytes, stream);
}

}  // namespace amskv
