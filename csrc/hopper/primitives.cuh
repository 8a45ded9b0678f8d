// What Hopper adds, in inline PTX: barriers in shared memory, bulk tensor copies, warpgroup products. tests/host gives
// the same names a host meaning.
#pragma once

#include <cuda.h>  // types alone: the one function comes from the driver at run time

#include <type_traits>

#include "common/primitives.cuh"

namespace amskv {

using TensorMap = CUtensorMap;

// Makes the current device's context this thread's: in a fresh thread, the driver's own functions find none.
inline Error use_device() {
    int device = 0;
    const cudaError_t error = cudaGetDevice(&device);
    return error == cudaSuccess ? cudaSetDevice(device) : error;
}

// Describes 16-bit elements in global memory for the copy engine. Boxes are kSwizzleElements wide and `box_rows` high,
// their 16-byte chunks permuted in shared memory by the row's last 3 bits; what lies past a dimension reads as zero
// and is not written. Strides are those of dimensions 1 … 3, in bytes. The device must be in use by this thread.
inline Error encode_map(
    TensorMap* map, const void* base, const int64_t (&dims)[4], const int64_t (&strides)[3], int box_rows) {
    using Encode = decltype(&cuTensorMapEncodeTiled);
    static Encode encode = nullptr;
    if (encode == nullptr) {
        void* found = nullptr;
        cudaDriverEntryPointQueryResult result{};
        const cudaError_t error =
            cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result);
        if (error != cudaSuccess) return error;
        if (result != cudaDriverEntryPointSuccess) return cudaErrorNotSupported;
        encode = reinterpret_cast<Encode>(found);
    }
    const cuuint64_t sizes[4] = {cuuint64_t(dims[0]), cuuint64_t(dims[1]), cuuint64_t(dims[2]), cuuint64_t(dims[3])};
    const cuuint64_t steps[3] = {cuuint64_t(strides[0]), cuuint64_t(strides[1]), cuuint64_t(strides[2])};
    const cuuint32_t box[4] = {64, static_cast<cuuint32_t>(box_rows), 1, 1}, each[4] = {1, 1, 1, 1};
    const CUresult error = encode(
        map, CU_TENSOR_MAP_DATA_TYPE_UINT16, 4, const_cast<void*>(base), sizes, steps, box, each,
        CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
        CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    return static_cast<Error>(error);  // the runtime numbers these errors as the driver does
}

// A barrier in shared memory, 8 bytes. A phase ends when `arrivals` threads have arrived and all bytes expected have
// come; phases are counted from 0.
__device__ __forceinline__ void mbarrier_init(SharedAddress barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// Shows new barriers to the copy engine.
__device__ __forceinline__ void mbarrier_init_fence() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void mbarrier_arrive(SharedAddress barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Arrives, and makes the phase wait for `bytes` more.
__device__ __forceinline__ void mbarrier_expect(SharedAddress barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

#ifndef AMSKV_TRAP_AFTER
#define AMSKV_TRAP_AFTER 0  // polls after which a wait traps, so that a hang becomes an error; 0: it waits for ever
#endif

// Waits for the end of the phase whose number has this parity.
__device__ __forceinline__ void mbarrier_wait(SharedAddress barrier, int parity) {
    uint32_t done = 0;
    for (int polls = 1; !done; ++polls) {
        if (AMSKV_TRAP_AFTER != 0 && polls == AMSKV_TRAP_AFTER) asm volatile("trap;");
        asm volatile(
            "{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
            : "=r"(done)
            : "r"(barrier), "r"(parity)
            : "memory");
    }
}

// Where a box begins in a tensor.
struct Box {
    int column, row, third, fourth;
};

// Fetches a box; its bytes count towards the barrier's phase.
__device__ __forceinline__ void tma_load(SharedAddress to, const TensorMap& map, const Box& box, SharedAddress barrier) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes "
        "[%0], [%1, {%2, %3, %4, %5}], [%6];" ::"r"(to),
        "l"(&map), "r"(box.column), "r"(box.row), "r"(box.third), "r"(box.fourth), "r"(barrier)
        : "memory");
}

// Writes a box to global memory; it joins this thread's open group of stores.
__device__ __forceinline__ void tma_store(const TensorMap& map, const Box& box, SharedAddress from) {
    asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%0, {%1, %2, %3, %4}], [%5];" ::"l"(&map),
                 "r"(box.column), "r"(box.row), "r"(box.third), "r"(box.fourth), "r"(from)
                 : "memory");
}

__device__ __forceinline__ void tma_store_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

// Waits until this thread's stores have read shared memory.
__device__ __forceinline__ void tma_store_wait_read() {
    asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
}

// Shows this thread's ordinary writes to shared memory to wgmma and the copy engine, after a barrier.
__device__ __forceinline__ void fence_async_proxy() {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// Comes to barrier `id` without waiting.
__device__ __forceinline__ void named_barrier_arrive(int id, int threads) {
    asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// The registers of each thread of this warpgroup from here on.
template <int kCount>
__device__ __forceinline__ void release_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCount));
}

template <int kCount>
__device__ __forceinline__ void take_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kCount));
}

