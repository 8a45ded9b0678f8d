// The CPU kernels behind the dispatcher, on torch's own threads.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "binding/checks.h"
#include "binding/params.h"
#include "binding/tables.h"
#include "cpu/cpu.h"

namespace amskv::cpu {
namespace {

constexpr int64_t kSmallWork = 1 << 15;  // elements below which waking other threads costs more than it gains

// Computes nothing: what is left is what stands before a kernel.
const InstructionSet kNone{
    "none", [](const AttnParams&, const AttnCut&, int64_t, Scratch&) {}, [](const AppendParams&, int, int) {},
    [](const CompactParams&, int, int) {}, [](const PrepareParams&, int64_t) {}};

// The one of that name; the best that this machine has where the name is empty.
const InstructionSet& instruction_set_of(const std::string& name) {
    if (name == kNone.name) return kNone;
    const InstructionSet* best = nullptr;
    for (int rank = 0; const InstructionSet* set = instruction_set(rank); ++rank) {
        best = set;
        if (name == set->name) break;
    }
    if (!name.empty() && name != best->name) refuse("instruction_set is ", name, "; this machine does not have it");
    return *best;
}

DType dtype_of(const Tensor& x) {
    switch (x.scalar_type()) {
        case ScalarType::Float: return DType::kFloat32;
        case ScalarType::Half: return DType::kFloat16;
        default: return DType::kBFloat16;
    }
}

void check_on_cpu(const char* name, const Tensor& x) {
    if (!x.is_cpu()) refuse(name, " is not on the CPU; the CPU kernels serve no other device");
}

// Rows in a pool that the same call writes may be overwritten before they are read.
void check_apart(const char* name, const Tensor& x, const char* written_name, const Tensor& written) {
    int64_t last = 0;
    for (int64_t axis = 0; axis < x.dim(); ++axis) last += (x.size(axis) - 1) * x.stride(axis);
    const auto first = reinterpret_cast<uintptr_t>(x.data_ptr()), end = first + (last + 1) * x.element_size();
    const auto start = reinterpret_cast<uintptr_t>(written.data_ptr());
    if (x.numel() > 0 && first < start + written.numel() * written.element_size() && end > start)
        refuse(name, " shares memory with ", written_name, ", which this call writes; it must be a tensor of its own");
}

void check_apart(const char* name, const Tensor& x, const Tensor& pages, const std::optional<Tensor>& page_scales) {
    check_apart(name, x, "pages", pages);
    if (page_scales) check_apart(name, x, "page_scales", *page_scales);
}

void check_apart(
    const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& pages, const std::optional<Tensor>& page_scales) {
    check_apart("q", q, pages, page_scales);
    check_apart("k", k, pages, page_scales), check_apart("v", v, pages, page_scales);
}

Scratch& scratch_of_thread() {
    thread_local const std::unique_ptr<Scratch> scratch(new Scratch{});
    return *scratch;
}

// Runs the tasks on torch's threads, each taking the next ones left: of small tasks several, so that threads do not wait
// for each other's counting. `work`, of all tasks, tells whether waking threads is worth it.
template <typename Run>
void for_each_task(int64_t tasks, int64_t work, const Run& run) {
    const int64_t threads = work < kSmallWork ? 1 : std::min<int64_t>(torch::stable::get_num_threads(), tasks);
    if (threads <= 1) {
        for (int64_t task = 0; task < tasks; ++task) run(task);
        return;
    }
    const int64_t at_once = std::clamp<int64_t>(kSmallWork * tasks / work, 1, (tasks + 2 * threads - 1) / (2 * threads));
    std::atomic<int64_t> next{0};
    torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
        for (int64_t first; (first = next.fetch_add(at_once, std::memory_order_relaxed)) < tasks;) {
            for (int64_t task = first; task < std::min(first + at_once, tasks); ++task) run(task);
        }
    });
}

// Of the pages that a call writes, with the zeros that it leaves in them.
int64_t stored_elements(const SlotTable& write, const Pool& pool, const Tensor& k) {
    if (write.leave_rest) return write.count > 0 ? 2 * k.numel() : 0;
    return 2 * k.size(0) * k.size(2) * k.size(3) * write.count * pool.page_size;
}

