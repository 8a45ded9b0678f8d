// Slot tables held against the pool on the host, as amskv_kernels/ops/tables.py does, in microseconds.
#pragma once

#include "amskv/amskv.h"

namespace amskv {

// Throws std::invalid_argument for slots that point outside the pool, overlap, or read what the same call writes.
void check_tables(
    const Pool& pool, const SlotTable& read, const SlotTable& write, int32_t batch, int32_t kv_heads, int32_t tokens);

}  // namespace amskv
