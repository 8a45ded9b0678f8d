// Attention over paged history and the current scale for sm_90a: TMA, wgmma, a persistent grid.
//
// A block has three warpgroups and takes tiles of query rows, one after another. The first warpgroup moves: its warp 0
// fetches tiles of K and V into a ring in shared memory, its warp 1 stores from that ring what later steps read. The
// other two compute, 64 query rows each: while one takes exponentials, the other multiplies. Keys are numbered through
// in boxes of `page_size` rows, one bulk copy each: the slots of the history, then the current scale.
#pragma once

#include <cmath>

#include "amskv/amskv.h"
#include "hopper.cuh"
#include "store.cuh"
#include "tiles.h"

namespace amskv::hopper {

struct Args {
    TensorMap q, k, v, pages, out;  // the first two of a kind of box each: 64 rows of q and out, a page of the others
    AttnParams params;
    int page_shift;  // log2(page_size)
    int row_tiles;   // of one sequence and head
    int key_tiles;
    int items;   // row_tiles · heads · batch
    int blocks;  // of the grid
    int group;   // query heads of a KV head
    int stride;  // from one tile of keys of a consumer to its next; 2: the consumers share their rows
    int slot_bits;  // log2 of the slots that a consumer goes through
};

// Named barriers; those of a consumer are followed by the other's.
enum NamedBarrier { kBlockBarrier = 0, kGroupBarrier = 1, kTurnBarrier = 3, kBothBarrier = 5 };

// A tile of query rows of one head. Tiles of a head, and heads of a KV head, are neighbours: they read the same keys
// at the same time, so L2 serves all but the first.
struct Item {
    int batch, head, kv_head, row_tile, first_row;

    __device__ __forceinline__ Item(const Args& args, int index) {
        row_tile = index % args.row_tiles;
        index /= args.row_tiles;
        head = index % args.params.heads;
        batch = index / args.params.heads;
        kv_head = args.group == 1 ? head : head / args.group;
        first_row = row_tile * (args.stride == 1 ? kConsumers * kWarpgroupRows : kWarpgroupRows);
    }
};

// A slot of the ring, and the parity of the rounds it has been through.
struct Spot {
    int slot, parity;
};

// The order in which the tiles of K and V of one item reach a consumer: K₀ K₁ V₀ K₂ V₁ …, since a tile's scores are
// computed before the values of the one before are needed. Consumers that share their rows have half of the ring each:
// a phase is known by its parity alone, so every reader of a slot must see all of its rounds.
struct Order {
    int tiles, first, group, slot_bits;

    __device__ __forceinline__ Order(const Args& args, int round, int ring)
        : tiles((args.key_tiles + args.stride - 1 - ring) / args.stride),
          first(2 * tiles * round),
          group(ring),
          slot_bits(args.slot_bits) {}

    __device__ __forceinline__ Spot k(int tile) const { return spot(tile == 0 ? 0 : 2 * tile - 1); }
    __device__ __forceinline__ Spot v(int tile) const { return spot(tile + 1 < tiles ? 2 * tile + 2 : 2 * tile + 1); }

    __device__ __forceinline__ Spot spot(int step) const {
        const int position = first + step;
        return {group << slot_bits | (position & ((1 << slot_bits) - 1)), position >> slot_bits & 1};
    }
};

// What a step of the movers is about: the consumers' orders, by turns while both have tiles left.
struct Turn {
    int tile, part;  // of the item's tiles of keys; 0: K, 1: V
    Spot spot;

    __device__ __forceinline__ Turn(const Args& args, int round, int step) {
        const int both = args.stride == 1 ? 0 : args.key_tiles / 2 * 4;  // steps
        const int ring = step < both ? step % 2 : 0, own = step < both ? step / 2 : step - both / 2;
        const Order order(args, round, ring);
        part = own > 0 && (own % 2 == 0 || own == 2 * order.tiles - 1);
        tile = (part == 0 ? (own + 1) / 2 : (own - 1) / 2) * args.stride + ring;
        spot = order.spot(own);
    }
};

// Shared memory and its barriers. Every slot is read by the warps of its consumers and by the warp that stores.
template <class Tile>
struct Ring {
    SharedAddress shared;

