#include "cpu/kernels.h"

#include <algorithm>
#include <cstring>

namespace amskv::cpu {

AttnCut cut_attn(const AttnParams& p, int threads) {
    AttnCut cut{};
    cut.rows = p.heads / p.kv_heads * p.tokens;
    const int64_t heads = int64_t{p.batch} * p.kv_heads, tiles = (cut.rows + kTile - 1) / kTile;
    const int64_t wanted = heads * tiles / (2 * threads);  // two tasks a thread even out what each takes
    cut.tasks_per_head = (tiles + kMostTiles - 1) / std::clamp<int64_t>(wanted, 1, kMostTiles);
    cut.tiles_per_task = std::clamp<int64_t>(wanted, 1, kMostTiles);
    cut.tasks_per_head = (tiles + cut.tiles_per_task - 1) / cut.tiles_per_task;
    cut.tasks = heads * cut.tasks_per_head;
    return cut;
}

void store_rows(
    const Rows& k, const Rows& v, const Pool& pool, const SlotTable& write, const AttnParams& shape, int batch, int head) {
    constexpr int32_t kRowsMask = (1 << kRowsBits) - 1;
    const int32_t* const slots = write.data + batch * write.batch_stride + head * write.head_stride;
    const int64_t size = shape.dtype == DType::kFloat32 ? 4 : 2, bytes = size * shape.head_dim;
    int64_t token = shape.tokens;
    for (int i = 0; i < write.count; ++i) token -= slots[i] & kRowsMask;  // below 0: rows that the first page holds
    for (int i = 0; i < write.count; ++i) {
        const int rows = slots[i] & kRowsMask;
        if (rows == 0) continue;
        const int64_t page = pool.arena[batch * shape.kv_heads + head] + (slots[i] >> kRowsBits);
        char* to = static_cast<char*>(pool.pages) + page * 2 * pool.page_size * bytes;
        for (const Rows* const from : {&k, &v}) {
            const char* const rows_at =
                static_cast<const char*>(from->data) + (batch * from->batch_stride + head * from->head_stride) * size;
            for (int row = std::max<int64_t>(0, -token); row < rows; ++row)
                std::memcpy(to + row * bytes, rows_at + (token + row) * from->token_stride * size, bytes);
            std::memset(to + rows * bytes, 0, (pool.page_size - rows) * bytes);
            to += pool.page_size * bytes;
        }
        token += rows;
    }
}

}  // namespace amskv::cpu
