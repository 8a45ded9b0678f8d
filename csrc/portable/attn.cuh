// Attention over paged history and the current scale for sm_80 and later: cp.async, ldmatrix, mma.sync.
//
// A team of warps holds one tile of query rows in registers and streams tiles of keys and values through a ring in
// shared memory. Query rows of all heads that share a KV head count as rows of one matrix, token by token. Keys are
// numbered through: `page_size` per slot of the history, whether filled or not, then the rows of the current scale.
#pragma once

#include <cmath>

#include "amskv/amskv.h"
#include "common/device.cuh"
#include "common/softmax.cuh"
#include "common/store.cuh"
#include "common/tiles.h"

namespace amskv {

struct AttnArgs {
    AttnParams params;
    AttnPlan plan;
    int page_shift;  // log2(page_size)
    int row_tiles;   // of one sequence and KV head
    int key_tiles;
    int items;  // row_tiles · splits · kv_heads · batch
    int team_bytes;
    int k_step, v_step;  // bytes from one token to the next
    int group;           // query heads of a KV head
    float* partial_out;  // (splits, B, n, H, D), where splits > 1
    float* partial_sums;  // (splits, 2, B, H, n): what a part is measured from, and its sum
};

// The warps that work on one tile of query rows. Barrier 0 is the whole block's.
struct Team {
    int index, warp, warps, lane;
    SharedAddress shared;

    __device__ __forceinline__ int thread() const { return warp * kWarpLanes + lane; }
    __device__ __forceinline__ int threads() const { return warps * kWarpLanes; }
    __device__ __forceinline__ void barrier() const { named_barrier(index + 1, threads()); }
};

// What a team computes: query rows from `first_row` on, over key tiles [first_key_tile, first_key_tile + key_tiles).
struct Work {
    int batch, kv_head, row_tile, split, first_row, first_key_tile, key_tiles;
};

template <class Tile>
__device__ __forceinline__ Work work_of(const AttnArgs& args, const Team& team, int item) {
    Work work;
    work.row_tile = item % args.row_tiles;  // fastest: neighbours read the same keys
    item /= args.row_tiles;
    work.split = item % args.plan.splits;
    item /= args.plan.splits;
    work.kv_head = item % args.params.kv_heads;
    work.batch = item / args.params.kv_heads;
    work.first_row = work.row_tile * team.warps * Tile::kRowsPerWarp;
    const int share = (args.key_tiles + args.plan.splits - 1) / args.plan.splits;
    work.first_key_tile = work.split * share;
    const int left = args.key_tiles - work.first_key_tile;
    work.key_tiles = left < share ? left : share;
    return work;
}

// Where the keys of one sequence and head lie. The pointers are at the chunk that this thread copies of every row.
template <class Tile>
struct Keys {
    using Layout = Swizzled<Tile::kHeadDim>;
    using Bytes = const unsigned char*;

    Bytes arena, k, v;
    const int32_t* slots;
    int k_step, v_step, page_shift, history, tokens;

    struct Row {
        Bytes k, v;
        bool named;
    };

    __device__ __forceinline__ Keys(const AttnArgs& args, const Work& work, int chunk)
        : slots(slots_of(args.params.read, work.batch, work.kv_head)),
          k_step(args.k_step),
          v_step(args.v_step),
          page_shift(args.page_shift),
          history(args.params.read.count << args.page_shift),
          tokens(args.params.tokens) {
        const int64_t page = args.params.pool.arena[work.batch * args.params.kv_heads + work.kv_head];
        arena = static_cast<Bytes>(args.params.pool.pages) + page * page_bytes() + chunk * kChunkBytes;
        k = reinterpret_cast<Bytes>(row_of(args.params.k, work.batch, work.kv_head)) + chunk * kChunkBytes;
        v = reinterpret_cast<Bytes>(row_of(args.params.v, work.batch, work.kv_head)) + chunk * kChunkBytes;
    }

    __device__ __forceinline__ int page_bytes() const { return (2 * Layout::kRowBytes) << page_shift; }
    __device__ __forceinline__ int row_in_page(int key) const { return key & ((1 << page_shift) - 1); }

    __device__ __forceinline__ bool named(int key) const {
        if (key >= history) return key - history < tokens;
        return row_in_page(key) < (slots[key >> page_shift] & kRowsMask);
    }

    __device__ __forceinline__ Row row(int key) const {
        if (key >= history) {
            const int token = key - history;
            return {k + int64_t{token} * k_step, v + int64_t{token} * v_step, token < tokens};
        }
        const int slot = slots[key >> page_shift], row = row_in_page(key), page = slot >> kRowsBits;
        const Bytes at = arena + int64_t{page} * page_bytes() + row * Layout::kRowBytes;
        return {at, at + page_bytes() / 2, row < (slot & kRowsMask)};
    }
};

// Query row r of a KV head's group: token r / group, head r % group.
struct QueryRow {
    int token, head;
    bool real;

