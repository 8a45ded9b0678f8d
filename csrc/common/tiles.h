// The tile tables of the attention kernels: every size with its reason, and the shared-memory layout.
#pragma once

#include <cstdint>
#include <type_traits>

namespace amskv {

inline constexpr int kWarpLanes = 32;
inline constexpr int kMmaRows = 16;  // rows of an m16n8k16 product, also its depth
inline constexpr int kMmaColumns = 8;
inline constexpr int kElementBytes = 2;  // fp16 and bf16
inline constexpr int kChunkBytes = 16;   // the widest copy of one thread
inline constexpr int kChunkElements = kChunkBytes / kElementBytes;
inline constexpr int kMaxWarps = 4;  // of a thread block: with 32 rows each, 128 query rows share one read of K, V

// Rows of kHeadDim elements in shared memory, their 16-byte chunks permuted so that the same chunk of 8 successive
// rows lies in 8 different bank groups: what ldmatrix reads at a time.
template <int kHeadDim>
struct Swizzled {
    static constexpr int kChunks = kHeadDim / kChunkElements;
    static constexpr int kRowBytes = kHeadDim * kElementBytes;

    // Rows of 64 and 128 elements all begin in bank group 0, so 8 rows need 8 permutations. Rows of 96 begin in
    // groups 0 and 4 by turns, so a pair of rows shares one, and 4 suffice (12 chunks hold whole sets of 4 only).
    static constexpr int kPermuted = kChunks % 8 == 0 ? 8 : 4;  // chunks that change places with each other

    static constexpr int offset(int row, int chunk) {
        const int permutation = kPermuted == 8 ? row % 8 : row / 2 % 4;
        return row * kRowBytes + (chunk ^ permutation) * kChunkBytes;
    }

    // From the address of chunk 0 or 1 of a row to that of the chunk `chunks` (even) further: one operation, and the
    // same for rows a multiple of 8 apart. The tile is aligned to its row.
    static constexpr uint32_t advance(uint32_t address, int chunks) {
        return (address ^ chunks % kPermuted * kChunkBytes) + chunks / kPermuted * kPermuted * kChunkBytes;
    }
};

template <typename T, int kHeadDim_, int kRowsPerWarp_, bool kInt8Pages_ = false>
struct Tile {
    using Element = T;
    static constexpr int kHeadDim = kHeadDim_;
    // The history's rows are int8 with scales. They are widened in the stage they are fetched to, which has room for the
    // 16-bit rows of the current scale anyway.
    static constexpr bool kInt8Pages = kInt8Pages_;
    // 16 rows serve tiles of 16 to 64 rows, by 1 to 4 warps. 32 rows serve tiles of 128: every fragment of K and V
    // read from shared memory then feeds two products, which otherwise is what limits a long scale.
    static constexpr int kRowsPerWarp = kRowsPerWarp_;
    static constexpr int kRowBlocks = kRowsPerWarp / kMmaRows;
    static constexpr bool kWide = kRowBlocks > 1;
    // Keys of a tile. 64 keep 4 products in flight per fragment; a wide tile of 128-element rows has accumulators
    // for 32 only.
    static constexpr int kKeys = kWide && kHeadDim == 128 ? 32 : 64;
    // Tiles of K, V in shared memory: rows of 64 elements are cheap enough for one more in flight.
    static constexpr int kStages = kHeadDim == 64 ? 3 : 2;
    // Wide tiles of long rows, or of int8 pages, have no registers left for Q: they read its fragments again for every
    // tile of keys.
    static constexpr bool kQueryInRegisters = !kWide || (kHeadDim == 64 && !kInt8Pages);
    // Thread blocks of 4 warps that share a multiprocessor's 65 536 registers, at most 168 or 255 for a thread: as
    // many as its shared memory holds on sm_80.
    static constexpr int kBlocksPerMultiprocessor = !kWide && kHeadDim == 64 ? 3 : 2;

    using KeyMask = std::conditional_t<kKeys == 32, uint32_t, uint64_t>;  // bit i: key i of the tile is there
    static constexpr KeyMask kAllKeys = ~KeyMask{0};
    static constexpr int kKeyBytes = kKeys * kHeadDim * kElementBytes;
    static constexpr int kPageRowBytes = kHeadDim * (kInt8Pages ? 1 : kElementBytes);
    static constexpr int kScaleBytes = kInt8Pages ? kKeys * 4 : 0;
    static constexpr int kStageBytes = 2 * kKeyBytes + 2 * kScaleBytes;  // K, V, the scales of K, the scales of V

