// Attention over a paged KV cache: the launchers, for C++ programs. No torch, no CUDA headers needed.
//
// pages : (num_pages, 2, page_size, head_dim)   one page = page_size tokens of one head: K rows, then V rows
// arena : (batch, kv_heads) int32               first page of this sequence-and-head's arena in the pool
// slots : (batch|1, kv_heads|1, count) int32    page_offset << kRowsBits | rows, rows 1 … page_size, 0 = none
// scales : (num_pages, 2, page_size) fp32       of pages of int8: a row is its bytes times its scale
//
// Of a page named in part, the other rows must be finite: they may be fetched and weighed 0. Stores leave zeros there.
// All pointers are device pointers, q, k, v and out to 16-bit elements. The caller makes the device current.
#pragma once

#include <cstddef>
#include <cstdint>

struct CUstream_st;  // cudaStream_t is a pointer to it

namespace amskv {

using Stream = CUstream_st*;

inline constexpr int kRowsBits = 8;  // low bits of a slot: filled rows of the page, at most 128

enum class DType : int32_t { kFloat16, kBFloat16, kFloat32 };  // kFloat32: the CPU kernels alone (cpu/cpu.h)

// A CUDA error code; 0 is success. A launcher that refuses its arguments returns kInvalid and launches nothing.
using Error = int;
inline constexpr Error kOk = 0;
inline constexpr Error kInvalid = 1;  // cudaErrorInvalidValue

// Rows of one token and head; strides count elements. The pointer and every stride are multiples of 16 bytes.
struct Rows {
    const void* data;
    int64_t batch_stride, token_stride, head_stride;
};

// The pages of a pool and where each sequence-and-head's arena begins in it.
struct Pool {
    void* pages;  // 16-byte aligned
    const int32_t* arena;
    int32_t page_size;  // 16, 32, 64 or 128
    int32_t num_pages;  // of the pool; the Hopper kernel describes it to the copy engine, and never reads past it
    float* scales = nullptr;  // of int8 pages, which the portable kernels take; null: pages hold the elements of k and v
};

// Slot entries; a stride of 0 broadcasts.
struct SlotTable {
    const int32_t* data;
    int64_t batch_stride, head_stride;
    int32_t count;
    bool leave_rest = false;  // of pages written: for the CPU kernels, which read named rows alone; else it becomes 0
};

// Shapes: batch B, tokens n of the current scale, query heads H, KV heads Hkv (H a multiple of it), head_dim D.
struct AttnParams {
    Rows q, k, v;         // (B, n, H, D) and twice (B, n, Hkv, D)
    Pool pool;            // read, and written where `write` says
    SlotTable read;       // the history
    SlotTable write;      // takes the rows of k, v in order; count 0 stores nothing
    void* out;            // (B, n, H, D) contiguous, 16-byte aligned
    float* lse;           // (B, H, n), natural log
    float softmax_scale;  // finite, above 0; logits are exact up to 1.8 · 10⁸, see csrc/common/softmax.cuh
    int32_t batch, tokens, heads, kv_heads, head_dim;
    DType dtype;
};

struct AppendParams {
    Rows k, v;
    Pool pool;
    SlotTable write;
    int32_t batch, tokens, kv_heads, head_dim;
    DType dtype;  // of k and v; where pages hold the same, the GPU kernels move 16-bit elements of either kind
};

// What the launch plan needs to know of a GPU, and whether it can run these kernels at all.
struct Device {
    int32_t multiprocessors;
    int32_t shared_bytes;  // the most shared memory a block may ask for
    int32_t capability;    // compute capability, 10 · major + minor
};
inline constexpr int32_t kLeastCapability = 80;
inline constexpr int32_t kHopperCapability = 90;  // wgmma exists there and nowhere else

// Which kernels a plan may choose from: the portable one alone, or the Hopper kernel where its tile table wants it (on
// compute capability 9.0, more than 64 tokens, head size 64 or 128, no stride of 0).
enum class Kernels : int32_t { kPortable, kHopper };

// The Hopper kernel's share of a plan.
struct HopperPlan {
    int32_t tile_rows;  // query rows of a tile, 64 or 128; 0: the portable kernel runs
    int32_t blocks;     // of the persistent grid
};

// How a call is cut into thread blocks. A team of warps computes one tile of query rows for one KV head.
struct AttnPlan {
    int32_t rows_per_warp;  // 16 or 32
    int32_t warps;          // of a team; rows_per_warp · warps query rows make a tile
    int32_t teams;          // of a thread block
    int32_t splits;         // parts the keys are cut into; above 1 a merge kernel follows
    HopperPlan hopper;
};

// Facts of the current device.
Error device_of_current(Device* device);

// The newest CUDA that the driver supports, 1000 · major + 10 · minor; 0 where there is no driver.
int32_t driver_cuda();

// The plan for these arguments; data pointers are not read.
AttnPlan plan_attn(const AttnParams& params, const Device& device, Kernels kernels = Kernels::kPortable);

// Bytes of scratch memory that `attn` needs under this plan; often 0.
size_t attn_workspace_bytes(const AttnParams& params, const AttnPlan& plan);

// out and lse of attention over the history and the current scale, which is stored on the way.
Error attn(const AttnParams& params, const AttnPlan& plan, void* workspace, Stream stream);

// The store alone.
Error append(const AppendParams& params, Stream stream);

const char* error_string(Error error);

}  // namespace amskv