    __device__ __forceinline__ QueryRow(const AttnArgs& args, int kv_head, int row) {
        token = args.group == 1 ? row : row / args.group;  // most models have no groups: spare them the division
        head = kv_head * args.group + row - token * args.group;
        real = token < args.params.tokens;
    }
};

// Fetches the team's query rows; rows past the last become zero.
template <class Tile>
__device__ __forceinline__ void load_queries(const AttnArgs& args, const Work& work, const Team& team) {
    const AttnParams& p = args.params;
    using Layout = Swizzled<Tile::kHeadDim>;
    const uint16_t* const q = row_of(p.q, work.batch, 0);
    const int chunks = team.warps * Tile::kRowsPerWarp * Layout::kChunks;
    for (int i = team.thread(); i < chunks; i += team.threads()) {
        const int row = i / Layout::kChunks, chunk = i % Layout::kChunks;
        const QueryRow at(args, work.kv_head, work.first_row + row);
        const uint16_t* const from = q + at.token * p.q.token_stride + at.head * p.q.head_stride;
        cp_async_16(team.shared + Layout::offset(row, chunk), from + chunk * kChunkElements, at.real);
    }
}

// Fetches a tile of keys and values; rows that no slot names become zero, because 0 · NaN is not. As many threads
// share a row as chunks of it change places, so that the other chunks lie at fixed distances.
template <class Tile>
__device__ __forceinline__ void load_keys(const Keys<Tile>& keys, int tile, SharedAddress stage, const Team& team) {
    using Layout = Swizzled<Tile::kHeadDim>;
    const int chunk = team.thread() % Layout::kPermuted, rows = team.threads() / Layout::kPermuted;
#pragma unroll 2
    for (int row = team.thread() / Layout::kPermuted; row < Tile::kKeys; row += rows) {
        const auto from = keys.row(tile * Tile::kKeys + row);
        const SharedAddress to = stage + Layout::offset(row, chunk);
#pragma unroll
        for (int i = 0; i < Layout::kRowBytes; i += Layout::kPermuted * kChunkBytes) {
            cp_async_16(to + i, from.k + i, from.named);
            cp_async_16(to + i + Tile::kKeyBytes, from.v + i, from.named);
        }
    }
}

// Bit i: whether key i of the tile is there. The same in all lanes.
template <class Tile>
__device__ __forceinline__ uint64_t named_keys(const Keys<Tile>& keys, int tile, int lane) {
    const int first = tile * Tile::kKeys;
    if (first >= keys.history) {
        const int left = keys.history + keys.tokens - first;
        return left >= Tile::kKeys ? Tile::kAllKeys : (uint64_t{1} << left) - 1;
    }
    uint64_t mask = 0;
#pragma unroll
    for (int part = 0; part < Tile::kKeys; part += kWarpLanes) {
        mask |= static_cast<uint64_t>(ballot(keys.named(first + part + lane))) << part;
    }
    return mask;
}

// 16 query rows × 16 elements as the left operand of a product.
template <class Tile>
__device__ __forceinline__ void load_query_fragment(
    uint32_t (&fragment)[4], SharedAddress queries, int row_block, int step, int lane) {
    using Layout = Swizzled<Tile::kHeadDim>;
    const SharedAddress first = queries + Layout::offset(lane % 16, lane / 16);
    ldmatrix_x4(fragment, Layout::advance(first, 2 * step) + row_block * kMmaRows * Layout::kRowBytes);
}

// The registers of one warp. A thread holds, of each 16 × 8 block, columns 2 (lane % 4) and the next of rows lane / 4
// (elements 0, 1) and lane / 4 + 8 (elements 2, 3).
template <class Tile>
struct Registers {
    using Layout = Swizzled<Tile::kHeadDim>;
    static constexpr int kSteps = Tile::kHeadDim / kMmaRows;
    static constexpr int kKeyBlocks = Tile::kKeys / kMmaColumns;
    static constexpr int kOutBlocks = Tile::kHeadDim / kMmaColumns;