    __device__ __forceinline__ SharedAddress query(int group) const {
        return shared + Tile::kQuery + group * Tile::kRowBlockBytes;
    }
    __device__ __forceinline__ SharedAddress out(int group) const {
        return shared + Tile::kOut + group * Tile::kRowBlockBytes;
    }
    __device__ __forceinline__ SharedAddress tile(Spot spot) const {
        return shared + Tile::kRing + spot.slot * Tile::kSlotBytes;
    }
    __device__ __forceinline__ SharedAddress mask(Spot spot) const {
        return shared + Tile::kMasks + spot.slot * kChunkBytes;
    }
    __device__ __forceinline__ SharedAddress full(Spot spot) const { return shared + Tile::kBarriers + spot.slot * 8; }
    __device__ __forceinline__ SharedAddress empty(Spot spot) const { return full(spot) + Tile::kSlots * 8; }
    __device__ __forceinline__ SharedAddress query_full() const {
        return shared + Tile::kBarriers + 2 * Tile::kSlots * 8;
    }
    __device__ __forceinline__ SharedAddress query_empty() const { return query_full() + 8; }

    __device__ __forceinline__ void wait_full(Spot spot) const { mbarrier_wait(full(spot), spot.parity); }
    __device__ __forceinline__ void wait_empty(Spot spot) const {
        mbarrier_wait(empty(spot), spot.parity ^ 1);  // the first round finds every slot empty
    }
    // By all lanes of a warp that has read the slot.
    __device__ __forceinline__ void release(Spot spot, int lane) const {
        warp_barrier();
        if (lane == 0) mbarrier_arrive(empty(spot));
    }

    __device__ __forceinline__ void init(const Args& args) const {
        const int readers = (args.stride == 1 ? kConsumers : 1) * kWarpgroupWarps + 1;
        for (int slot = 0; slot < Tile::kSlots; ++slot) {
            mbarrier_init(full({slot, 0}), 1);
            mbarrier_init(empty({slot, 0}), readers);
        }
        mbarrier_init(query_full(), 1);
        mbarrier_init(query_empty(), kConsumers * kWarpgroupWarps);
        mbarrier_init_fence();
    }
};

// One box of keys, a lane's share of a tile.
struct KeyBox {
    int rows;   // that are keys
    bool paged;
    Box box;    // of K in `pages`, else of either in k and v

