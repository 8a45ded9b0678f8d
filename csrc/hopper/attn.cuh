// Attention over paged history and the current scale for sm_90a: TMA, wgmma, a persistent grid.
//
// A block has three warpgroups and takes tiles of query rows, one after another. The first is the producer: it loads
// tiles of K and V into a pipeline of stages in shared memory, and stores from there what later steps read. The other
// two are consumers, 64 query rows each: while one takes exponentials, the other multiplies.
#pragma once

#include <cmath>

#include "common/softmax.cuh"
#include "hopper/pipeline.cuh"
#include "hopper/producer.cuh"

namespace amskv::hopper {

// Named barriers; those of a consumer are followed by the other's.
enum NamedBarrier { kBlockBarrier = 0, kConsumerBarrier = 1, kSchedulerBarrier = 3, kBothBarrier = 5 };

// A warpgroup that computes.
struct Consumer {
    int index, warp, lane;
    bool shares_rows;  // with the other, each taking every second tile of keys

    // Which 64 rows of the tile are this consumer's.
    __device__ __forceinline__ int rows() const { return shares_rows ? 0 : index; }
    __device__ __forceinline__ int thread() const { return warp * kWarpLanes + lane; }
    __device__ __forceinline__ void barrier() const { named_barrier(kConsumerBarrier + index, kWarpgroupThreads); }
    __device__ __forceinline__ void barrier_of_both() const {
        named_barrier(kBothBarrier, kConsumers * kWarpgroupThreads);
    }
    // The consumers issue their products one after the other, so that the other's run under this one's exponentials.
    __device__ __forceinline__ void scheduler_wait() const {
        named_barrier(kSchedulerBarrier + index, kConsumers * kWarpgroupThreads);
    }
    __device__ __forceinline__ void scheduler_arrive() const {
        named_barrier_arrive(kSchedulerBarrier + 1 - index, kConsumers * kWarpgroupThreads);
    }
};

// The registers of a consumer's thread. Of each 64 × 8 block it holds columns 2 (lane % 4) and the next of rows
// 16 warp + lane / 4 (elements 0, 1) and 8 further (elements 2, 3).
template <class Tile>
struct Registers {
    static constexpr int kSteps = Tile::kKeys / kMmaRows;

    float scores[Tile::kKeys / 2];  // then their exponentials
    uint32_t probabilities[kSteps][4];
    float out[Tile::kHeadDim / 2];
    float row_max[2];  // the largest score
    float row_shift[2];  // what the exponents are measured from; at the end the log-sum-exp
    float row_sum[2];  // this thread's columns only, until the end

    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int i = 0; i < Tile::kHeadDim / 2; ++i) out[i] = 0;
        row_max[0] = row_max[1] = kNoScore;
        row_shift[0] = row_shift[1] = kNoShift;
        row_sum[0] = row_sum[1] = 0;
    }

    // scores = Q Kᵀ for the first kCount · 2 keys of the tile, under way
    template <int kCount>
    __device__ __forceinline__ void issue_scores(SharedAddress query, SharedAddress k) {
        const uint64_t left = operand(query), right = operand(k);
#pragma unroll
        for (int step = 0; step < Tile::kHeadDim / kMmaRows; ++step) {
            constexpr int kPerPanel = kSwizzleElements / kMmaRows;
            const int panel = step / kPerPanel, column = step % kPerPanel * kMmaRows * kElementBytes;
            wgmma_scores<typename Tile::Element>(
                reinterpret_cast<float (&)[kCount]>(scores),
                advance(left, panel * kWarpgroupRows * kSwizzleBytes + column),
                advance(right, panel * Tile::kKeys * kSwizzleBytes + column), step > 0);
        }
        wgmma_commit();
    }

    // out += P V, under way. A half tile has rows 0 … 63 of V alone: they stand for the others too, whose probabilities
    // are 0. A branch instead would make ptxas wait for these products at once.
    __device__ __forceinline__ void issue_out(SharedAddress v, bool half) {
        constexpr int kHalf = kSteps / 2 * kMmaRows * kSwizzleBytes;
        const uint64_t lower = operand(v, Tile::kKeys * kSwizzleBytes), upper = half ? lower : advance(lower, kHalf);
#pragma unroll
        for (int step = 0; step < kSteps; ++step) {
            const uint64_t right = step < kSteps / 2 ? lower : upper;
            wgmma_out<typename Tile::Element>(
                out, probabilities[step], advance(right, step % (kSteps / 2) * kMmaRows * kSwizzleBytes));
        }
        wgmma_commit();
    }

    // Scores of keys that are not there become −∞; most tiles have all.
    template <int kCount>
    __device__ __forceinline__ void mask(const Chunk& named, int lane) {
        const uint32_t second_half = kCount < Tile::kKeys / 2 ? ~0u : named.word[2] & named.word[3];
        if ((named.word[0] & named.word[1] & second_half) == ~0u) return;
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
            const int key = i / 4 * kMmaColumns + i % 2;  // and 2 (lane % 4)
            const bool there = named.word[key / kWarpLanes] >> 2 * (lane % 4) >> key % kWarpLanes & 1;
            scores[i] = there ? scores[i] : -INFINITY;
        }
    }

    // Takes the tile into the row maxima and its exponentials into the sums; returns in `shrink` the factor of what was
    // summed under the old maxima.
    template <int kCount>
    __device__ __forceinline__ void exponentiate(float (&shrink)[2], float scale_log2) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float top = row_max[half];