// Contiguous, on the CPU: `torch::stable::new_empty` looks its op up by name each time.
template <size_t kAxes>
Tensor empty(const std::array<int64_t, kAxes>& shape, ScalarType dtype) {
    std::array<int64_t, kAxes> strides{};
    int64_t stride = 1;
    for (size_t axis = kAxes; axis-- > 0; stride *= shape[axis]) strides[axis] = stride;
    AtenTensorHandle made = nullptr;
    const auto type = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
    TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
        kAxes, shape.data(), strides.data(), type, aoti_torch_device_type_cpu(), 0, &made));
    return Tensor(made);
}

AttnParams params_of(
    const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& pages, const Tensor& arena,
    const Tensor& read_slots, const Tensor& write_slots, double softmax_scale,
    const std::optional<Tensor>& page_scales) {
    AttnParams p{};
    p.q = rows_of(q), p.k = rows_of(k), p.v = rows_of(v);
    p.pool = pool_of(pages, arena, page_scales);
    p.read = table_of(read_slots), p.write = table_of(write_slots);
    p.softmax_scale = static_cast<float>(softmax_scale);
    p.batch = q.size(0), p.tokens = q.size(1), p.heads = q.size(2), p.kv_heads = k.size(2), p.head_dim = q.size(3);
    p.dtype = dtype_of(q);
    return p;
}

std::tuple<Tensor, Tensor> attn_cpu(
    Tensor q, Tensor k, Tensor v, Tensor pages, Tensor arena, Tensor read_slots, Tensor write_slots,
    double softmax_scale, std::optional<Tensor> page_scales, bool leave_rest, std::string instruction_set) {
    check_on_cpu("k", k);
    check_attn(q, k, v, pages, arena, read_slots, write_slots, softmax_scale, page_scales, Kernel::kCpu);
    AttnParams p = params_of(q, k, v, pages, arena, read_slots, write_slots, softmax_scale, page_scales);
    p.write.leave_rest = leave_rest;
    check_tables(p.pool, p.read, p.write, p.batch, p.kv_heads, {p.tokens});
    if (p.write.count > 0) check_apart(q, k, v, pages, page_scales);
    const InstructionSet& set = instruction_set_of(instruction_set);
    const std::array<int64_t, 4> out_shape{p.batch, p.tokens, p.heads, p.head_dim};
    const std::array<int64_t, 3> lse_shape{p.batch, p.heads, p.tokens};
    Tensor out = empty(out_shape, q.scalar_type());
    Tensor lse = empty(lse_shape, ScalarType::Float);
    p.out = out.data_ptr(), p.lse = static_cast<float*>(lse.data_ptr());
    if (q.numel() == 0) return {out, lse};
    const AttnCut cut = cut_attn(p, static_cast<int>(torch::stable::get_num_threads()));
    const int64_t keys = p.tokens + int64_t{p.read.count} * p.pool.page_size;
    const int64_t work = q.numel() * keys + stored_elements(p.write, p.pool, k);
    for_each_task(cut.tasks, work, [&](int64_t task) { set.attn(p, cut, task, scratch_of_thread()); });
    return {out, lse};
}

// N, of row_starts (N + 1,).
int64_t count_of(const Tensor& row_starts, const Tensor& k) {
    check_table("row_starts", row_starts, k);
    if (row_starts.dim() != 1 || row_starts.size(0) < 1)
        refuse("row_starts has shape ", shape_of(row_starts), "; it must be (N + 1,)");
    return row_starts.size(0) - 1;
}

// They ascend from 0 to the packed rows.
const int32_t* starts_of(const Tensor& row_starts, const Tensor& k, int64_t sequences) {
    const auto* const starts = static_cast<const int32_t*>(row_starts.data_ptr());
    if (starts[0] != 0 || starts[sequences] != k.size(1) || !std::is_sorted(starts, starts + sequences + 1))
        refuse("row_starts must ascend from 0 to the ", k.size(1), " rows of q");
    return starts;
}

// One sequence of packed rows as a call of its own, and the first of its tasks among those of all.
struct Sequence {
    AttnParams params;
    AttnCut cut;
    int64_t first_task;
};