    uint32_t q[Tile::kQueryInRegisters ? Tile::kRowBlocks : 1][Tile::kQueryInRegisters ? kSteps : 1][4];
    float scores[Tile::kRowBlocks][kKeyBlocks][4];  // then the probabilities, not yet normalised
    float out[Tile::kRowBlocks][kOutBlocks][4];
    float row_shift[Tile::kRowBlocks][2];  // what the exponents are measured from
    float row_sum[Tile::kRowBlocks][2];  // this thread's columns only, until the end

    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int r = 0; r < Tile::kRowBlocks; ++r) {
#pragma unroll
            for (int i = 0; i < kOutBlocks * 4; ++i) out[r][i / 4][i % 4] = 0;
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                row_shift[r][half] = kNoShift;
                row_sum[r][half] = 0;
            }
        }
    }

    __device__ __forceinline__ void load_query(SharedAddress queries, int lane) {
        if constexpr (Tile::kQueryInRegisters) {
#pragma unroll
            for (int r = 0; r < Tile::kRowBlocks; ++r)
#pragma unroll
                for (int step = 0; step < kSteps; ++step) load_query_fragment<Tile>(q[r][step], queries, r, step, lane);
        }
    }

    // scores = Q Kᵀ
    __device__ __forceinline__ void score(SharedAddress queries, SharedAddress k, int lane) {
#pragma unroll
        for (int i = 0; i < Tile::kRowBlocks * kKeyBlocks * 4; ++i) {
            scores[i / (kKeyBlocks * 4)][i / 4 % kKeyBlocks][i % 4] = 0;
        }
        k += Layout::offset(lane / 16 * 8 + lane % 8, lane / 8 % 2);
#pragma unroll
        for (int step = 0; step < kSteps; ++step) {
            uint32_t left[Tile::kRowBlocks][4];
#pragma unroll
            for (int r = 0; r < Tile::kRowBlocks; ++r) {
                if constexpr (Tile::kQueryInRegisters) {
#pragma unroll
                    for (int i = 0; i < 4; ++i) left[r][i] = q[r][step][i];
                } else {
                    load_query_fragment<Tile>(left[r], queries, r, step, lane);
                }
            }
#pragma unroll
            for (int block = 0; block < kKeyBlocks; block += 2) {
                uint32_t right[4];
                ldmatrix_x4(right, Layout::advance(k, 2 * step) + block * kMmaColumns * Layout::kRowBytes);
#pragma unroll
                for (int r = 0; r < Tile::kRowBlocks; ++r) {
                    mma_m16n8k16<typename Tile::Element>(scores[r][block], left[r], right[0], right[1]);
                    mma_m16n8k16<typename Tile::Element>(scores[r][block + 1], left[r], right[2], right[3]);
                }
            }
        }
    }

    // Scores of keys that are not there become −∞.
    __device__ __forceinline__ void mask(uint64_t named, int lane) {
        named >>= 2 * (lane % 4);
#pragma unroll
        for (int i = 0; i < Tile::kRowBlocks * kKeyBlocks * 4; ++i) {
            const int block = i / 4 % kKeyBlocks;
            const bool there = named >> (block * kMmaColumns + i % 2) & 1;
            float& score = scores[i / (kKeyBlocks * 4)][block][i % 4];
            score = there ? score : -INFINITY;
        }
    }

    // Takes the tile into the row maxima, and scales what was summed under the old ones. Few tiles of a long row raise
    // a maximum, so the scaling is skipped where none of the warp's rows needs it.
    __device__ __forceinline__ void raise_shift(float scale_log2) {
        float shift[Tile::kRowBlocks][2];
        bool raised = false;
#pragma unroll
        for (int r = 0; r < Tile::kRowBlocks; ++r)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                float top = -INFINITY;
#pragma unroll
                for (int i = 0; i < kKeyBlocks * 2; ++i) top = fmaxf(top, scores[r][i / 2][2 * half + i % 2]);
                top = fmaxf(top, shuffle_xor(top, 1));
                top = fmaxf(top, shuffle_xor(top, 2));
                shift[r][half] = fmaxf(row_shift[r][half], shift_of(top, scale_log2));
                raised |= shift[r][half] != row_shift[r][half];
            }
        if (ballot(raised) == 0) return;
#pragma unroll
        for (int r = 0; r < Tile::kRowBlocks; ++r)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const float shrink = exp2_fast(row_shift[r][half] - shift[r][half]);
                row_shift[r][half] = shift[r][half];
                row_sum[r][half] *= shrink;