#pragma unroll
            for (int i = 0; i < kCount / 2; ++i) top = fmaxf(top, scores[i / 2 * 4 + 2 * half + i % 2]);
            top = fmaxf(top, shuffle_xor(top, 1));
            top = fmaxf(top, shuffle_xor(top, 2));
            // As shift_of has it, but with one comparison for both.
            const float scale = scale_of(top * scale_log2, scale_log2), shift = top * scale;
            shrink[half] = exp2_fast(row_shift[half] - shift);
            row_max[half] = top;
            row_shift[half] = shift;
            float sum = row_sum[half] * shrink[half];
#pragma unroll
            for (int i = 0; i < kCount / 2; ++i) {
                float& score = scores[i / 2 * 4 + 2 * half + i % 2];
                score = exp2_fast(score * scale - shift);
                sum += score;
            }
            row_sum[half] = sum;
        }
    }

    // The output on the scale of the new maxima. Few tiles of a long row raise one, so most warps have nothing to do.
    __device__ __forceinline__ void rescale(const float (&shrink)[2]) {
        if (ballot(shrink[0] != 1 || shrink[1] != 1) == 0) return;
#pragma unroll
        for (int i = 0; i < Tile::kHeadDim / 2; ++i) out[i] *= shrink[i / 2 % 2];
    }

    template <int kCount>
    __device__ __forceinline__ void round_probabilities() {
#pragma unroll
        for (int i = 0; i < kCount / 2; ++i) {
            probabilities[i / 4][i % 4] = pack<typename Tile::Element>(scores[2 * i], scores[2 * i + 1]);
        }
#pragma unroll
        for (int i = kCount / 2; i < kSteps * 4; ++i) probabilities[i / 4][i % 4] = 0;
    }

    // Leaves this consumer's part of the rows for the same thread of the other.
    __device__ __forceinline__ void hand_over(SharedAddress sums, SharedAddress stats, int thread) const {
#pragma unroll
        for (int i = 0; i < Tile::kHeadDim / 2; ++i)
            store_shared_4(sums + (i * kWarpgroupThreads + thread) * 4, bits_of(out[i]));
        store_shared_16(stats + thread * 16,
                        {bits_of(row_shift[0]), bits_of(row_shift[1]), bits_of(row_sum[0]), bits_of(row_sum[1])});
    }

    // Adds what the other consumer left.
    __device__ __forceinline__ void take_over(SharedAddress sums, SharedAddress stats, int thread) {
        const Chunk other = load_shared_16(stats + thread * 16);
        float mine[2], theirs[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const float other_shift = float_of(other.word[half]), shift = fmaxf(row_shift[half], other_shift);
            mine[half] = exp2_fast(row_shift[half] - shift);
            theirs[half] = exp2_fast(other_shift - shift);
            row_sum[half] = row_sum[half] * mine[half] + float_of(other.word[2 + half]) * theirs[half];
            row_shift[half] = shift;
        }
#pragma unroll
        for (int i = 0; i < Tile::kHeadDim / 2; ++i) {
            const float part = float_of(load_shared_4(sums + (i * kWarpgroupThreads + thread) * 4));
            out[i] = out[i] * mine[i / 2 % 2] + part * theirs[i / 2 % 2];
        }
    }

    // out becomes the mean and row_shift the log-sum-exp, natural.
    __device__ __forceinline__ void normalise(float scale_log2) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float sum = row_sum[half];
            sum += shuffle_xor(sum, 1);
            sum += shuffle_xor(sum, 2);
            const float inverse = sum == 0 ? 0 : reciprocal(sum);
            row_shift[half] = log2_sum(row_shift[half], sum, scale_log2) * kLn2;