// An operand of wgmma in shared memory, in rows of 128 permuted bytes: 8 rows take 1024 bytes. `panel_bytes` separate
// columns 0 … 63 of a row from the next 64, where an operand is read across its rows.
__device__ __forceinline__ uint64_t operand(SharedAddress at, int panel_bytes = 0) {
    constexpr uint64_t kSwizzle128 = uint64_t{1} << 62, kEightRows = uint64_t{1024 >> 4} << 32;
    return kSwizzle128 | kEightRows | static_cast<uint64_t>(panel_bytes >> 4) << 16 | (at & 0x3ffff) >> 4;
}

// The operand `bytes` further on.
__device__ __forceinline__ uint64_t advance(uint64_t operand, int bytes) { return operand + (bytes >> 4); }

// Orders the warpgroup's ordinary register accesses before its next products.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits for all of the warpgroup's groups of products but the latest kPending.
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Keeps the compiler from using accumulators before the wait above this line.
template <int kCount>
__device__ __forceinline__ void settle(float (&d)[kCount]) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

// Operand lists of 64-row products: eight sums, and the names of 32 and of 32 more.
#define AMSKV_SUMS(i) \
    "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), \
        "+f"(d[i + 7])
#define AMSKV_NAMES \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, " \
    "%24, %25, %26, %27, %28, %29, %30, %31"
#define AMSKV_MORE_NAMES \
    ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, " \
    "%53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"

// d (64 × 128, fp32) = or += a (64 × 16) · b (128 × 16)ᵀ, both in shared memory. Of each 16 rows, a warp's, a thread
// holds what mma_m16n8k16 gives it in blocks of 8 columns. Not done before a wait.
template <typename T>
__device__ __forceinline__ void wgmma_scores(float (&d)[64], uint64_t a, uint64_t b, bool accumulate) {
#define AMSKV_PRODUCT(type) \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n" \
                 "wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type " {" AMSKV_NAMES AMSKV_MORE_NAMES "}, " \
                 "%64, %65, p, 1, 1, 0, 0;\n}" \
                 : AMSKV_SUMS(0), AMSKV_SUMS(8), AMSKV_SUMS(16), AMSKV_SUMS(24), AMSKV_SUMS(32), AMSKV_SUMS(40), \
                   AMSKV_SUMS(48), AMSKV_SUMS(56) \
                 : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)))
    if constexpr (std::is_same_v<T, Half>) {
        AMSKV_PRODUCT("f16");
    } else {
        AMSKV_PRODUCT("bf16");
    }
#undef AMSKV_PRODUCT
}

// The same for 64 columns.
template <typename T>
__device__ __forceinline__ void wgmma_scores(float (&d)[32], uint64_t a, uint64_t b, bool accumulate) {
#define AMSKV_PRODUCT(type) \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\n" \
                 "wgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type " {" AMSKV_NAMES "}, " \
                 "%32, %33, p, 1, 1, 0, 0;\n}" \
                 : AMSKV_SUMS(0), AMSKV_SUMS(8), AMSKV_SUMS(16), AMSKV_SUMS(24) \
                 : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)))
    if constexpr (std::is_same_v<T, Half>) {
        AMSKV_PRODUCT("f16");
    } else {
        AMSKV_PRODUCT("bf16");
    }
#undef AMSKV_PRODUCT
}

// d (64 × 64, fp32) += a (64 × 16, in registers, as mma_m16n8k16 takes it) · b (16 × 64, in shared memory).
template <typename T>
__device__ __forceinline__ void wgmma_out(float (&d)[32], const uint32_t (&a)[4], uint64_t b) {
#define AMSKV_PRODUCT(type) \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, 1, 0;\n" \
                 "wgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type " {" AMSKV_NAMES "}, " \
                 "{%32, %33, %34, %35}, %36, p, 1, 1, 1;\n}" \
                 : AMSKV_SUMS(0), AMSKV_SUMS(8), AMSKV_SUMS(16), AMSKV_SUMS(24) \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))
    if constexpr (std::is_same_v<T, Half>) {
        AMSKV_PRODUCT("f16");
    } else {
        AMSKV_PRODUCT("bf16");
    }
#undef AMSKV_PRODUCT
}

// The same for 128 columns.
template <typename T>
__device__ __forceinline__ void wgmma_out(float (&d)[64], const uint32_t (&a)[4], uint64_t b) {
#define AMSKV_PRODUCT(type) \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, 1, 0;\n" \
                 "wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type " {" AMSKV_NAMES AMSKV_MORE_NAMES "}, " \
                 "{%64, %65, %66, %67}, %68, p, 1, 1, 1;\n}" \
                 : AMSKV_SUMS(0), AMSKV_SUMS(8), AMSKV_SUMS(16), AMSKV_SUMS(24), AMSKV_SUMS(32), AMSKV_SUMS(40), \
                   AMSKV_SUMS(48), AMSKV_SUMS(56) \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))
    if constexpr (std::is_same_v<T, Half>) {
        AMSKV_PRODUCT("f16");
    } else {
        AMSKV_PRODUCT("bf16");
    }
#undef AMSKV_PRODUCT
}

#undef AMSKV_SUMS
#undef AMSKV_NAMES
#undef AMSKV_MORE_NAMES

}  // namespace amskv
