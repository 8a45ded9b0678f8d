// Where the rows of one sequence and head lie: queries, the keys that the slots name, the current scale.
#pragma once

#include "cpu/cpu.h"
#include "cpu/store.h"
#include "cpu/vector.h"

namespace amskv::cpu {
namespace {

template <typename Page>
inline constexpr bool kEightBits = sizeof(Page) == 1;

// Query row `row` of KV head `head`: rows run through the tokens of each of the group's heads.
inline int64_t query_offset(const AttnParams& p, int batch, int head, int row) {
    const int group = p.heads / p.kv_heads;
    return batch * p.q.batch_stride + row % p.tokens * p.q.token_stride +
           (head * group + row / p.tokens) * p.q.head_stride;
}

// The same row among the rows of out, which is contiguous, and of lse.
inline int64_t out_row(const AttnParams& p, int batch, int head, int row) {
    const int64_t query_head = head * (p.heads / p.kv_heads) + row / p.tokens;
    return (batch * int64_t{p.tokens} + row % p.tokens) * p.heads + query_head;
}
inline int64_t lse_row(const AttnParams& p, int batch, int head, int row) {
    const int64_t query_head = head * (p.heads / p.kv_heads) + row / p.tokens;
    return (batch * int64_t{p.heads} + query_head) * p.tokens + row % p.tokens;
}

// Walks the keys of one sequence and head, the rows that the slots name and then the current scale, a block at a time.
// T is the type of the current scale's elements, Page that of those in pages: the same, or int8_t.
template <typename T, typename Page, int kMost>
class Keys {
public:
    Keys(const AttnParams& p, int batch, int head) : p_(p) {
        slots_ = p.read.data + batch * p.read.batch_stride + head * p.read.head_stride;
        arena_ = p.pool.arena[batch * p.kv_heads + head];
        k_ = static_cast<const T*>(p.k.data) + batch * p.k.batch_stride + head * p.k.head_stride;
        v_ = static_cast<const T*>(p.v.data) + batch * p.v.batch_stride + head * p.v.head_stride;
    }

    // Lists the next block; how many rows it has, 0 at the end.
    int next() {
        count = 0;
        for (; count < kMost && slot_ < p_.read.count; ++slot_, row_ = 0) {
            const int rows = slots_[slot_] & ((1 << kRowsBits) - 1);
            const int64_t page_size = p_.pool.page_size;
            const int64_t first = (arena_ + (slots_[slot_] >> kRowsBits)) * 2 * page_size;
            for (; row_ < rows && count < kMost; ++row_, ++count) list(first + row_, first + row_ + page_size);
            if (row_ < rows) break;
        }
        paged = count;
        for (; token_ < p_.tokens && count < kMost; ++token_, ++count) {
            k[count] = k_ + token_ * p_.k.token_stride;
            v[count] = v_ + token_ * p_.v.token_stride;
            k_scale[count] = v_scale[count] = 1;
        }
        return count;
    }

    // Asks for one of so many parts of the listed rows, to have them at hand when their turn comes.
    void prefetch(int part, int parts) const {
        for (int i = count * part / parts; i < count * (part + 1) / parts; ++i) {
            const int bytes = p_.head_dim * static_cast<int>(i < paged ? sizeof(Page) : sizeof(T));
            for (int at = 0; at < bytes; at += kLineBytes) {
                __builtin_prefetch(static_cast<const char*>(k[i]) + at, 0, kSecondLevel);
                __builtin_prefetch(static_cast<const char*>(v[i]) + at, 0, kSecondLevel);
            }
        }
    }

    const void *k[kMost], *v[kMost];     // of Page, the first `paged`, and of T
    float k_scale[kMost], v_scale[kMost];  // what they are multiplied by, where pages are of int8_t
    int count = 0, paged = 0;              // rows of the block; the first of them, those that lie in pages

private:
    void list(int64_t k_row, int64_t v_row) {
        const Page* const pages = static_cast<const Page*>(p_.pool.pages);
        k[count] = pages + k_row * p_.head_dim, v[count] = pages + v_row * p_.head_dim;
        if constexpr (kEightBits<Page>) k_scale[count] = p_.pool.scales[k_row], v_scale[count] = p_.pool.scales[v_row];
    }

    const AttnParams& p_;
    const int32_t* slots_;
    int64_t arena_;
    const T *k_, *v_;
    int slot_ = 0, row_ = 0, token_ = 0;
};

// The tiles of a task.
struct AttnTask {
    int batch, head, row, tiles;  // `row` is the first
    int rows_of(const AttnCut& cut, int tile) const {
        const int left = cut.rows - row - tile * cut.rows_per_tile;
        return left < cut.rows_per_tile ? left : cut.rows_per_tile;
    }
};

inline AttnTask task_of(const AttnParams& p, const AttnCut& cut, int64_t task) {
    const int part = task % cut.tasks_per_head;
    AttnTask found{};
    found.head = task / cut.tasks_per_head % p.kv_heads, found.batch = task / cut.tasks_per_head / p.kv_heads;
    found.row = part * cut.tiles_per_task * cut.rows_per_tile;
    const int left = (cut.rows - found.row + cut.rows_per_tile - 1) / cut.rows_per_tile;
    found.tiles = left < cut.tiles_per_task ? left : cut.tiles_per_task;
    return found;
}

// Asks for the lines that the output of a tile will be written to.
inline void prefetch_out(const AttnParams& p, const AttnTask& task, int first, int rows) {
    const int bytes = p.head_dim * static_cast<int>(p.dtype == DType::kFloat32 ? sizeof(float) : sizeof(Half));
    for (int i = first; i < first + rows; ++i) {
        const char* const out = static_cast<const char*>(p.out) + out_row(p, task.batch, task.head, i) * bytes;
        for (int at = 0; at < bytes; at += kLineBytes) __builtin_prefetch(out + at, 1, kSecondLevel);
    }
}

// The first task of a head stores that head's rows, at its end: by then it has them in its cache.
inline void store_task(const AttnParams& p, const AttnTask& task) {
    if (task.row > 0) return;
    const AppendParams rows{p.k, p.v, p.pool, p.write, p.batch, p.tokens, p.kv_heads, p.head_dim, p.dtype};
    append_any(rows, task.batch, task.head);
}

}  // namespace
}  // namespace amskv::cpu