    __device__ __forceinline__ KeyBox(const Args& args, const Item& item, int index) {
        const AttnParams& p = args.params;
        const int page_size = p.pool.page_size;
        paged = index < p.read.count;
        if (paged) {
            const int slot = slots_of(p.read, item.batch, item.kv_head)[index];
            const int page = p.pool.arena[item.batch * p.kv_heads + item.kv_head] + (slot >> kRowsBits);
            rows = slot & kRowsMask;
            box = {0, rows == 0 ? page_size : 0, 0, page};  // an empty entry: below the page, where all is zero
        } else {
            const int row = (index - p.read.count) << args.page_shift, left = p.tokens - row;
            rows = left < 0 ? 0 : left < page_size ? left : page_size;
            box = {0, row, item.kv_head, item.batch};
        }
    }
};

// Bit i: whether key i of the tile is there, from the rows of the boxes that the first lanes hold.
__device__ __forceinline__ Chunk named_keys(int rows, int page_shift, int lane) {
    Chunk named;
#pragma unroll
    for (int part = 0; part < 4; ++part) {
        const int key = part * kWarpLanes + lane;
        const int of_box = shuffle_from(rows, key >> page_shift);
        named.word[part] = ballot((key & ((1 << page_shift) - 1)) < of_box);
    }
    return named;
}

template <class Tile>
__device__ __forceinline__ void fetch_queries(const Args& args, const Item& item, const Ring<Tile>& ring) {
    const int blocks = args.stride == 1 ? kConsumers : 1;
    mbarrier_expect(ring.query_full(), blocks * Tile::kRowBlockBytes);
    for (int i = 0; i < blocks * Tile::kPanels; ++i) {
        const int block = i / Tile::kPanels, panel = i % Tile::kPanels;
        const Box box{panel * kSwizzleElements, item.first_row + block * kWarpgroupRows, item.head, item.batch};
        tma_load(ring.query(block) + panel * kWarpgroupRows * kSwizzleBytes, args.q, box, ring.query_full());
    }
}

// Warp 0 of the movers: fetches what the consumers need, in their order, as slots become empty.
template <class Tile>
__device__ __forceinline__ void fetch(const Args& args, const Ring<Tile>& ring, int lane) {
    const int boxes = Tile::kKeys >> args.page_shift;
    int round = 0;
    for (int index = blockIdx.x; index < args.items; index += args.blocks, ++round) {
        const Item item(args, index);
        mbarrier_wait(ring.query_empty(), (round & 1) ^ 1);
        if (lane == 0) fetch_queries(args, item, ring);
        for (int step = 0; step < 2 * args.key_tiles; ++step) {
            const auto [tile, part, spot] = Turn(args, round, step);
            KeyBox key_box(args, item, tile * boxes + lane % boxes);  // loads its slot while the wait goes on
            ring.wait_empty(spot);
            if (part == 0) {
                const Chunk named = named_keys(key_box.rows, args.page_shift, lane);
                if (lane == 0) store_shared_16(ring.mask(spot), named);
            }
            if (lane == 0) mbarrier_expect(ring.full(spot), Tile::kSlotBytes);
            warp_barrier();
            if (lane >= boxes) continue;
            if (key_box.paged) key_box.box.third = part;
            const TensorMap& map = key_box.paged ? args.pages : part == 0 ? args.k : args.v;
            const SharedAddress to = ring.tile(spot) + (lane << args.page_shift) * kSwizzleBytes;
            for (int panel = 0; panel < Tile::kPanels; ++panel) {
                key_box.box.column = panel * kSwizzleElements;
                tma_load(to + panel * Tile::kKeys * kSwizzleBytes, map, key_box.box, ring.full(spot));
            }
        }
    }
}

// Whether the write table takes the current scale box by box: full pages in order, then the rest.
__device__ __forceinline__ bool takes_boxes(const Args& args, const int32_t* slots, int lane) {
    const AttnParams& p = args.params;
    bool fits = (p.tokens + p.pool.page_size - 1) >> args.page_shift <= p.write.count;
    for (int i = lane; i < p.write.count; i += kWarpLanes) {
        const int left = p.tokens - (i << args.page_shift);
        const int rows = left < 0 ? 0 : left < p.pool.page_size ? left : p.pool.page_size;
        fits = fits && (slots[i] & kRowsMask) == rows;
    }
    return ballot(fits) == ~0u;
}

// Warp 1 of the movers: stores each box of the current scale once, from the slot that the consumers read. The tiles of
// query rows share the boxes among themselves. Rows that join a page already begun go from global memory.
template <class Tile>
__device__ __forceinline__ void keep(const Args& args, const Ring<Tile>& ring, int lane) {
    const AttnParams& p = args.params;
    const int boxes = Tile::kKeys >> args.page_shift;
    int round = 0;
    for (int index = blockIdx.x; index < args.items; index += args.blocks, ++round) {
        const Item item(args, index);
        const int32_t* const slots = slots_of(p.write, item.batch, item.kv_head);
        const bool stores = p.write.count > 0 && item.head == item.kv_head * args.group;
        const bool boxwise = stores && takes_boxes(args, slots, lane);
        if (stores && !boxwise) {
            store_rows<Tile::kHeadDim, 1>(p, item.batch, item.kv_head, item.row_tile, args.row_tiles, lane);
        }
        for (int step = 0; step < 2 * args.key_tiles; ++step) {
            const auto [tile, part, spot] = Turn(args, round, step);
            const int index_in_scale = tile * boxes + lane - p.read.count;
            ring.wait_full(spot);
            const bool mine = boxwise && lane < boxes && index_in_scale >= 0 &&
                              index_in_scale << args.page_shift < p.tokens &&
                              index_in_scale % args.row_tiles == item.row_tile;
            if (mine) {
                const int page = p.pool.arena[item.batch * p.kv_heads + item.kv_head] +
                                 (slots[index_in_scale] >> kRowsBits);
                const SharedAddress from = ring.tile(spot) + (lane << args.page_shift) * kSwizzleBytes;
                for (int panel = 0; panel < Tile::kPanels; ++panel) {
                    const Box box{panel * kSwizzleElements, 0, part, page};
                    tma_store(args.pages, box, from + panel * Tile::kKeys * kSwizzleBytes);
                }
                tma_store_commit();
                tma_store_wait_read();
            }
            ring.release(spot, lane);
        }
    }
}

// A warpgroup that computes.
struct Consumer {
    int group, warp, lane;
    bool shares_rows;  // with the other, each taking every second tile of keys

