// Slot tables held against the pool on the host, as amskv_kernels/ops/tables.py does, in microseconds.
#pragma once

#include "amskv/amskv.h"

namespace amskv {

// How many tokens each sequence has: as many as the others, or by the packed row at which each begins.
struct Lengths {
    int32_t tokens;
    const int32_t* starts = nullptr;
    int32_t of(int32_t sequence) const { return starts ? starts[sequence + 1] - starts[sequence] : tokens; }
};

// Throws std::invalid_argument for slots that point outside the pool, overlap, or read what the same call writes.
void check_tables(
    const Pool& pool, const SlotTable& read, const SlotTable& write, int32_t batch, int32_t kv_heads, Lengths lengths);

// The keys that compact keeps of each sequence and head, (batch, kv_heads, count).
struct Keep {
    const int64_t* data;
    int32_t count;
};

// Refuses keys that are not there or do not ascend, and tables that check_tables refuses or that name another number.
void check_keep(
    const Pool& pool, const SlotTable& source, const SlotTable& target, const Keep& keep, int32_t batch,
    int32_t kv_heads, int32_t tokens);

}  // namespace amskv
