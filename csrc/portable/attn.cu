// The launch of attention: which instantiation, how many blocks, and the merge of split keys.
#include "hopper/attn.h"
#include "portable/attn.cuh"
#include "portable/merge.cuh"
#include "common/plan.h"

namespace amskv {
namespace {

template <class Tile>
Error launch_tile(AttnArgs args, Stream stream) {
    const AttnPlan& plan = args.plan;
    args.team_bytes = Tile::team_bytes(plan.warps, args.key_tiles);
    const int blocks = (args.items + plan.teams - 1) / plan.teams;
    const int threads = plan.teams * plan.warps * kWarpLanes;
    return launch("attn", attn_kernel<Tile>, blocks, threads, plan.teams * args.team_bytes, stream, args);
}

template <typename T, int kHeadDim>
Error launch_head_dim(const AttnArgs& args, Stream stream) {
    constexpr int kInt8Rows = int8_rows_per_warp(kHeadDim);
    const int rows = args.plan.rows_per_warp;
    if (args.params.pool.scales != nullptr) {
        return rows == kInt8Rows ? launch_tile<Tile<T, kHeadDim, kInt8Rows, true>>(args, stream) : kInvalid;
    }
    if constexpr (kHeadDim != 96) {
        if (rows == 32) return launch_tile<Tile<T, kHeadDim, 32>>(args, stream);
    }
    return rows == 16 ? launch_tile<Tile<T, kHeadDim, 16>>(args, stream) : kInvalid;
}

template <typename T>
Error launch_type(const AttnArgs& args, Stream stream) {
    switch (args.params.head_dim) {
        case 64:
            return launch_head_dim<T, 64>(args, stream);
        case 96:
            return launch_head_dim<T, 96>(args, stream);
        case 128:
            return launch_head_dim<T, 128>(args, stream);
        default:
            return kInvalid;
    }
}

int log2_of(int power) {
    int exponent = 0;
    while (1 << exponent < power) ++exponent;
    return exponent;
}

Error merge(const AttnArgs& args, Stream stream) {
    const AttnParams& p = args.params;
    const int64_t rows = int64_t{p.batch} * p.tokens * p.heads;
    const int blocks = static_cast<int>((rows + kMaxWarps - 1) / kMaxWarps);
    const MergeArgs merge_args{p, args.plan.splits, args.partial_out, args.partial_sums};
    return launch("merge", merge_kernel, blocks, kMaxWarps * kWarpLanes, 0, stream, merge_args);
}

}  // namespace

Error attn(const AttnParams& params, const AttnPlan& plan, void* workspace, Stream stream) {
    if (params.dtype == DType::kFloat32) return kInvalid;  // the CPU's kernels take it
    if (params.batch == 0 || params.tokens == 0) return kOk;
    if (plan.hopper.tile_rows > 0) return hopper::attn(params, plan.hopper, stream);
    const Cut cut = cut_of(params, plan);
    if (!cut.valid || (plan.splits > 1 && workspace == nullptr)) return kInvalid;
    const int64_t k_step = params.k.token_stride * kElementBytes, v_step = params.v.token_stride * kElementBytes;
    if (k_step > INT32_MAX || v_step > INT32_MAX) return kInvalid;
    AttnArgs args{};
    args.params = params, args.plan = plan;
    args.page_shift = log2_of(params.pool.page_size);
    args.row_tiles = cut.row_tiles, args.key_tiles = cut.key_tiles, args.items = cut.items;
    args.group = params.heads / params.kv_heads;
    args.k_step = static_cast<int>(k_step), args.v_step = static_cast<int>(v_step);
    if (plan.splits > 1) {
        args.partial_out = static_cast<float*>(workspace);
        const int64_t rows = int64_t{params.batch} * params.tokens * params.heads;
        args.partial_sums = args.partial_out + plan.splits * rows * params.head_dim;
    }
    const bool half = params.dtype == DType::kFloat16;
    const Error error = half ? launch_type<Half>(args, stream) : launch_type<BFloat16>(args, stream);
    return error != kOk || plan.splits == 1 ? error : merge(args, stream);
}

}  // namespace amskv