    __device__ __forceinline__ int thread() const { return warp * kWarpLanes + lane; }
    __device__ __forceinline__ void barrier() const { named_barrier(kGroupBarrier + group, kWarpgroupThreads); }
    __device__ __forceinline__ void barrier_of_both() const {
        named_barrier(kBothBarrier, kConsumers * kWarpgroupThreads);
    }
    // The consumers issue their products in turns, so that the other's run under this one's exponentials.
    __device__ __forceinline__ void wait_turn() const {
        named_barrier(kTurnBarrier + group, kConsumers * kWarpgroupThreads);
    }
    __device__ __forceinline__ void give_turn() const {
        named_barrier_arrive(kTurnBarrier + 1 - group, kConsumers * kWarpgroupThreads);
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
    float row_max[2];  // of the raw scores
    float row_sum[2];  // this thread's columns only, until the end

    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int i = 0; i < Tile::kHeadDim / 2; ++i) out[i] = 0;
        row_max[0] = row_max[1] = -INFINITY;
        row_sum[0] = row_sum[1] = 0;
    }

    // scores = Q Kᵀ, under way
    __device__ __forceinline__ void issue_scores(SharedAddress query, SharedAddress k) {
#pragma unroll
        for (int step = 0; step < Tile::kHeadDim / kMmaRows; ++step) {
            constexpr int kPerPanel = kSwizzleElements / kMmaRows;
            const int panel = step / kPerPanel, offset = step % kPerPanel * kMmaRows * kElementBytes;
            wgmma_scores<typename Tile::Element>(
                scores, operand(query + panel * kWarpgroupRows * kSwizzleBytes + offset),
                operand(k + panel * Tile::kKeys * kSwizzleBytes + offset), step > 0);
        }
        wgmma_commit();
    }

    // out += P V, under way
    __device__ __forceinline__ void issue_out(SharedAddress v) {
#pragma unroll
        for (int step = 0; step < kSteps; ++step) {
            wgmma_out<typename Tile::Element>(
                out, probabilities[step],
                operand(v + step * kMmaRows * kSwizzleBytes, Tile::kKeys * kSwizzleBytes));
        }
        wgmma_commit();
    }

    // Scores of keys that are not there become −∞; most tiles have all.
    __device__ __forceinline__ void mask(const Chunk& named, int lane) {
        if ((named.word[0] & named.word[1] & named.word[2] & named.word[3]) == ~0u) return;
#pragma unroll
        for (int i = 0; i < Tile::kKeys / 2; ++i) {
            const int key = i / 4 * kMmaColumns + i % 2;  // and 2 (lane % 4)
            const bool there = named.word[key / kWarpLanes] >> 2 * (lane % 4) >> key % kWarpLanes & 1;
            scores[i] = there ? scores[i] : -INFINITY;
        }
    }

