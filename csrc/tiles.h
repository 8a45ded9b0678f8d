// The tile table of the portable attention kernel: every size with its reason, and the shared-memory layout.
#pragma once

#include <cstdint>

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

template <typename T, int kHeadDim_, int kRowsPerWarp_>
struct Tile {
    using Element = T;
    static constexpr int kHeadDim = kHeadDim_;
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
    // Wide tiles of long rows have no registers left for Q: they read its fragments again for every tile of keys.
    static constexpr bool kQueryInRegisters = !kWide || kHeadDim == 64;
    // Thread blocks of 4 warps that share a multiprocessor's 65 536 registers, at most 168 or 255 for a thread: as
    // many as its shared memory holds on sm_80.
    static constexpr int kBlocksPerMultiprocessor = !kWide && kHeadDim == 64 ? 3 : 2;

    static constexpr uint64_t kAllKeys = ~uint64_t{0} >> (64 - kKeys);
    static constexpr int kKeyBytes = kKeys * kHeadDim * kElementBytes;
    static constexpr int kStageBytes = 2 * kKeyBytes;  // K, then V

    static constexpr int query_bytes(int warps) { return warps * kRowsPerWarp * kHeadDim * kElementBytes; }
    // Shared memory of a team: Q (later the output), and as many stages as there are tiles to fill them.
    static constexpr int team_bytes(int warps, int key_tiles) {
        return query_bytes(warps) + (key_tiles < kStages ? key_tiles : kStages) * kStageBytes;
    }
};

}  // namespace amskv