#pragma unroll
                for (int i = 0; i < kOutBlocks * 2; ++i) out[r][i / 2][2 * half + i % 2] *= shrink;
            }
    }

    // scores → exp2(scale · (score − row maximum))
    __device__ __forceinline__ void exponentiate(float scale_log2) {
#pragma unroll
        for (int r = 0; r < Tile::kRowBlocks; ++r)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const float shift = row_shift[r][half], scale = scale_of(shift, scale_log2);
#pragma unroll
                for (int i = 0; i < kKeyBlocks * 2; ++i) {
                    float& score = scores[r][i / 2][2 * half + i % 2];
                    score = exp2_fast(score * scale - shift);
                    row_sum[r][half] += score;
                }
            }
    }

    // out += P V
    __device__ __forceinline__ void accumulate(SharedAddress v, int lane) {
        v += Layout::offset(lane % 16, lane / 16);
#pragma unroll
        for (int block = 0; block < kKeyBlocks; block += 2) {
            uint32_t left[Tile::kRowBlocks][4];
#pragma unroll
            for (int r = 0; r < Tile::kRowBlocks; ++r)
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const float* const pair = &scores[r][block + i / 2][i % 2 * 2];
                    left[r][i] = pack<typename Tile::Element>(pair[0], pair[1]);
                }
#pragma unroll
            for (int column = 0; column < kOutBlocks; column += 2) {
                uint32_t right[4];
                ldmatrix_x4_trans(right, Layout::advance(v, column) + block * kMmaColumns * Layout::kRowBytes);
#pragma unroll
                for (int r = 0; r < Tile::kRowBlocks; ++r) {
                    mma_m16n8k16<typename Tile::Element>(out[r][column], left[r], right[0], right[1]);
                    mma_m16n8k16<typename Tile::Element>(out[r][column + 1], left[r], right[2], right[3]);
                }
            }
        }
    }

    // out becomes the mean, 0 where there was no key, and row_sum the whole row's.
    __device__ __forceinline__ void normalise() {
#pragma unroll
        for (int r = 0; r < Tile::kRowBlocks; ++r)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                float& sum = row_sum[r][half];
                sum += shuffle_xor(sum, 1);
                sum += shuffle_xor(sum, 2);
                const float inverse = sum == 0 ? 0 : 1 / sum;
#pragma unroll
                for (int i = 0; i < kOutBlocks * 2; ++i) out[r][i / 2][2 * half + i % 2] *= inverse;
            }
    }
};

// Of the warp's rows: lse to the caller, shift and sum to the merge, which loses nothing of large logits.
template <class Tile>
__device__ __forceinline__ void store_lse(
    const AttnArgs& args, const Work& work, const Registers<Tile>& registers, int first_row, int lane,
    float scale_log2) {
    const AttnParams& p = args.params;
    const bool final = args.plan.splits == 1;
    const int64_t rows = int64_t{p.batch} * p.heads * p.tokens;
    float* const to = final ? p.lse : args.partial_sums + 2 * work.split * rows;
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
        const int64_t sequence = int64_t{work.split} * p.batch + work.batch;
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
    const Keys<Tile> keys(args, work, team.thread() % Swizzled<Tile::kHeadDim>::kPermuted);
    const int warp_row = team.warp * Tile::kRowsPerWarp;
    const SharedAddress queries = team.shared + warp_row * Swizzled<Tile::kHeadDim>::kRowBytes;
    const SharedAddress ring = team.shared + Tile::query_bytes(team.warps);
    const auto fetch = [&](int tile) {
        if (tile < work.key_tiles) {
            load_keys<Tile>(keys, work.first_key_tile + tile, ring + tile % Tile::kStages * Tile::kStageBytes, team);
        }
        cp_async_commit();
    };
    load_queries<Tile>(args, work, team);
    for (int tile = 0; tile < Tile::kStages - 1; ++tile) fetch(tile);
    if (args.params.write.count > 0) {  // while the first tiles are on their way
        const int worker = (work.split * args.row_tiles + work.row_tile) * team.warps + team.warp;
        const int workers = args.plan.splits * args.row_tiles * team.warps;
        store_rows<Tile::kHeadDim>(args.params, work.batch, work.kv_head, worker, workers, team.lane);
    }

    Registers<Tile> registers;
    registers.clear();
    const float scale_log2 = args.params.softmax_scale * kLog2E;
    for (int tile = 0; tile < work.key_tiles; ++tile) {
        cp_async_wait<Tile::kStages - 2>();
        team.barrier();  // this tile is there for all, and all are done with the one before
        fetch(tile + Tile::kStages - 1);
        if (tile == 0) registers.load_query(queries, team.lane);
        const uint64_t named = named_keys<Tile>(keys, work.first_key_tile + tile, team.lane);
        if (named == 0) continue;
        const SharedAddress k = ring + tile % Tile::kStages * Tile::kStageBytes;
        registers.score(queries, k, team.lane);
        if (named != Tile::kAllKeys) registers.mask(named, team.lane);
        registers.raise_shift(scale_log2);
        registers.exponentiate(scale_log2);
        registers.accumulate(k + Tile::kKeyBytes, team.lane);
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
