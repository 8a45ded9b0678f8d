#include "common/plan.h"

#include <algorithm>

#include "hopper/attn.h"
#include "common/tiles.h"

namespace amskv {
namespace {

// A part of split keys is worth its merge from this many tiles on: a few hundred keys.
constexpr int kLeastTilesOfSplit = 4;
// Blocks a multiprocessor should have to overlap loads with products.
constexpr int kBlocksWanted = 2;

constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }

int keys_per_tile(const AttnParams& p, const AttnPlan& plan) {
    return plan.rows_per_warp == 32 && p.head_dim == 128 ? Tile<void, 128, 32>::kKeys : Tile<void, 64, 16>::kKeys;
}

template <int kHeadDim>
int team_bytes_of(const AttnParams& p, int warps, int key_tiles) {
    using Int8Tile = Tile<void, kHeadDim, int8_rows_per_warp(kHeadDim), true>;
    using NarrowTile = Tile<void, kHeadDim, 16>;  // of 16-bit pages, narrow tiles alone share a block
    return p.pool.scales != nullptr ? Int8Tile::team_bytes(warps, key_tiles) : NarrowTile::team_bytes(warps, key_tiles);
}

int team_bytes(const AttnParams& p, int warps, int key_tiles) {
    switch (p.head_dim) {
        case 64:
            return team_bytes_of<64>(p, warps, key_tiles);
        case 96:
            return team_bytes_of<96>(p, warps, key_tiles);
        default:
            return team_bytes_of<128>(p, warps, key_tiles);
    }
}

// Wide tiles read K and V from shared memory half as often, so they are worth an eighth more padding. Head size 96,
// which no published model has, goes without.
bool prefers_wide(const AttnParams& p, int rows) {
    return p.head_dim != 96 && rows > 64 && ceil_div(rows, 128) * 128 * 8 <= ceil_div(rows, 64) * 64 * 9;
}

// Warps for tiles of up to 128 rows, all of them alike.
AttnPlan plan_int8(const AttnParams& p, int rows) {
    const int per_warp = int8_rows_per_warp(p.head_dim), blocks = ceil_div(rows, per_warp);
    return {per_warp, std::max(ceil_div(blocks, std::max(ceil_div(blocks, kMaxWarps), 1)), 1), 1, 1, {}};
}

// The persistent grid: a block per multiprocessor, or per tile where there are fewer.
HopperPlan plan_hopper(const AttnParams& p, const Device& device) {
    if (p.tokens < kHopperLeastRows || device.capability != kHopperCapability || !hopper::serves(p)) return {};
    const int tile_rows = hopper_tile_rows(p.tokens, p.head_dim);
    const int64_t items = int64_t{ceil_div(p.tokens, tile_rows)} * p.heads * p.batch;
    if (items > INT32_MAX - device.multiprocessors) return {};
    return {tile_rows, static_cast<int>(std::min<int64_t>(items, device.multiprocessors))};
}

}  // namespace

Cut cut_of(const AttnParams& p, const AttnPlan& plan) {
    const int rows = p.tokens * (p.heads / p.kv_heads), keys = keys_per_tile(p, plan);
    Cut cut{};
    cut.row_tiles = ceil_div(rows, plan.rows_per_warp * plan.warps);
    cut.key_tiles = ceil_div(p.read.count * p.pool.page_size + p.tokens, keys);
    const int64_t items = int64_t{cut.row_tiles} * plan.splits * p.kv_heads * p.batch;
    cut.items = static_cast<int>(items);
    const bool filled = plan.splits >= 1 && (plan.splits - 1) * ceil_div(cut.key_tiles, plan.splits) < cut.key_tiles;
    cut.valid = filled && items <= INT32_MAX && plan.warps >= 1 && plan.teams >= 1 &&
                plan.warps * plan.teams <= kMaxWarps && p.heads % p.kv_heads == 0;
    return cut;
}

AttnPlan plan_attn(const AttnParams& p, const Device& device, Kernels kernels) {
    const int rows = p.tokens * (p.heads / p.kv_heads);
    AttnPlan plan{16, std::clamp(ceil_div(rows, 16), 1, kMaxWarps), 1, 1, {}};
    if (prefers_wide(p, rows)) plan = {32, kMaxWarps, 1, 1, {}};
    if (p.pool.scales != nullptr) plan = plan_int8(p, rows);
    if (kernels == Kernels::kHopper) plan.hopper = plan_hopper(p, device);
    if (plan.hopper.tile_rows > 0) return plan;  // no splits: the grid is persistent
    const Cut whole = cut_of(p, plan);
    const int wanted = kBlocksWanted * device.multiprocessors;
    if (whole.items < device.multiprocessors) {
        const int most = std::min(wanted / std::max(whole.items, 1), whole.key_tiles / kLeastTilesOfSplit);
        const int share = ceil_div(whole.key_tiles, std::max(most, 1));
        plan.splits = std::max(ceil_div(whole.key_tiles, share), 1);  // no part is empty
    }
    const int bytes = team_bytes(p, plan.warps, whole.key_tiles);
    while (plan.warps * plan.teams * 2 <= kMaxWarps && plan.teams * 2 * bytes <= device.shared_bytes &&
           whole.items >= plan.teams * 2 * wanted) {
        plan.teams *= 2;
    }
    return plan;
}

size_t attn_workspace_bytes(const AttnParams& p, const AttnPlan& plan) {
    if (plan.splits == 1) return 0;
    return sizeof(float) * plan.splits * p.batch * p.tokens * p.heads * (size_t(p.head_dim) + 2);
}

}  // namespace amskv