    // Takes the tile into the row maxima and its exponentials into the sums; returns in `shrink` the factor of what was
    // summed under the old maxima. A row without any key yet keeps −∞, which nothing is measured from.
    __device__ __forceinline__ void exponentiate(float (&shrink)[2], float scale_log2) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float top = row_max[half];
#pragma unroll
            for (int i = 0; i < Tile::kKeys / 4; ++i) top = fmaxf(top, scores[i / 2 * 4 + 2 * half + i % 2]);
            top = fmaxf(top, shuffle_xor(top, 1));
            top = fmaxf(top, shuffle_xor(top, 2));
            const float shift = top == -INFINITY ? 0 : top * scale_log2;
            shrink[half] = exp2_fast(row_max[half] * scale_log2 - shift);
            row_max[half] = top;
            float sum = row_sum[half] * shrink[half];
#pragma unroll
            for (int i = 0; i < Tile::kKeys / 4; ++i) {
                float& score = scores[i / 2 * 4 + 2 * half + i % 2];
                score = exp2_fast(score * scale_log2 - shift);
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

    __device__ __forceinline__ void round_probabilities() {
#pragma unroll
        for (int i = 0; i < kSteps * 4; ++i) {
            probabilities[i / 4][i % 4] = pack<typename Tile::Element>(scores[2 * i], scores[2 * i + 1]);
        }
    }

    // Adds the other consumer's part of the same rows, which lies where the same thread put it.
    __device__ __forceinline__ void hand_over(SharedAddress sums, SharedAddress stats, int thread) const {
#pragma unroll
        for (int i = 0; i < Tile::kHeadDim / 2; ++i)
            store_shared_4(sums + (i * kWarpgroupThreads + thread) * 4, bits_of(out[i]));
        store_shared_16(stats + thread * 16,
                        {bits_of(row_max[0]), bits_of(row_max[1]), bits_of(row_sum[0]), bits_of(row_sum[1])});
    }

    __device__ __forceinline__ void take_over(SharedAddress sums, SharedAddress stats, int thread, float scale_log2) {
        const Chunk other = load_shared_16(stats + thread * 16);
        float mine[2], theirs[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const float other_max = float_of(other.word[half]), top = fmaxf(row_max[half], other_max);
            const float shift = top * scale_log2;  // finite: the first tile, this consumer's, has a key
            mine[half] = exp2_fast(row_max[half] * scale_log2 - shift);
            theirs[half] = exp2_fast(other_max * scale_log2 - shift);
            row_sum[half] = row_sum[half] * mine[half] + float_of(other.word[2 + half]) * theirs[half];
            row_max[half] = top;
        }
#pragma unroll
        for (int i = 0; i < Tile::kHeadDim / 2; ++i) {
            const float part = float_of(load_shared_4(sums + (i * kWarpgroupThreads + thread) * 4));
            out[i] = out[i] * mine[i / 2 % 2] + part * theirs[i / 2 % 2];
        }
    }

    // out becomes the mean and row_max the log-sum-exp, natural.
    __device__ __forceinline__ void normalise(float scale_log2) {
        constexpr float kLn2 = 0.693147180559945f;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float sum = row_sum[half];
            sum += shuffle_xor(sum, 1);
            sum += shuffle_xor(sum, 2);
            const float inverse = sum == 0 ? 0 : 1 / sum;
            row_max[half] = sum == 0 ? -INFINITY : (row_max[half] * scale_log2 + log2f(sum)) * kLn2;
#pragma unroll
            for (int i = 0; i < Tile::kHeadDim / 4; ++i) out[i / 2 * 4 + 2 * half + i % 2] *= inverse;
        }
    }
};

// A consumer's tiles of keys of one item: the products of a tile's V and of the next tile's K are issued together, and
// the next tile's exponentials are taken while the former still run.
template <class Tile>
__device__ __forceinline__ void attend(
    const Order& order, const Ring<Tile>& ring, const Consumer& me, Registers<Tile>& registers, float scale_log2) {
    const SharedAddress query = ring.query(me.shares_rows ? 0 : me.group);
    float shrink[2];
    registers.clear();
    if (order.tiles > 0) {
        const Spot k = order.k(0);
        ring.wait_full(k);
        wgmma_fence();
        registers.issue_scores(query, ring.tile(k));
        const Chunk named = load_shared_16(ring.mask(k));
        wgmma_wait<0>();
        settle(registers.scores);
        ring.release(k, me.lane);
        registers.mask(named, me.lane);
        registers.exponentiate(shrink, scale_log2);
        registers.round_probabilities();
    }
    for (int tile = 0; tile + 1 < order.tiles; ++tile) {
        const Spot k = order.k(tile + 1), v = order.v(tile);
        if (tile == 0) ring.wait_full(k);
        ring.wait_full(v);
        if (!me.shares_rows) me.wait_turn();
        wgmma_fence();
        registers.issue_scores(query, ring.tile(k));
        registers.issue_out(ring.tile(v));
        if (!me.shares_rows) me.give_turn();
        const Chunk named = load_shared_16(ring.mask(k));
        wgmma_wait<1>();
        settle(registers.scores);
        ring.release(k, me.lane);
        registers.mask(named, me.lane);
        registers.exponentiate(shrink, scale_log2);
        settle(registers.scores);
        // The next wait for K comes here, because ptxas keeps to branches alone: without one, it would put the
        // exponentials off until the products below are done.
        if (tile + 2 < order.tiles) ring.wait_full(order.k(tile + 2));
        wgmma_wait<0>();
        settle(registers.out);
        ring.release(v, me.lane);
        registers.rescale(shrink);
        registers.round_probabilities();
    }
    warp_barrier();
    if (me.lane == 0) mbarrier_arrive(ring.query_empty());  // the next item's queries come under this one's end
    if (order.tiles > 0) {
        const Spot v = order.v(order.tiles - 1);
        ring.wait_full(v);
        wgmma_fence();
        registers.issue_out(ring.tile(v));
        wgmma_wait<0>();
        settle(registers.out);
        ring.release(v, me.lane);
    }
}

