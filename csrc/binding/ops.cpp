// The ops behind the dispatcher, through libtorch's stable ABI alone: no Python, no CUDA headers.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <array>
#include <optional>
#include <tuple>

#include "amskv/amskv.h"
#include "build_info.h"
#include "binding/checks.h"
#include "binding/device_scope.h"
#include "binding/params.h"
#include "common/tiles.h"

namespace amskv {
namespace {

constexpr int64_t kChunk = 8;  // elements of 16 bytes: what the kernels load at a time
constexpr int32_t kMaxDevices = 64;

[[noreturn]] void fail(const char* what, Error error) {
    const int32_t driver = driver_cuda();
    std::ostringstream message;
    message << "amskv: " << what << ": " << error_string(error) << " (built for CUDA " << kCudaVersion
            << ", architectures " << kArchitectures << "; the driver supports CUDA " << driver / 1000 << '.'
            << driver % 1000 / 10 << ')';
    throw std::runtime_error(message.str());
}

Device device_facts(int32_t index) {
    thread_local std::array<std::optional<Device>, kMaxDevices> known;
    std::optional<Device>& device = known.at(index);
    if (!device) {
        Device facts{};
        if (const Error error = device_of_current(&facts); error != kOk) fail("cannot ask the device", error);
        if (facts.capability < kLeastCapability) {
            refuse(
                "amskv was built for architectures ", kArchitectures, "; this GPU has compute capability ",
                facts.capability / 10, '.', facts.capability % 10, ", which is older");
        }
        device = facts;
    }
    return *device;
}

DType dtype_of(const Tensor& x) {
    return x.scalar_type() == ScalarType::Half ? DType::kFloat16 : DType::kBFloat16;
}

// `x` itself where the kernels can load it 16 bytes at a time, else a copy.
Tensor aligned(const Tensor& x) {
    bool fits = reinterpret_cast<uintptr_t>(x.data_ptr()) % 16 == 0;
    for (int64_t axis = 0; axis < 3; ++axis) fits = fits && stride_of(x, axis) % kChunk == 0;
    return fits ? x : torch::stable::clone(x);
}

std::tuple<Tensor, Tensor> attn_with(
    Kernels kernels, Tensor q, Tensor k, Tensor v, Tensor pages, Tensor arena, Tensor read_slots, Tensor write_slots,
    double softmax_scale, const std::optional<Tensor>& page_scales) {
    check_attn(q, k, v, pages, arena, read_slots, write_slots, softmax_scale, page_scales);
    const DeviceScope scope(k);
    q = aligned(q), k = aligned(k), v = aligned(v);
    const int64_t batch = q.size(0), tokens = q.size(1), heads = q.size(2), head_dim = q.size(3);
    const std::array<int64_t, 4> out_shape{batch, tokens, heads, head_dim};
    const std::array<int64_t, 3> lse_shape{batch, heads, tokens};
    Tensor out = torch::stable::new_empty(q, {out_shape.data(), out_shape.size()});
    Tensor lse = torch::stable::new_empty(q, {lse_shape.data(), lse_shape.size()}, ScalarType::Float);
    AttnParams p{};
    p.q = rows_of(q), p.k = rows_of(k), p.v = rows_of(v);
    p.pool = pool_of(pages, arena, page_scales);
    p.read = table_of(read_slots), p.write = table_of(write_slots);
    p.out = out.data_ptr(), p.lse = static_cast<float*>(lse.data_ptr());
    p.softmax_scale = static_cast<float>(softmax_scale);
    p.batch = batch, p.tokens = tokens, p.heads = heads, p.kv_heads = k.size(2), p.head_dim = head_dim;
    p.dtype = dtype_of(q);
    const AttnPlan plan = plan_attn(p, device_facts(scope.index()), kernels);
    const std::array<int64_t, 1> scratch{static_cast<int64_t>(attn_workspace_bytes(p, plan) / sizeof(float))};
    std::optional<Tensor> workspace;
    if (scratch[0] > 0) workspace = torch::stable::new_empty(q, {scratch.data(), 1}, ScalarType::Float);
    const Error error = amskv::attn(p, plan, workspace ? workspace->data_ptr() : nullptr, scope.stream());
    if (error != kOk) fail("attn", error);
    return {out, lse};
}

std::tuple<Tensor, Tensor> attn_cuda(
    Tensor q, Tensor k, Tensor v, Tensor pages, Tensor arena, Tensor read_slots, Tensor write_slots,
    double softmax_scale, std::optional<Tensor> page_scales) {
    return attn_with(Kernels::kPortable, q, k, v, pages, arena, read_slots, write_slots, softmax_scale, page_scales);
}

std::tuple<Tensor, Tensor> attn_hopper(
    Tensor q, Tensor k, Tensor v, Tensor pages, Tensor arena, Tensor read_slots, Tensor write_slots,
    double softmax_scale, std::optional<Tensor> page_scales) {
    return attn_with(Kernels::kHopper, q, k, v, pages, arena, read_slots, write_slots, softmax_scale, page_scales);
}

void append_cuda(
    Tensor k, Tensor v, Tensor pages, Tensor arena, Tensor write_slots, std::optional<Tensor> page_scales) {
    check_current(k, v, pages, arena, page_scales);
    check_slots("write_slots", write_slots, k);
    const DeviceScope scope(k);
    device_facts(scope.index());
    k = aligned(k), v = aligned(v);
    AppendParams p{};
    p.k = rows_of(k), p.v = rows_of(v);
    p.pool = pool_of(pages, arena, page_scales);
    p.write = table_of(write_slots);
    p.batch = k.size(0), p.tokens = k.size(1), p.kv_heads = k.size(2), p.head_dim = k.size(3);
    p.dtype = dtype_of(k);
    if (const Error error = amskv::append(p, scope.stream()); error != kOk) fail("append", error);
}

// The most dynamic shared memory that a team of an attention kernel asks for; ptxas knows of static memory alone.
template <int kHeadDim, int kRowsPerWarp, bool kInt8Pages = false>
std::string tile_info() {
    using Shape = Tile<void, kHeadDim, kRowsPerWarp, kInt8Pages>;
    std::ostringstream text;
    text << "{\"head_dim\": " << kHeadDim << ", \"rows_per_warp\": " << kRowsPerWarp
         << ", \"int8_pages\": " << (kInt8Pages ? "true" : "false") << ", \"keys\": " << Shape::kKeys
         << ", \"stages\": " << Shape::kStages << ", \"shared\": " << Shape::team_bytes(kMaxWarps, Shape::kStages)
         << '}';
    return text.str();
}

template <int kHeadDim>
std::string int8_tile_info() {
    return tile_info<kHeadDim, int8_rows_per_warp(kHeadDim), true>();
}

template <int kHeadDim>
std::string hopper_tile_info() {
    using Shape = HopperTile<void, kHeadDim>;
    std::ostringstream text;
    text << "{\"head_dim\": " << kHeadDim << ", \"keys\": " << Shape::kKeys << ", \"stages\": " << Shape::kStages
         << ", \"threads\": " << kHopperThreads << ", \"producer_registers\": " << kProducerRegisters
         << ", \"consumer_registers\": " << kConsumerRegisters << ", \"shared\": " << Shape::kSharedBytes << '}';
    return text.str();
}

std::string build_info() {
    std::string info = kBuildInfo;  // a JSON object
    info.pop_back();
    info += ", \"tiles\": [" + tile_info<64, 16>() + ", " + tile_info<64, 32>() + ", " + tile_info<96, 16>() + ", " +
            tile_info<128, 16>() + ", " + tile_info<128, 32>() + ", " + int8_tile_info<64>() + ", " +
            int8_tile_info<96>() + ", " + int8_tile_info<128>() + "], \"hopper_tiles\": [" + hopper_tile_info<64>() +
            ", " + hopper_tile_info<128>() + "]}";
    return info;
}

}  // namespace
}  // namespace amskv