// Those that have rows; lse of each lies by itself, (H, n) after (H, n).
std::vector<Sequence> sequences_of(const AttnParams& all, const int32_t* starts, int32_t sequences, int64_t width) {
    const auto past = [&](const void* data, int64_t elements) {
        return static_cast<const char*>(data) + elements * width;
    };
    const int64_t threads = torch::stable::get_num_threads();
    std::vector<Sequence> found;
    for (int32_t i = 0, task = 0; i < sequences; ++i) {
        const int64_t row = starts[i];
        AttnParams p = all;
        p.tokens = starts[i + 1] - starts[i];
        if (p.tokens == 0) continue;
        for (Rows* rows : {&p.q, &p.k, &p.v}) rows->data = past(rows->data, row * rows->token_stride);
        for (SlotTable* slots : {&p.read, &p.write}) slots->data += i * slots->batch_stride;
        p.pool.arena += int64_t{i} * p.kv_heads;
        p.out = const_cast<char*>(past(p.out, row * p.heads * p.head_dim)), p.lse += row * p.heads;
        const AttnCut cut = cut_attn(p, static_cast<int>(1 + threads * p.tokens / all.tokens));
        found.push_back({p, cut, task});
        task += cut.tasks;
    }
    return found;
}

// q, k, v (1, T, H, D): the rows of N sequences, packed; lse is (1, H, T).
std::tuple<Tensor, Tensor> attn_ragged_cpu(
    Tensor q, Tensor k, Tensor v, Tensor pages, Tensor arena, Tensor read_slots, Tensor write_slots, Tensor row_starts,
    double softmax_scale, std::optional<Tensor> page_scales, std::string instruction_set) {
    check_on_cpu("k", k);
    const int64_t sequences = count_of(row_starts, k);
    check_attn(q, k, v, pages, arena, read_slots, write_slots, softmax_scale, page_scales, Kernel::kCpu, sequences);
    if (q.size(0) != 1) refuse("q has shape ", shape_of(q), "; packed rows must be (1, T, H, D)");
    const int32_t* const starts = starts_of(row_starts, k, sequences);
    AttnParams p = params_of(q, k, v, pages, arena, read_slots, write_slots, softmax_scale, page_scales);
    check_tables(p.pool, p.read, p.write, static_cast<int32_t>(sequences), p.kv_heads, {p.tokens, starts});
    if (p.write.count > 0) check_apart(q, k, v, pages, page_scales);
    const InstructionSet& set = instruction_set_of(instruction_set);
    const std::array<int64_t, 4> out_shape{1, p.tokens, p.heads, p.head_dim};
    const std::array<int64_t, 3> lse_shape{1, p.heads, p.tokens};
    Tensor out = empty(out_shape, q.scalar_type());
    Tensor lse = empty(lse_shape, ScalarType::Float);
    if (q.numel() == 0) return {out, lse};
    std::vector<float> apart(int64_t{p.heads} * p.tokens);
    p.batch = 1, p.out = out.data_ptr(), p.lse = apart.data();
    const auto all = sequences_of(p, starts, static_cast<int32_t>(sequences), q.element_size());
    const int64_t keys = p.tokens / static_cast<int64_t>(all.size()) + int64_t{p.read.count} * p.pool.page_size;
    const int64_t work = q.numel() * keys + stored_elements(p.write, p.pool, k);
    for_each_task(all.back().first_task + all.back().cut.tasks, work, [&](int64_t task) {
        const auto after = [](int64_t at, const Sequence& sequence) { return at < sequence.first_task; };
        const Sequence& own = *std::prev(std::upper_bound(all.begin(), all.end(), task, after));
        set.attn(own.params, own.cut, task - own.first_task, scratch_of_thread());
    });
    for (const Sequence& own : all) {
        float* const to = static_cast<float*>(lse.data_ptr()) + (own.params.lse - apart.data()) / p.heads;
        for (int64_t head = 0; head < p.heads; ++head)
            std::copy_n(own.params.lse + head * own.params.tokens, own.params.tokens, to + head * p.tokens);
    }
    return {out, lse};
}

void append_cpu(
    Tensor k, Tensor v, Tensor pages, Tensor arena, Tensor write_slots, std::optional<Tensor> page_scales,
    std::string instruction_set) {
    check_on_cpu("k", k);
    check_current(k, v, pages, arena, page_scales, Kernel::kCpu);
    check_slots("write_slots", write_slots, k);
    AppendParams p{};
    p.k = rows_of(k), p.v = rows_of(v);
    p.pool = pool_of(pages, arena, page_scales);
    p.write = table_of(write_slots);
    p.batch = k.size(0), p.tokens = k.size(1), p.kv_heads = k.size(2), p.head_dim = k.size(3);
    p.dtype = dtype_of(k);
    check_tables(p.pool, {}, p.write, p.batch, p.kv_heads, {p.tokens});
    if (p.write.count > 0) check_apart("k", k, pages, page_scales), check_apart("v", v, pages, page_scales);
    const InstructionSet& set = instruction_set_of(instruction_set);
    for_each_task(int64_t{p.batch} * p.kv_heads, stored_elements(p.write, p.pool, k), [&](int64_t task) {
        set.append(p, static_cast<int>(task / p.kv_heads), static_cast<int>(task % p.kv_heads));
    });
}

