// Attention over paged history and the current scale for sm_80 and later: cp.async, ldmatrix, mma.sync.
//
// A team of warps holds one tile of query rows in registers and streams tiles of keys and values through a ring in
// shared memory. Query rows of all heads that share a KV head count as rows of one matrix, token by token. Keys are
// numbered through: `page_size` per slot of the history, whether filled or not, then the rows of the current scale.
#pragma once

#include "amskv/amskv.h"
#include "common/store.cuh"
#include "portable/int8_keys.cuh"
#include "portable/registers.cuh"
#include "portable/work.cuh"

namespace amskv {

// Of the warp's rows: lse to the caller, shift and sum to the merge, which loses nothing of large logits.
template <class Tile>
__device__ __forceinline__ void store_lse(
    const AttnArgs& args, const Work& work, const Registers<Tile>& registers, int first_row, int lane,
    float scale_log2) {
    const AttnParams& p = args.params;
    const bool final = args.plan.splits == 1;
    const int64_t rows = int64_t{p.batch} * p.heads * p.tokens;
    float* const to = final ? p.lse : args.partial_sums + 2 * work.split(args) * rows;
#pragma unroll
    for (int i = 0; i < Tile::kRowBlocks * 2; ++i) {
        const QueryRow at(args, work.kv_head, first_row + i * 8 + lane / 4);
        if (!at.real || lane % 4 != 0) continue;
        const int64_t row = (int64_t{work.batch} * p.heads + at.head) * p.tokens + at.token;
        const float shift = registers.row_shift[i / 2][i % 2], sum = registers.row_sum[i / 2][i % 2];
        to[row] = final ? log2_sum(shift, sum, scale_log2) * kLn2 : shift;
        if (!final) to[rows + row] = sum;
    }
}

// The warp's rows of the output, rounded, through the rows of shared memory that held its queries.
template <class Tile>
__device__ __forceinline__ void store_out(
    const AttnArgs& args, const Work& work, const Registers<Tile>& registers, SharedAddress rows, int first_row,
    int lane) {
    const AttnParams& p = args.params;
    using Layout = Swizzled<Tile::kHeadDim>;
    warp_barrier();  // a lane may still be reading queries
#pragma unroll
    for (int r = 0; r < Tile::kRowBlocks; ++r)
#pragma unroll
        for (int i = 0; i < Registers<Tile>::kOutBlocks * 2; ++i) {
            const int row = r * kMmaRows + i % 2 * 8 + lane / 4;
            const float* const pair = &registers.out[r][i / 2][i % 2 * 2];
            store_shared_4(
                rows + Layout::offset(row, i / 2) + lane % 4 * 4, pack<typename Tile::Element>(pair[0], pair[1]));
        }
    warp_barrier();
#pragma unroll
    for (int i = lane; i < Tile::kRowsPerWarp * Layout::kChunks; i += kWarpLanes) {
        const int row = i / Layout::kChunks, chunk = i % Layout::kChunks;
        const QueryRow at(args, work.kv_head, first_row + row);
        const int64_t to = ((int64_t{work.batch} * p.tokens + at.token) * p.heads + at.head) * Tile::kHeadDim;
        const Chunk value = load_shared_16(rows + Layout::offset(row, chunk));
        if (at.real) *reinterpret_cast<Chunk*>(static_cast<uint16_t*>(p.out) + to + chunk * kChunkElements) = value;
    }
}

// The warp's rows of one split's output, in fp32, straight from registers.
template <class Tile>
__device__ __forceinline__ void store_partial(
    const AttnArgs& args, const Work& work, const Registers<Tile>& registers, int first_row, int lane) {
    const AttnParams& p = args.params;
#pragma unroll
    for (int i = 0; i < Tile::kRowBlocks * 2; ++i) {
        const QueryRow at(args, work.kv_head, first_row + i * 8 + lane / 4);
        if (!at.real) continue;
        const int64_t sequence = int64_t{work.split(args)} * p.batch + work.batch;
        float* const to = args.partial_out + ((sequence * p.tokens + at.token) * p.heads + at.head) * Tile::kHeadDim;
#pragma unroll
        for (int column = 0; column < Registers<Tile>::kOutBlocks; ++column) {
            const float* const pair = &registers.out[i / 2][column][i % 2 * 2];
            *reinterpret_cast<float2*>(to + column * kMmaColumns + lane % 4 * 2) = float2{pair[0], pair[1]};
        }
    }
}

template <class Tile>
__device__ __forceinline__ void attend(const AttnArgs& args, const Work& work, const Team& team) {
    constexpr int kChunkSharers = Tile::kInt8Pages ? Share<Tile>::kSharers : Swizzled<Tile::kHeadDim>::kPermuted;
    const int chunk = team.thread() % kChunkSharers;
    const Keys<Tile> keys(args, work, chunk, Tile::kInt8Pages ? 2 * chunk : chunk);
    const int warp_row = team.warp * Tile::kRowsPerWarp;
    const SharedAddress queries = team.shared + warp_row * Swizzled<Tile::kHeadDim>::kRowBytes;
    const SharedAddress ring = team.shared + Tile::query_bytes(team.warps);
    const int first = work.first_key_tile, end = work.end_key_tile;
    const auto stage_of = [&](int tile) { return ring + tile % Tile::kStages * Tile::kStageBytes; };
    const auto fetch = [&](int tile) {
        if (tile < end) {
            if constexpr (Tile::kInt8Pages) {
                load_int8_keys<Tile>(keys, tile, stage_of(tile), team);
            } else {
                load_keys<Tile>(keys, tile, stage_of(tile), team);
            }
        }
        cp_async_commit();
    };
    load_queries<Tile>(args, work, team);
    for (int tile = 0; tile < Tile::kStages - 1; ++tile) fetch(first + tile);
    if (args.params.write.count > 0) {  // while the first tiles are on their way
        const int worker = (work.split(args) * args.row_tiles + work.row_tile) * team.warps + team.warp;
        const int workers = args.plan.splits * args.row_tiles * team.warps;
        using Rounded = std::conditional_t<Tile::kInt8Pages, typename Tile::Element, void>;
        store_rows<Tile::kHeadDim, Rounded>(args.params, work.batch, work.kv_head, worker, workers, team.lane);
    }

    Registers<Tile> registers;
    registers.clear();
    const float scale_log2 = args.params.softmax_scale * kLog2E;
    for (int tile = first; tile < end; ++tile) {
        const SharedAddress k = stage_of(tile), v = k + Tile::kKeyBytes, scales = v + Tile::kKeyBytes;
        cp_async_wait<Tile::kStages - 2>();
        if constexpr (Tile::kInt8Pages) widen_keys(keys, tile, k, team);
        team.barrier();  // this tile is there for all, and all are done with the one before
        fetch(tile + Tile::kStages - 1);
        if (tile == first) registers.load_query(queries, team.lane);
        const auto named = named_keys<Tile>(keys, tile, team.lane);
        if (named == 0) continue;
        registers.score(queries, k, team.lane);
        if (Tile::kInt8Pages && tile * Tile::kKeys < keys.history) registers.multiply(scales, team.lane);
        if (named != Tile::kAllKeys) registers.mask(named, team.lane);
        registers.raise_shift(scale_log2);
        registers.exponentiate(scale_log2);
        if (Tile::kInt8Pages && tile * Tile::kKeys < keys.history) registers.multiply(scales + Tile::kScaleBytes, team.lane);
        registers.accumulate(v, team.lane);
    }

    registers.normalise();
    store_lse(args, work, registers, work.first_row + warp_row, team.lane, scale_log2);
    if (args.plan.splits > 1) {
        store_partial(args, work, registers, work.first_row + warp_row, team.lane);
    } else {
        store_out(args, work, registers, queries, work.first_row + warp_row, team.lane);
    }
}

template <class Tile>
__global__ void __launch_bounds__(kMaxWarps* kWarpLanes, Tile::kBlocksPerMultiprocessor)
    attn_kernel(const __grid_constant__ AttnArgs args) {
    const int warp = threadIdx.x / kWarpLanes, warps = args.plan.warps;
    const Team team{
        warp / warps,
        warp % warps,
        warps,
        static_cast<int>(threadIdx.x) % kWarpLanes,
        dynamic_shared() + warp / warps * args.team_bytes,
    };
    const int item = blockIdx.x * args.plan.teams + team.index;
    if (item >= args.items) return;
    attend<Tile>(args, work_of<Tile>(args, team, item), team);
}

}  // namespace amskv