#pragma unroll
            for (int i = 0; i < Tile::kHeadDim / 4; ++i) out[i / 2 * 4 + 2 * half + i % 2] *= inverse;
        }
    }
};

// The first tile of keys of an item: its scores, and their exponentials. kCount scores per thread.
template <int kCount, class Tile>
__device__ __forceinline__ void begin(
    const PipelineState& k, const Pipeline<Tile>& pipeline, const Consumer& me, Registers<Tile>& registers,
    float scale_log2) {
    float shrink[2];  // of nothing
    pipeline.wait_full(kKeys, k);
    wgmma_fence();
    registers.template issue_scores<kCount>(pipeline.query(me.rows()), pipeline.tile(kKeys, k));
    const Chunk named = load_shared_16(pipeline.mask(k));
    wgmma_wait<0>();
    settle(registers.scores);
    pipeline.release(kKeys, k, me.lane);
    registers.template mask<kCount>(named, me.lane);
    registers.template exponentiate<kCount>(shrink, scale_log2);
    registers.template round_probabilities<kCount>();
}

// A consumer's `tiles` of keys of one item: the products of a tile's V and of the next tile's K are issued together, and
// the next tile's exponentials are taken while the former still run. The first tile may be a half one. The queries are
// released with the last scores, so that the next item's come under the rest of this one.
template <class Tile>
__device__ __forceinline__ void attend(
    PipelineState& state, int tiles, bool half, const Pipeline<Tile>& pipeline, const Consumer& me,
    Registers<Tile>& registers, float scale_log2) {
    constexpr int kCount = Tile::kKeys / 2;
    registers.clear();
    if (tiles > 0 && half) begin<kCount / 2>(state, pipeline, me, registers, scale_log2);
    if (tiles > 0 && !half) begin<kCount>(state, pipeline, me, registers, scale_log2);
    for (int tile = 1; tile < tiles; ++tile) {
        const PipelineState v = state, k = state.next();
        float shrink[2];
        if (tile == 1) pipeline.wait_full(kKeys, k);
        pipeline.wait_full(kValues, v);
        if (!me.shares_rows) me.scheduler_wait();
        wgmma_fence();
        registers.template issue_scores<kCount>(pipeline.query(me.rows()), pipeline.tile(kKeys, k));
        registers.issue_out(pipeline.tile(kValues, v), half && tile == 1);
        if (!me.shares_rows) me.scheduler_arrive();
        const Chunk named = load_shared_16(pipeline.mask(k));
        wgmma_wait<1>();
        settle(registers.scores);
        pipeline.release(kKeys, k, me.lane);
        if (tile + 1 == tiles) pipeline.release_query(me.lane);
        registers.template mask<kCount>(named, me.lane);
        registers.template exponentiate<kCount>(shrink, scale_log2);
        settle(registers.scores);
        // The next wait for K comes here, because ptxas keeps to branches alone: without one, it would put the
        // exponentials off until the products below are done.
        if (tile + 1 < tiles) pipeline.wait_full(kKeys, k.next());
        wgmma_wait<0>();
        settle(registers.out);
        pipeline.release(kValues, v, me.lane);
        registers.rescale(shrink);
        registers.template round_probabilities<kCount>();
        state = k;
    }
    if (tiles < 2) pipeline.release_query(me.lane);
    if (tiles > 0) {
        pipeline.wait_full(kValues, state);
        wgmma_fence();
        registers.issue_out(pipeline.tile(kValues, state), half && tiles == 1);
        wgmma_wait<0>();
        settle(registers.out);
        pipeline.release(kValues, state, me.lane);
        state = state.next();
    }
}

