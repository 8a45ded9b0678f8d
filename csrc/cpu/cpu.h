// The CPU kernels: what each instruction set offers, and how a call is cut into tasks for whoever has threads.
#pragma once

#include <cstdint>

#include "amskv/amskv.h"

namespace amskv::cpu {

inline constexpr int kTile = 64;       // query rows of a tile
inline constexpr int kBlock = 96;      // keys of a block: its scores, or its V rows, stay in a first-level cache
inline constexpr int kFewRows = 8;     // query rows of a KV head up to which they are taken one by one
inline constexpr int kMostTiles = 16;  // tiles of a task, which share each block of keys
inline constexpr int kMostHeadDim = 128;
inline constexpr int kPairBlock = 128;  // keys of a block in bf16: a multiple of 32, which AMX multiplies at a time
inline constexpr int kPairRows = 32;    // query rows that take a block in bf16 at a time
inline constexpr int kLineBytes = 64;   // of a cache
inline constexpr int kSecondLevel = 2;  // __builtin_prefetch's word for it: the first holds what is worked on
inline constexpr int kPastEnd = 8;  // rows past the last that a kernel may touch

// How a call of attn is cut. A task is up to kMostTiles tiles of query rows of one KV head; the query heads that share
// it are just more rows. Results do not depend on the cut.
struct AttnCut {
    int32_t rows;           // query rows of a KV head
    int32_t rows_per_tile;  // at most kTile: as many in each as whole vectors allow
    int32_t tiles_per_task, tasks_per_head;
    int64_t tasks;
};

AttnCut cut_attn(const AttnParams& params, int threads);

// Elements of 16 bits.
struct Half {
    uint16_t bits;
};
struct BFloat16 {
    uint16_t bits;
};

// What one tile carries from block to block.
struct alignas(64) Tile {
    float q[kMostHeadDim * kTile];                   // [d][row]; in bf16 [pair of d][row]
    float out[(kTile + kPastEnd) * kMostHeadDim];    // [row][d]; in bf16 [d][row]
    float largest[kTile], total[kTile];              // of a row's scores and weights
    int32_t rows, vectors;                           // vectors of rows that are in use
};

// A thread's working memory, zeros at first.
struct alignas(64) Scratch {
    Tile tiles[kMostTiles];
    float scores[(kBlock + kPastEnd) * kTile];  // [key][row]
    float largest[kTile], decay[kTile + kPastEnd];
    alignas(64) float key_copies[kBlock * kMostHeadDim], value_copies[kBlock * kMostHeadDim];
    const float* keys[kBlock + kPastEnd];
    const float* values[kBlock];
    // In bf16: [key][d], [d][key], [key][row], [pair of keys][row]; of int8 pages V as it lies and a block's scales.
    alignas(64) BFloat16 packed_keys[kPairBlock * kMostHeadDim], packed_values[kMostHeadDim * kPairBlock];
    BFloat16 zeros[kMostHeadDim];
    alignas(64) float pair_scores[kPairBlock * kPairRows];
    uint32_t pair_weights[kPairBlock / 2 * kPairRows];
    alignas(64) BFloat16 value_rows[kPairBlock * kMostHeadDim];
    float key_scales[kPairBlock], value_scales[kPairBlock];
};

// Rows chosen of a history and of the current scale, into fresh pages.
struct CompactParams {
    AppendParams into;    // k and v, and the pages that take what is kept of both
    SlotTable history;
    const int64_t* keep;  // (B, Hkv, kept): a key is a row of the history's pages, page_size of each entry, or, past
    int32_t kept;         // those, of k and v; ascending
};

// qkv (B, n, H + 2 · Hkv, D) → q (B, n, H, D) and k (B, n, Hkv, D), contiguous.
struct PrepareParams {
    Rows qkv;
    const float *q_scale, *cos, *sin;  // (H,), (n, D / 2) twice; null where not asked for
    void *q, *k;
    int32_t tokens, heads, kv_heads, head_dim;
    DType dtype;
    bool l2norm;
    float eps;
};

// All null where the compiler does not know the set.
struct InstructionSet {
    const char* name;
    void (*attn)(const AttnParams&, const AttnCut&, int64_t task, Scratch&);
    void (*append)(const AppendParams&, int batch, int head);
    void (*compact)(const CompactParams&, int batch, int head);
    void (*prepare_qk)(const PrepareParams&, int64_t token);  // `token` of all batch · n
};

extern const InstructionSet kPlain, kAvx2, kAvx512, kAvx512bf16, kAmx;

// Those of this machine, plain code first; null past the best.
const InstructionSet* instruction_set(int rank);

}  // namespace amskv::cpu
