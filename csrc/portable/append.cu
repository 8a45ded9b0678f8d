// The store alone: a warp per 16-row unit, as many as fill the device once.
#include "common/device.cuh"
#include "common/store.cuh"

namespace amskv {
namespace {

inline constexpr int kThreads = kMaxWarps * kWarpLanes;

struct AppendArgs {
    AppendParams params;
    int blocks_per_head;
};

template <int kHeadDim>
__device__ __forceinline__ void store(const AppendParams& p, int batch, int kv_head, int worker, int workers, int lane) {
    if (p.pool.scales == nullptr) return store_rows<kHeadDim>(p, batch, kv_head, worker, workers, lane);
    if (p.dtype == DType::kFloat16) {
        store_rows<kHeadDim, Half>(p, batch, kv_head, worker, workers, lane);
    } else {
        store_rows<kHeadDim, BFloat16>(p, batch, kv_head, worker, workers, lane);
    }
}

inline constexpr int kBlocksPerMultiprocessor = 4;  // 128 registers a thread; left to itself, ptxas takes 96 and spills

__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    append_kernel(const __grid_constant__ AppendArgs args) {
    const AppendParams& p = args.params;
    const int head = blockIdx.x / args.blocks_per_head, batch = head / p.kv_heads, kv_head = head % p.kv_heads;
    const int lane = threadIdx.x % kWarpLanes, workers = args.blocks_per_head * kMaxWarps;
    const int worker = blockIdx.x % args.blocks_per_head * kMaxWarps + threadIdx.x / kWarpLanes;
    switch (p.head_dim) {
        case 64:
            return store<64>(p, batch, kv_head, worker, workers, lane);
        case 96:
            return store<96>(p, batch, kv_head, worker, workers, lane);
        default:
            return store<128>(p, batch, kv_head, worker, workers, lane);
    }
}

}  // namespace

Error append(const AppendParams& params, Stream stream) {
    if (params.dtype == DType::kFloat32) return kInvalid;  // the CPU's kernels take it
    if (params.head_dim != 64 && params.head_dim != 96 && params.head_dim != 128) return kInvalid;
    if (params.write.count == 0 || params.batch * params.kv_heads == 0) return kOk;
    const int units = params.write.count * (params.pool.page_size / kUnitRows);
    const AppendArgs args{params, (units + kMaxWarps - 1) / kMaxWarps};
    return launch(
        "append", append_kernel, params.batch * params.kv_heads * args.blocks_per_head, kThreads, 0, stream, args);
}

}  // namespace amskv
