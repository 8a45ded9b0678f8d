// The launchers on NumPy arrays: 16-bit elements travel as uint16, kernels run in the executor.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include "amskv/amskv.h"
#include "executor.h"

namespace py = pybind11;

namespace {

using amskv::host::Executor;
using Bits = py::array_t<uint16_t>;
using Table = py::array_t<int32_t>;

amskv::Rows rows_of(const Bits& x) {
    const auto stride = [&](int axis) { return static_cast<int64_t>(x.strides(axis)) / 2; };
    return {x.data(), stride(0), stride(1), stride(2)};
}

amskv::SlotTable table_of(const Table& slots) {
    const auto stride = [&](int axis) {
        return slots.shape(axis) == 1 ? 0 : static_cast<int64_t>(slots.strides(axis)) / 4;
    };
    return {slots.data(), stride(0), stride(1), static_cast<int32_t>(slots.shape(2))};
}

// The bytes from the first to the last element.
amskv::host::Buffer buffer_of(const py::array& x) {
    size_t last = 0;
    for (py::ssize_t axis = 0; axis < x.ndim(); ++axis) last += (x.shape(axis) - 1) * x.strides(axis);
    return {static_cast<const unsigned char*>(x.data()), x.size() > 0 ? last + x.itemsize() : 0};
}

// Pages of either kind; `scales` is empty where they hold what k and v hold.
amskv::Pool pool_of(const py::array& pages, const Table& arena, const py::array_t<float>& scales) {
    return {const_cast<void*>(pages.data()), arena.data(), static_cast<int32_t>(pages.shape(2)),
            static_cast<int32_t>(pages.shape(0)), scales.size() > 0 ? const_cast<float*>(scales.data()) : nullptr};
}

amskv::DType dtype_of(const std::string& name) {
    return name == "float16" ? amskv::DType::kFloat16 : amskv::DType::kBFloat16;
}

struct Call {
    Bits q, k, v, out;
    py::array pages;
    Table arena, read, write;
    py::array_t<float> lse, scales;

    amskv::AttnParams params(float softmax_scale, const std::string& dtype) const {
        amskv::AttnParams p{};
        p.q = rows_of(q), p.k = rows_of(k), p.v = rows_of(v);
        p.pool = pool_of(pages, arena, scales);
        p.read = table_of(read), p.write = table_of(write);
        p.out = const_cast<uint16_t*>(out.data()), p.lse = const_cast<float*>(lse.data());
        p.softmax_scale = softmax_scale;
        p.batch = q.shape(0), p.tokens = q.shape(1), p.heads = q.shape(2), p.head_dim = q.shape(3);
        p.kv_heads = k.shape(2), p.dtype = dtype_of(dtype);
        return p;
    }
};

void prepare(const std::string& schedule, std::vector<amskv::host::Buffer> buffers) {
    Executor& executor = Executor::get();
    executor.options.lazy = schedule == "lazy";
    executor.options.buffers = std::move(buffers);
    executor.counters = {};
}

py::dict counters() {
    const auto& c = Executor::get().counters;
    return py::dict(
        py::arg("blocks") = c.blocks, py::arg("products") = c.products, py::arg("copies") = c.copies,
        py::arg("bank_conflicts") = c.bank_conflicts, py::arg("warpgroup_products") = c.warpgroup_products,
        py::arg("bulk_loads") = c.bulk_loads, py::arg("bulk_stores") = c.bulk_stores);
}

amskv::AttnPlan plan(
    const Call& call, const std::string& dtype, int multiprocessors, int shared_bytes, bool hopper) {
    const amskv::Device device{
        multiprocessors, shared_bytes, hopper ? amskv::kHopperCapability : amskv::kLeastCapability};
    return amskv::plan_attn(
        call.params(1, dtype), device, hopper ? amskv::Kernels::kHopper : amskv::Kernels::kPortable);
}

py::dict attn(
    const Call& call, float softmax_scale, const std::string& dtype, const amskv::AttnPlan& plan,
    const std::string& schedule) {
    const amskv::AttnParams params = call.params(softmax_scale, dtype);
    prepare(
        schedule,
        {buffer_of(call.q), buffer_of(call.k), buffer_of(call.v), buffer_of(call.pages), buffer_of(call.scales)});
    std::vector<float> workspace(amskv::attn_workspace_bytes(params, plan) / sizeof(float), NAN);
    const amskv::Error error = amskv::attn(params, plan, workspace.data(), nullptr);
    if (error != amskv::kOk) throw std::invalid_argument("attn refused its arguments");
    return counters();
}

py::dict append(
    const Bits& k, const Bits& v, const py::array& pages, const Table& arena, const Table& write,
    const py::array_t<float>& scales, const std::string& dtype, const std::string& schedule) {
    amskv::AppendParams p{};
    p.k = rows_of(k), p.v = rows_of(v), p.write = table_of(write);
    p.pool = pool_of(pages, arena, scales);
    p.dtype = dtype_of(dtype);
    p.batch = k.shape(0), p.tokens = k.shape(1), p.kv_heads = k.shape(2), p.head_dim = k.shape(3);
    prepare(schedule, {});
    if (amskv::append(p, nullptr) != amskv::kOk) throw std::invalid_argument("append refused its arguments");
    return counters();
}

}  // namespace

PYBIND11_MODULE(amskv_host, m) {
    py::class_<amskv::AttnPlan>(m, "Plan", py::module_local())
        .def(py::init([](int rows_per_warp, int warps, int teams, int splits) {
            return amskv::AttnPlan{rows_per_warp, warps, teams, splits, {}};
        }))
        .def_static(
            "hopper",
            [](int tile_rows, int blocks) {
                return amskv::AttnPlan{16, 1, 1, 1, {tile_rows, blocks}};
            })
        .def_readonly("rows_per_warp", &amskv::AttnPlan::rows_per_warp)
        .def_readonly("warps", &amskv::AttnPlan::warps)
        .def_readonly("teams", &amskv::AttnPlan::teams)
        .def_readonly("splits", &amskv::AttnPlan::splits)
        .def_property_readonly("tile_rows", [](const amskv::AttnPlan& plan) { return plan.hopper.tile_rows; })
        .def_property_readonly("blocks", [](const amskv::AttnPlan& plan) { return plan.hopper.blocks; });
    py::class_<Call>(m, "Call", py::module_local())
        .def(
            py::init([](Bits q, Bits k, Bits v, py::array pages, Bits out, Table arena, Table read, Table write,
                        py::array_t<float> lse, py::array_t<float> scales) {
                return Call{q, k, v, out, pages, arena, read, write, lse, scales};
            }));
    m.def("plan", &plan);
    m.def("attn", &attn);
    m.def("append", &append);
}
