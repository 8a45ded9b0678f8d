// The host meaning of csrc/hopper/primitives.cuh, name by name.
#pragma once

#include <type_traits>

#include "host_primitives.h"

namespace amskv {

using host::TensorMap;

inline Error encode_map(
    TensorMap* map, const void* base, const int64_t (&dims)[4], const int64_t (&strides)[3], int box_rows) {
    bool fits = reinterpret_cast<uintptr_t>(base) % 16 == 0 && box_rows >= 1 && box_rows <= 256;
    for (const int64_t dim : dims) fits = fits && dim >= 1 && dim <= int64_t{1} << 32;
    for (const int64_t stride : strides) fits = fits && stride > 0 && stride % 16 == 0 && stride < int64_t{1} << 40;
    if (!fits) return kInvalid;
    map->base = static_cast<unsigned char*>(const_cast<void*>(base));
    std::copy(dims, dims + 4, map->dims);
    std::copy(strides, strides + 3, map->strides);
    map->box_rows = box_rows;
    return kOk;
}

inline Error use_device() { return kOk; }

inline void mbarrier_init(SharedAddress barrier, int arrivals, Where where = Where::current()) {
    Executor::get().mbarrier_init(barrier, arrivals, where);
}

inline void mbarrier_init_fence() { Executor::get().mbarrier_show(); }

inline void mbarrier_arrive(SharedAddress barrier, Where where = Where::current()) {
    Executor::get().mbarrier_arrive(barrier, 0, where);
}

inline void mbarrier_expect(SharedAddress barrier, int bytes, Where where = Where::current()) {
    Executor::get().mbarrier_arrive(barrier, bytes, where);
}

inline void mbarrier_wait(SharedAddress barrier, int parity, Where where = Where::current()) {
    Executor::get().mbarrier_wait(barrier, parity, where);
}

struct Box {
    int column, row, third, fourth;
};

inline void tma_load(
    SharedAddress to, const TensorMap& map, const Box& box, SharedAddress barrier, Where where = Where::current()) {
    Executor::get().bulk_load({map, {box.column, box.row, box.third, box.fourth}, to, barrier, where});
}

inline void tma_store(const TensorMap& map, const Box& box, SharedAddress from, Where where = Where::current()) {
    Executor::get().bulk_store({map, {box.column, box.row, box.third, box.fourth}, from, 0, where});
}

inline void tma_store_commit() { Executor::get().bulk_commit(); }
inline void tma_store_wait_read() { Executor::get().bulk_wait_read(); }
inline void fence_async_proxy() { Executor::get().show_writes(); }

inline void named_barrier_arrive(int id, int threads, Where where = Where::current()) {
    Executor::get().barrier(id, threads, false, where);
}

// Runs `act` once all lanes of the warp have come.
template <typename Act>
void once_per_warp(const char* name, const Where& where, Act&& act) {
    int none = 0;
    Executor::get().together(name, where, none, [&](int**) { act(Executor::get()); });
}

template <int kCount>
void release_registers(Where where = Where::current()) {
    once_per_warp("setmaxnreg", where, [&](Executor& e) { e.set_registers(kCount, false, where); });
}

template <int kCount>
void take_registers(Where where = Where::current()) {
    once_per_warp("setmaxnreg", where, [&](Executor& e) { e.set_registers(kCount, true, where); });
}

inline uint64_t operand(SharedAddress at, int panel_bytes = 0) {
    return uint64_t{1} << 62 | uint64_t{1024 >> 4} << 32 | static_cast<uint64_t>(panel_bytes >> 4) << 16 | at >> 4;
}

inline uint64_t advance(uint64_t operand, int bytes) { return operand + (bytes >> 4); }

inline void wgmma_fence(Where where = Where::current()) {
    once_per_warp("wgmma_fence", where, [](Executor& e) { e.fence_products(); });
}

inline void wgmma_commit(Where where = Where::current()) {
    once_per_warp("wgmma_commit", where, [](Executor& e) { e.commit_products(); });
}

template <int kPending>
void wgmma_wait(Where where = Where::current()) {
    once_per_warp("wgmma_wait", where, [](Executor& e) { e.wait_products(kPending); });
}

template <int kCount>
void settle(float (&)[kCount]) {}

// A warp's part of a product once all lanes have come; `a` is null where the left operand is in shared memory.
template <typename T>
void wgmma(
    const char* name, float* d, const uint32_t* a, uint64_t a_operand, uint64_t b_operand, int columns,
    bool accumulate, const Where& where) {
    struct Slot {
        float* d;
        const uint32_t* a;
    } mine{d, a};
    Executor::get().together(name, where, mine, [&](Slot** lanes) {
        host::Product product{
            {}, {}, a_operand, b_operand, columns, accumulate, a != nullptr, std::is_same_v<T, Half>, where};
        for (int i = 0; i < host::kLanes; ++i) product.d[i] = lanes[i]->d, product.a[i] = lanes[i]->a;
        Executor::get().multiply(product);
    });
}

template <typename T, int kSums>
void wgmma_scores(float (&d)[kSums], uint64_t a, uint64_t b, bool accumulate, Where where = Where::current()) {
    wgmma<T>("wgmma_scores", d, nullptr, a, b, 2 * kSums, accumulate, where);
}

template <typename T, int kSums>
void wgmma_out(float (&d)[kSums], const uint32_t (&a)[4], uint64_t b, Where where = Where::current()) {
    wgmma<T>("wgmma_out", d, a, 0, b, 2 * kSums, true, where);
}

}  // namespace amskv