// A consumer's 64 rows of the output and their lse; rows past the last are clipped by the copy engine.
template <class Tile>
__device__ __forceinline__ void store_out(
    const Args& args, const Item& item, const Ring<Tile>& ring, const Consumer& me, Registers<Tile>& registers,
    float scale_log2) {
    const AttnParams& p = args.params;
    const int first_row = item.first_row + (me.shares_rows ? 0 : me.group * kWarpgroupRows);
    registers.normalise(scale_log2);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int row = first_row + me.warp * kMmaRows + half * 8 + me.lane / 4;
        float* const lse = p.lse + (int64_t{item.batch} * p.heads + item.head) * p.tokens;
        if (row < p.tokens && me.lane % 4 == 0) lse[row] = registers.row_max[half];
    }
    const SharedAddress staged = ring.out(me.group);
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
__device__ __forceinline__ void compute(const Args& args, const Ring<Tile>& ring, const Consumer& me) {
    const float scale_log2 = args.params.softmax_scale * 1.44269504088896f;
    Registers<Tile> registers;
    if (me.group == 1 && !me.shares_rows) me.give_turn();
    int round = 0;
    for (int index = blockIdx.x; index < args.items; index += args.blocks, ++round) {
        const Item item(args, index);
        mbarrier_wait(ring.query_full(), round & 1);
        attend(Order(args, round, me.shares_rows ? me.group : 0), ring, me, registers, scale_log2);
        if (me.thread() == 0) tma_store_wait_read();  // the item before: its output has left shared memory
        if (me.shares_rows) {
            const SharedAddress sums = ring.out(0), stats = ring.shared + Tile::kStats;
            me.barrier_of_both();
            if (me.group == 1) registers.hand_over(sums, stats, me.thread());
            me.barrier_of_both();
            if (me.group == 1) continue;
            registers.take_over(sums, stats, me.thread(), scale_log2);
        }
        me.barrier();
        store_out(args, item, ring, me, registers, scale_log2);
    }
    if (me.thread() == 0) tma_store_wait_read();
}

template <class Tile>
__global__ void __launch_bounds__(kHopperThreads, 1) attn_kernel(const __grid_constant__ Args args) {
    const Ring<Tile> ring{dynamic_shared()};
    const int warp = shuffle_from(threadIdx.x / kWarpLanes, 0);  // so that the compiler knows it uniform
    const int lane = threadIdx.x % kWarpLanes;
    if (threadIdx.x == 0) ring.init(args);
    named_barrier(kBlockBarrier, kHopperThreads);
    if (warp < kWarpgroupWarps) {
        release_registers<kMoverRegisters>();
        if (warp == 0) fetch(args, ring, lane);
        if (warp == 1) keep(args, ring, lane);
    } else {
        take_registers<kConsumerRegisters>();
        compute(args, ring, Consumer{warp / kWarpgroupWarps - 1, warp % kWarpgroupWarps, lane, args.stride > 1});
    }
}

}  // namespace amskv::hopper