void compact_cpu(
    Tensor pages, Tensor arena, Tensor src_slots, Tensor k, Tensor v, Tensor keep, Tensor dst_slots,
    std::optional<Tensor> page_scales, std::string instruction_set) {
    check_on_cpu("k", k);
    check_current(k, v, pages, arena, page_scales, Kernel::kCpu);
    check_slots("src_slots", src_slots, k);
    check_slots("dst_slots", dst_slots, k);
    const bool wide = keep.scalar_type() == ScalarType::Long;
    if (!wide) check_table("keep", keep, k);
    if (keep.device() != k.device()) refuse("keep is on another device than k");
    if (keep.dim() != 3 || keep.size(0) != k.size(0) || keep.size(1) != k.size(2) || !keep.is_contiguous()) {
        refuse(
            "keep has shape ", shape_of(keep), "; it must be (B, Hkv, M), contiguous, with B = ", k.size(0),
            ", Hkv = ", k.size(2));
    }
    std::vector<int64_t> widened;
    const auto narrow = static_cast<const int32_t*>(keep.data_ptr());
    if (!wide) widened.assign(narrow, narrow + keep.numel());
    CompactParams c{};
    c.into.k = rows_of(k), c.into.v = rows_of(v);
    c.into.pool = pool_of(pages, arena, page_scales);
    c.into.write = table_of(dst_slots), c.history = table_of(src_slots);
    c.into.batch = k.size(0), c.into.tokens = k.size(1), c.into.kv_heads = k.size(2), c.into.head_dim = k.size(3);
    c.into.dtype = dtype_of(k);
    c.keep = wide ? static_cast<int64_t*>(keep.data_ptr()) : widened.data();
    c.kept = keep.size(2);
    check_keep(
        c.into.pool, c.history, c.into.write, {c.keep, c.kept}, c.into.batch, c.into.kv_heads, c.into.tokens);
    check_apart("k", k, pages, page_scales), check_apart("v", v, pages, page_scales);
    if (keep.numel() == 0) return;
    const InstructionSet& set = instruction_set_of(instruction_set);
    const int32_t kv_heads = c.into.kv_heads;
    for_each_task(int64_t{c.into.batch} * kv_heads, stored_elements(c.into.write, c.into.pool, k), [&](int64_t task) {
        set.compact(c, static_cast<int>(task / kv_heads), static_cast<int>(task % kv_heads));
    });
}

// One of prepare_qk's tables of fp32; null where it is not given.
const float* floats(
    const char* name, const std::optional<Tensor>& x, const Tensor& qkv, int64_t rows, int64_t columns) {
    if (!x) return nullptr;
    if (x->scalar_type() != ScalarType::Float)
        refuse(name, " is ", torch::headeronly::toString(x->scalar_type()), "; it must be Float");
    if (x->device() != qkv.device()) refuse(name, " is on another device than qkv");
    const bool matrix = columns > 0;
    if (x->dim() != (matrix ? 2 : 1) || x->size(0) != rows || (matrix && x->size(1) != columns))
        refuse(name, " has shape ", shape_of(*x), "; it must have ", rows, " rows", matrix ? " of head_dim / 2" : "");
    if (!x->is_contiguous()) refuse(name, " is not contiguous; it must be");
    return static_cast<const float*>(x->data_ptr());
}

