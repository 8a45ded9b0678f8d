// What each instruction set offers: the same source, compiled once per set.
#pragma once

#include <cstdint>

#include "amskv/amskv.h"

namespace amskv::cpu {

inline constexpr int kTile = 64;       // query rows of a tile
inline constexpr int kBlock = 96;      // keys of a block: its scores and V rows stay in a first-level cache of 48 KiB
inline constexpr int kMostTiles = 16;   // tiles of a task, which share each block of keys
inline constexpr int kMostHeadDim = 128;
inline constexpr int kPastEnd = 8;     // rows that a kernel may touch past the last

// How a call is cut into tasks. A task is up to kMostTiles tiles of query rows of one KV head; a group's heads are just
// more rows of it. Results do not depend on the cut.
struct AttnCut {
    int32_t rows;            // query rows of a KV head
    int32_t tiles_per_task;
    int32_t tasks_per_head;
    int64_t tasks;
};

// What one tile carries from block to block; arrays are [d][row] and [row][d].
struct alignas(64) Tile {
    float q[kMostHeadDim * kTile];
    float out[(kTile + kPastEnd) * kMostHeadDim];
    float largest[kTile], total[kTile];
    int32_t rows, vectors;
};

// A thread's working memory.
struct alignas(64) Scratch {
    Tile tiles[kMostTiles];
    float scores[(kBlock + kPastEnd) * kTile];
    float largest[kTile], decay[kTile + kPastEnd];
    float key_copies[kBlock * kMostHeadDim], value_copies[kBlock * kMostHeadDim];
    const float* keys[kBlock + kPastEnd];
    const float* values[kBlock];
};

struct InstructionSet {
    const char* name;
    void (*attn)(const AttnParams&, const AttnCut&, int64_t task, Scratch&);
};

extern const InstructionSet kPlain, kAvx2, kAvx512;

AttnCut cut_attn(const AttnParams& params, int threads);

// Rows of k and v of one sequence and head into the pages that `write` names; the rest of every such page becomes 0.
void store_rows(
    const Rows& k, const Rows& v, const Pool& pool, const SlotTable& write, const AttnParams& shape, int batch, int head);

}  // namespace amskv::cpu
