// Tiles of keys whose history lies in int8 pages: how they come into shared memory, and become 16-bit elements there.
//
// A 16-byte chunk of a page's row becomes two chunks of a tile's. The thread that fetches it puts it where the first of
// the two will be, and widens it itself once it is there: nobody waits for anybody but at the barrier after that, which
// a tile needs anyway. The fragments' way from there on is that of 16-bit pages, so a team widens a key once, however
// many of its warps multiply with it.
#pragma once

#include <type_traits>

#include "common/int8.cuh"
#include "portable/work.cuh"

namespace amskv {

inline constexpr uint32_t kOtherOfPair = kChunkBytes;  // chunks 2 i and 2 i + 1 change places with each other alone

// What one thread fetches and widens: every `step`th row from `first` on, and of each the pairs of chunks `sharer`,
// `sharer` + kSharers and so on. So many threads share a row that their chunks lie in different banks.
template <class Tile>
struct Share {
    using Layout = Swizzled<Tile::kHeadDim>;
    static constexpr int kSharers = Layout::kPermuted / 2;
    static constexpr int kStep = 2 * kSharers * kChunkBytes;  // from a pair to the next, in a tile

    int sharer, first, step;

    __device__ __forceinline__ explicit Share(const Team& team)
        : sharer(team.thread() % kSharers), first(team.thread() / kSharers), step(team.threads() / kSharers) {}

    __device__ __forceinline__ SharedAddress pair(SharedAddress stage, int row) const {
        return stage + Layout::offset(row, 2 * sharer);
    }
};

// Where a stage keeps the scale of a row of K; that of the row of V is kScaleBytes further.
template <class Tile>
__device__ __forceinline__ SharedAddress scale_of_row(SharedAddress stage, int row) {
    return stage + 2 * Tile::kKeyBytes + row * static_cast<int>(sizeof(float));
}

// Fetches a tile of keys and values and their scales, 1 for rows of the current scale; rows that no slot names become
// zero. Pages have whole multiples of the rows that a warp fetches at a time, so it takes one branch.
template <class Tile>
__device__ __forceinline__ void load_int8_keys(const Keys<Tile>& keys, int tile, SharedAddress stage, const Team& team) {
    using Own = Share<Tile>;
    const Own own(team);
#pragma unroll 1
    for (int row = own.first; row < Tile::kKeys; row += own.step) {
        const int key = tile * Tile::kKeys + row;
        const auto from = keys.row(key);
        const SharedAddress to = own.pair(stage, row), other = to ^ kOtherOfPair, scale = scale_of_row<Tile>(stage, row);
        if (key < keys.history) {
#pragma unroll
            for (int i = 0; i < Own::Layout::kRowBytes; i += Own::kStep) {
                cp_async_16(to + i, from.k + i / 2, from.named);
                cp_async_16(to + i + Tile::kKeyBytes, from.v + i / 2, from.named);
            }
            if (own.sharer != 0) continue;
            cp_async_4(scale, from.scale, from.named);
            cp_async_4(scale + Tile::kScaleBytes, from.scale + (1 << keys.page_shift), from.named);
        } else {
#pragma unroll
            for (int i = 0; i < Own::Layout::kRowBytes; i += Own::kStep) {
                cp_async_16(to + i, from.k + i, from.named);
                cp_async_16(other + i, from.k + i + kChunkBytes, from.named);
                cp_async_16(to + i + Tile::kKeyBytes, from.v + i, from.named);
                cp_async_16(other + i + Tile::kKeyBytes, from.v + i + kChunkBytes, from.named);
            }
            store_shared_4(scale, bits_of(1));
            store_shared_4(scale + Tile::kScaleBytes, bits_of(1));
        }
    }
}

template <typename T>
__device__ __forceinline__ void widen_chunk(SharedAddress at, const Widening<T>& widen) {
    const Chunk bytes = load_shared_16(at);
    Chunk first, second;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        uint32_t pairs[2];
        widen(pairs, bytes.word[i]);
        (i < 2 ? first : second).word[i % 2 * 2] = pairs[0];
        (i < 2 ? first : second).word[i % 2 * 2 + 1] = pairs[1];
    }
    store_shared_16(at, first);
    store_shared_16(at ^ kOtherOfPair, second);
}

// Takes the power of two out of the scale at this address, which another lane of the warp has fetched.
__device__ __forceinline__ Widening<Half> take_power(SharedAddress at) {
    warp_barrier();
    float scale = float_of(load_shared_4(at));
    warp_barrier();
    const auto widening = Widening<Half>::by_power_of(scale);
    store_shared_4(at, bits_of(scale));
    return widening;
}

// What this thread has fetched of the history becomes 16-bit elements. Its warp's copies must be there, no one else's.
template <class Tile>
__device__ __forceinline__ void widen_keys(const Keys<Tile>& keys, int tile, SharedAddress stage, const Team& team) {
    using T = typename Tile::Element;
    using Own = Share<Tile>;
    const Own own(team);
    const int left = keys.history - tile * Tile::kKeys, end = left < Tile::kKeys ? left : Tile::kKeys;
#pragma unroll 1
    for (int row = own.first; row < end; row += own.step) {
        const SharedAddress at = own.pair(stage, row);
        const Widening<T> of_key{};
        Widening<T> of_value{};
        if constexpr (std::is_same_v<T, Half>) {
            of_value = take_power(scale_of_row<Tile>(stage, row) + Tile::kScaleBytes);
        }
#pragma unroll
        for (int i = 0; i < Own::Layout::kRowBytes; i += Own::kStep) {
            widen_chunk(at + i, of_key);
            widen_chunk(at + i + Tile::kKeyBytes, of_value);
        }
    }
}

}  // namespace amskv