std::tuple<Tensor, Tensor> prepare_qk_cpu(
    Tensor qkv, int64_t kv_heads, std::optional<Tensor> q_scale, std::optional<Tensor> cos, std::optional<Tensor> sin,
    bool l2norm, double eps, std::string instruction_set) {
    check_on_cpu("qkv", qkv);
    check_rows("qkv", qkv, "(B, n, H + 2·Hkv, D)", Kernel::kCpu);
    const int64_t batch = qkv.size(0), tokens = qkv.size(1), head_dim = qkv.size(3);
    const int64_t heads = qkv.size(2) - 2 * kv_heads;
    if (kv_heads < 1 || heads < 1 || heads % kv_heads != 0) {
        refuse(
            "kv_heads is ", kv_heads, "; the ", qkv.size(2),
            " heads of qkv must be H + 2·kv_heads with H a multiple of kv_heads");
    }
    if (cos.has_value() != sin.has_value()) refuse("cos and sin must be given together, or neither");
    if (!(std::isfinite(eps) && eps >= 0)) refuse("eps is ", eps, "; it must be finite and not below 0");
    PrepareParams p{};
    p.qkv = rows_of(qkv);
    p.q_scale = floats("q_scale", q_scale, qkv, heads, 0);
    p.cos = floats("cos", cos, qkv, tokens, head_dim / 2), p.sin = floats("sin", sin, qkv, tokens, head_dim / 2);
    p.tokens = tokens, p.heads = heads, p.kv_heads = kv_heads, p.head_dim = head_dim;
    p.dtype = dtype_of(qkv), p.l2norm = l2norm, p.eps = static_cast<float>(eps);
    const InstructionSet& set = instruction_set_of(instruction_set);
    const std::array<int64_t, 4> q_shape{batch, tokens, heads, head_dim}, k_shape{batch, tokens, kv_heads, head_dim};
    Tensor q = empty(q_shape, qkv.scalar_type());
    Tensor k = empty(k_shape, qkv.scalar_type());
    p.q = q.data_ptr(), p.k = k.data_ptr();
    for_each_task(batch * tokens, qkv.numel(), [&](int64_t token) { set.prepare_qk(p, token); });
    return {q, k};
}

// The instruction sets of this machine, best last.
std::string cpu_info() {
    std::string names;
    for (int rank = 0; const InstructionSet* set = instruction_set(rank); ++rank)
        names += (rank > 0 ? " " : "") + std::string(set->name);
    return names;
}

}  // namespace
}  // namespace amskv::cpu

// The schemas of amskv::attn and so on under names of their own. `leave_rest` does not zero what a store leaves of its
// pages: nothing on a CPU reads it. `instruction_set` is for tests and benchmarks, "" the best there is, "none"
// nothing at all.
STABLE_TORCH_LIBRARY_FRAGMENT(amskv, m) {
    m.def(
        "attn_cpu(Tensor q, Tensor k, Tensor v, Tensor(a!) pages, Tensor arena, Tensor read_slots, Tensor write_slots, "
        "float softmax_scale, Tensor(b!)? page_scales=None, bool leave_rest=False, str instruction_set=\"\") "
        "-> (Tensor, Tensor)");
    m.def(
        "attn_ragged_cpu(Tensor q, Tensor k, Tensor v, Tensor(a!) pages, Tensor arena, Tensor read_slots, "
        "Tensor write_slots, Tensor row_starts, float softmax_scale, Tensor(b!)? page_scales=None, "
        "str instruction_set=\"\") -> (Tensor, Tensor)");
    m.def(
        "append_cpu(Tensor k, Tensor v, Tensor(a!) pages, Tensor arena, Tensor write_slots, "
        "Tensor(b!)? page_scales=None, str instruction_set=\"\") -> ()");
    m.def(
        "prepare_qk_cpu(Tensor qkv, int kv_heads, Tensor? q_scale=None, Tensor? cos=None, Tensor? sin=None, "
        "bool l2norm=False, float eps=1e-12, str instruction_set=\"\") -> (Tensor, Tensor)");
    m.def(
        "compact_cpu(Tensor(a!) pages, Tensor arena, Tensor src_slots, Tensor k, Tensor v, Tensor keep, "
        "Tensor dst_slots, Tensor(b!)? page_scales=None, str instruction_set=\"\") -> ()");
    m.def("cpu_info() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(amskv, CompositeExplicitAutograd, m) {
    m.impl("attn_cpu", TORCH_BOX(&amskv::cpu::attn_cpu));
    m.impl("attn_ragged_cpu", TORCH_BOX(&amskv::cpu::attn_ragged_cpu));
    m.impl("compact_cpu", TORCH_BOX(&amskv::cpu::compact_cpu));
    m.impl("append_cpu", TORCH_BOX(&amskv::cpu::append_cpu));
    m.impl("prepare_qk_cpu", TORCH_BOX(&amskv::cpu::prepare_qk_cpu));
    m.impl("cpu_info", TORCH_BOX(&amskv::cpu::cpu_info));
}