// The same schemas as amskv::attn and amskv::append, under names of their own, so that a backend can be forced and
// arguments are checked on any machine.
STABLE_TORCH_LIBRARY_FRAGMENT(amskv, m) {
    m.def(
        "attn_cuda(Tensor q, Tensor k, Tensor v, Tensor(a!) pages, Tensor arena, Tensor read_slots, Tensor "
        "write_slots, float softmax_scale, Tensor(b!)? page_scales=None) -> (Tensor, Tensor)");
    m.def(
        "attn_hopper(Tensor q, Tensor k, Tensor v, Tensor(a!) pages, Tensor arena, Tensor read_slots, Tensor "
        "write_slots, float softmax_scale, Tensor(b!)? page_scales=None) -> (Tensor, Tensor)");
    m.def(
        "append_cuda(Tensor k, Tensor v, Tensor(a!) pages, Tensor arena, Tensor write_slots, "
        "Tensor(b!)? page_scales=None) -> ()");
    m.def("build_info() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(amskv, CompositeExplicitAutograd, m) {
    m.impl("attn_cuda", TORCH_BOX(&amskv::attn_cuda));
    m.impl("attn_hopper", TORCH_BOX(&amskv::attn_hopper));
    m.impl("append_cuda", TORCH_BOX(&amskv::append_cuda));
    m.impl("build_info", TORCH_BOX(&amskv::build_info));
}