    static constexpr int query_bytes(int warps) { return warps * kRowsPerWarp * kHeadDim * kElementBytes; }
    // Shared memory of a team: Q (later the output), and as many stages as there are tiles to fill them.
    static constexpr int team_bytes(int warps, int key_tiles) {
        return query_bytes(warps) + (key_tiles < kStages ? key_tiles : kStages) * kStageBytes;
    }
};

// Query rows per warp of the one tile that each head size has for int8 pages. Widening a tile of keys costs the same for
// any number of rows, so many share it; head size 96 has no wide tiles.
constexpr int int8_rows_per_warp(int head_dim) { return head_dim == 96 ? 16 : 32; }

// The Hopper kernel: one warpgroup that loads and stores, two that compute 64 query rows each.
inline constexpr int kWarpgroupWarps = 4;
inline constexpr int kWarpgroupThreads = kWarpgroupWarps * kWarpLanes;
inline constexpr int kConsumers = 2;  // warpgroups: one's exponentials run under the other's products
inline constexpr int kWarpgroupRows = 64;  // of a wgmma
inline constexpr int kSwizzleBytes = 128;  // a row of a tile in shared memory: what wgmma and TMA permute by
inline constexpr int kSwizzleElements = kSwizzleBytes / kElementBytes;  // longer rows lie in panels of so many
inline constexpr int kHopperThreads = (1 + kConsumers) * kWarpgroupThreads;
// A block of 384 threads starts with 168 registers each, 64 512, and deals them anew: 128 · 56 + 256 · 224. The consumers'
// widest moment holds 64 scores, 64 sums of the output and 32 packed probabilities. The producer gets by with 48, but
// 8 more for each consumer would need 128 · 40.
inline constexpr int kProducerRegisters = 56;
inline constexpr int kConsumerRegisters = 224;

template <typename T, int kHeadDim_>
struct HopperTile {
    using Element = T;
    static constexpr int kHeadDim = kHeadDim_;
    // Keys of a tile: whole pages of every size, and 64 score registers. A second tile of scores in flight would
    // take all 224 registers at head size 128.
    static constexpr int kKeys = 128;
    // Tiles of K, and as many of V, in flight: 128 KiB at either head size, several times the 36 KiB that 4.8 TB/s / 132
    // multiprocessors bring in 1 µs of latency. Even, since consumers that share their rows have half of them each.
    static constexpr int kStages = kHeadDim == 64 ? 4 : 2;

    static constexpr int kPanels = kHeadDim / kSwizzleElements;
    static constexpr int kStageBytes = kKeys * kHeadDim * kElementBytes;
    static constexpr int kRowBlockBytes = kWarpgroupRows * kHeadDim * kElementBytes;  // one warpgroup's Q, or output

    // Shared memory, from its first byte on.
    static constexpr int kQuery = 0;
    static constexpr int kOut = kQuery + kConsumers * kRowBlockBytes;
    static constexpr int kPipeline = kOut + kConsumers * kRowBlockBytes;
    static constexpr int kMasks = kPipeline + 2 * kStages * kStageBytes;  // 16 bytes per stage: which keys are there
    static constexpr int kStats = kMasks + kStages * kChunkBytes;  // of a consumer: shift, sum of 2 rows per thread
    static constexpr int kBarriers = kStats + kWarpgroupThreads * 16;
    static constexpr int kSharedBytes = kBarriers + (4 * kStages + 2) * 8;
};

// A tile of 128 query rows has 64 for each warpgroup. Where 128 would pad much more than 64, both warpgroups take the
// same 64 rows and every second tile of keys: n = 169 is 192 rows instead of 256. K and V then cross L2 twice as
// often, so a fifth more padding is borne (n = 576, 640 rows, stays). At head size 128 each would have one stage alone,
// and wait for every tile.
constexpr int hopper_tile_rows(int rows, int head_dim) {
    const int narrow = (rows + 63) / 64 * 64, wide = (rows + 127) / 128 * 128;
    return head_dim == 64 && wide * 5 > narrow * 6 ? 64 : 128;
}

// One warpgroup's 64 rows would leave the other idle, and so few rows are bound by memory (206 per key balance an H200's
// 989 TFLOP/s and 4.8 TB/s), where the portable kernel's several heads per block do as well. Not yet measured.
inline constexpr int kHopperLeastRows = 65;

}  // namespace amskv
