// The launch of the Hopper kernel: its view of every tensor, and the persistent grid.
#include "hopper/attn.h"

#include "hopper/attn.cuh"

namespace amskv::hopper {
namespace {

constexpr int kTileKeys = HopperTile<void, 64>::kKeys;

// 16-bit rows as the copy engine sees them: (head_dim, rows, heads, sequences). A dimension of one has no stride.
Error encode_rows(TensorMap* map, const Rows& rows, int64_t tokens, int64_t heads, const AttnParams& p, int box_rows) {
    const int64_t row_bytes = int64_t{p.head_dim} * kElementBytes;
    const int64_t dims[4] = {p.head_dim, tokens, heads, p.batch};
    const int64_t strides[3] = {
        tokens > 1 ? rows.token_stride * kElementBytes : row_bytes,
        heads > 1 ? rows.head_stride * kElementBytes : row_bytes,
        p.batch > 1 ? rows.batch_stride * kElementBytes : row_bytes};
    return encode_map(map, rows.data, dims, strides, box_rows);
}

Error encode_maps(Args* args) {
    const AttnParams& p = args->params;
    const int page_size = p.pool.page_size, box_rows = p.write.count > 0 ? page_size : kTileKeys;
    const int64_t out_row = int64_t{p.heads} * p.head_dim;
    const Rows out{p.out, p.tokens * out_row, out_row, p.head_dim};
    const int64_t dims[4] = {p.head_dim, page_size, 2, p.pool.num_pages};
    const int64_t row_bytes = int64_t{p.head_dim} * kElementBytes;
    const int64_t strides[3] = {row_bytes, row_bytes * page_size, 2 * row_bytes * page_size};
    for (const Error error : {
             encode_rows(&args->q, p.q, p.tokens, p.heads, p, kWarpgroupRows),
             encode_rows(&args->k, p.k, p.tokens, p.kv_heads, p, box_rows),
             encode_rows(&args->v, p.v, p.tokens, p.kv_heads, p, box_rows),
             encode_rows(&args->out, out, p.tokens, p.heads, p, kWarpgroupRows),
             encode_map(&args->pages, p.pool.pages, dims, strides, page_size),
         }) {
        if (error != kOk) return error;
    }
    return kOk;
}

// Tiles of keys. Their boxes are numbered through, first the history's, then, where it is stored, the current scale's;
// else that begins a tile, and a tile of it is one box. What does not fill a tile comes first.
void cut_keys(Args* args) {
    const AttnParams& p = args->params;
    const int page_size = p.pool.page_size, pages = (p.tokens + page_size - 1) / page_size;
    // Rows that join a page already begun are a box of their own: the write table then names a page more.
    const int stored = p.write.count > 0 ? pages + (p.write.count > pages ? 1 : 0) : 0;
    const int paged_keys = (p.read.count + stored) << args->page_shift, left_over = paged_keys % kTileKeys;
    const bool short_first = left_over > 0 && left_over <= kTileKeys / 2 && page_size <= kTileKeys / 2;
    args->first_keys = short_first ? kTileKeys / 2 : kTileKeys;
    args->paged_tiles = (paged_keys + kTileKeys - 1) / kTileKeys;
    const int padded = args->first_keys + (args->paged_tiles - 1) * kTileKeys;
    args->first_box = args->paged_tiles > 0 ? (paged_keys - padded) >> args->page_shift : 0;
    const int whole_tiles = p.write.count > 0 ? 0 : (p.tokens + kTileKeys - 1) / kTileKeys;
    args->key_tiles = args->paged_tiles + whole_tiles;
}

template <typename T>
Error launch_type(const Args& args, Stream stream) {
    const auto with = [&](auto tile) {
        using Shape = decltype(tile);
        return launch("attn_hopper", attn_kernel<Shape>, args.blocks, kHopperThreads, Shape::kSharedBytes, stream, args);
    };
    return args.params.head_dim == 64 ? with(HopperTile<T, 64>{}) : with(HopperTile<T, 128>{});
}

}  // namespace

bool serves(const AttnParams& p) {
    const auto steps = [&](const Rows& rows, int heads) {  // a stride of 0 repeats a row, which TMA may refuse
        return (p.batch == 1 || rows.batch_stride > 0) && (p.tokens == 1 || rows.token_stride > 0) &&
               (heads == 1 || rows.head_stride > 0);
    };
    return (p.head_dim == 64 || p.head_dim == 128) && p.heads % p.kv_heads == 0 && p.pool.num_pages > 0 &&
           p.pool.scales == nullptr && steps(p.q, p.heads) && steps(p.k, p.kv_heads) && steps(p.v, p.kv_heads);
}

Error attn(const AttnParams& params, const HopperPlan& plan, Stream stream) {
    const bool rows = plan.tile_rows == kWarpgroupRows || plan.tile_rows == kConsumers * kWarpgroupRows;
    if (!serves(params) || !rows || plan.blocks < 1) return kInvalid;
    const int64_t row_tiles = (params.tokens + plan.tile_rows - 1) / plan.tile_rows;
    const int64_t items = row_tiles * params.heads * params.batch;
    if (items > INT32_MAX - plan.blocks) return kInvalid;
    Args args{};
    args.params = params;
    args.blocks = plan.blocks;
    args.shares_rows = plan.tile_rows == kWarpgroupRows;
    while (1 << args.page_shift < params.pool.page_size) ++args.page_shift;
    cut_keys(&args);
    args.row_tiles = static_cast<int>(row_tiles);
    args.items = static_cast<int>(items);
    args.group = params.heads / params.kv_heads;
    if (const Error error = use_device(); error != kOk) return error;
    if (const Error error = encode_maps(&args); error != kOk) return error;
    const bool half = params.dtype == DType::kFloat16;
    return half ? launch_type<Half>(args, stream) : launch_type<BFloat16>(args, stream);
}

}  // namespace amskv::hopper