// A consumer's 64 rows of the output and their lse; rows past the last are clipped by the copy engine.
template <class Tile>
__device__ __forceinline__ void store_out(
    const Args& args, const Item& item, const Pipeline<Tile>& pipeline, const Consumer& me, Registers<Tile>& registers,
    float scale_log2) {
    const AttnParams& p = args.params;
    const int first_row = item.first_row + me.rows() * kWarpgroupRows;
    registers.normalise(scale_log2);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int row = first_row + me.warp * kMmaRows + half * 8 + me.lane / 4;
        float* const lse = p.lse + (int64_t{item.batch} * p.heads + item.head) * p.tokens;
        if (row < p.tokens && me.lane % 4 == 0) lse[row] = registers.row_shift[half];
    }
    const SharedAddress staged = pipeline.out(me.index);
#pragma unroll
    for (int i = 0; i < Tile::kHeadDim / 4; ++i) {
        const int row = me.warp * kMmaRows + i % 2 * 8 + me.lane / 4, block = i / 2;
        const int panel = block / 8, chunk = block % 8 ^ row % 8;
        store_shared_4(staged + (panel * kWarpgroupRows + row) * kSwizzleBytes + chunk * kChunkBytes + me.lane % 4 * 4,
                       pack<typename Tile::Element>(registers.out[2 * i], registers.out[2 * i + 1]));
    }
    fence_async_proxy();
    me.barrier();
    if (me.thread() == 0) {
        for (int panel = 0; panel < Tile::kPanels; ++panel) {
            const Box box{panel * kSwizzleElements, first_row, item.head, item.batch};
            tma_store(args.out, box, staged + panel * kWarpgroupRows * kSwizzleBytes);
        }
        tma_store_commit();
    }
}

template <class Tile>
__device__ __forceinline__ void compute(const Args& args, const Pipeline<Tile>& pipeline, const Consumer& me) {
    const float scale_log2 = args.params.softmax_scale * kLog2E;
    Registers<Tile> registers;
    if (me.index == 1 && !me.shares_rows) me.scheduler_arrive();
    PipelineState state = PipelineState::begin<Tile>(me.shares_rows, me.index);
    const int tiles = me.shares_rows ? (args.key_tiles + 1 - me.index) / 2 : args.key_tiles;
    const bool half = args.first_keys < Tile::kKeys && (me.index == 0 || !me.shares_rows);
    int round = 0;
    for (int index = blockIdx.x; index < args.items; index += args.blocks, ++round) {
        const Item item(args, index);
        mbarrier_wait(pipeline.query_full(), round & 1);
        attend(state, tiles, half, pipeline, me, registers, scale_log2);
        if (me.thread() == 0) tma_store_wait_read();  // the item before: its output has left shared memory
        if (me.shares_rows) {
            const SharedAddress sums = pipeline.out(0), stats = pipeline.shared + Tile::kStats;
            me.barrier_of_both();
            if (me.index == 1) registers.hand_over(sums, stats, me.thread());
            me.barrier_of_both();
            if (me.index == 1) continue;
            registers.take_over(sums, stats, me.thread());
        }
        me.barrier();
        store_out(args, item, pipeline, me, registers, scale_log2);
    }
    if (me.thread() == 0) tma_store_wait_read();
    if (me.index == 0 && !me.shares_rows) me.scheduler_wait();  // for the last one's arrival, that no barrier is left open
}

template <class Tile>
__global__ void __launch_bounds__(kHopperThreads, 1) attn_kernel(const __grid_constant__ Args args) {
    const Pipeline<Tile> pipeline{dynamic_shared()};
    const int warp = shuffle_from(threadIdx.x / kWarpLanes, 0);  // so that the compiler knows it uniform
    const int lane = threadIdx.x % kWarpLanes;
    if (threadIdx.x == 0) pipeline.init(args);
    named_barrier(kBlockBarrier, kHopperThreads);
    if (warp >= kWarpgroupWarps) {
        take_registers<kConsumerRegisters>();
        const int consumer = warp / kWarpgroupWarps - 1;
        compute(args, pipeline, Consumer{consumer, warp % kWarpgroupWarps, lane, args.shares_rows});
    } else {
        release_registers<kProducerRegisters>();
        produce(args, pipeline, warp, lane);
    }
}

}  // namespace amskv::hopper
