// The argument checks of amskv_kernels/ops/checks.py, for calls that reach the library without passing Python.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cfloat>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>

#include "amskv/amskv.h"

namespace amskv {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Python sees a ValueError.
template <typename... Parts>
[[noreturn]] void refuse(const Parts&... parts) {
    std::ostringstream message;
    (message << ... << parts);
    throw std::invalid_argument(message.str());
}

inline std::string shape_of(const Tensor& x) {
    std::string text = "(";
    for (int64_t i = 0; i < x.dim(); ++i) text += (i ? ", " : "") + std::to_string(x.size(i));
    return text + ")";
}

inline bool same_shape(const Tensor& x, const Tensor& y) {
    if (x.dim() != y.dim()) return false;
    for (int64_t i = 0; i < x.dim(); ++i) {
        if (x.size(i) != y.size(i)) return false;
    }
    return true;
}

// Whose kernels are called: the GPU's take 16-bit elements and pages at multiples of 16 bytes, the CPU's fp32 too.
enum class Kernel { kGpu, kCpu };

inline void check_rows(const char* name, const Tensor& x, const char* layout, Kernel kernel = Kernel::kGpu) {
    if (x.dim() != 4) refuse(name, " has ", x.dim(), " dimensions; it must have 4, ", layout);
    const ScalarType type = x.scalar_type();
    const bool fp32 = kernel == Kernel::kCpu;
    if (type != ScalarType::Half && type != ScalarType::BFloat16 && !(fp32 && type == ScalarType::Float)) {
        const char* const taken = fp32 ? "; the CPU kernels take Half, BFloat16 and Float"
                                       : "; the CUDA library takes Half and BFloat16";
        refuse(name, " is ", torch::headeronly::toString(type), taken);
    }
    const int64_t head_dim = x.size(3);
    if (head_dim != 64 && head_dim != 96 && head_dim != 128) {
        refuse(name, " has head_dim ", head_dim, "; it must be one of (64, 96, 128)");
    }
    if (x.size(2) < 1) refuse(name, " has no heads; it must have at least 1");
    if (x.stride(3) != 1) refuse(name, " has stride ", x.stride(3), " in its last dimension; it must be 1");
}

inline void check_same(const char* name, const Tensor& x, const char* other_name, const Tensor& other) {
    if (x.scalar_type() != other.scalar_type()) {
        refuse(
            name, " is ", torch::headeronly::toString(x.scalar_type()), "; it must be ",
            torch::headeronly::toString(other.scalar_type()), ", as ", other_name);
    }
    if (x.device() != other.device()) refuse(name, " is on another device than ", other_name);
}

inline void check_table(const char* name, const Tensor& table, const Tensor& k) {
    if (table.scalar_type() != ScalarType::Int) {
        refuse(name, " is ", torch::headeronly::toString(table.scalar_type()), "; it must be Int");
    }
    if (table.device() != k.device()) refuse(name, " is on another device than k");
    if (!table.is_contiguous()) refuse(name, " is not contiguous; it must be");
}

// How many sequences there are: as many as k has, unless their rows are packed.
inline int64_t sequences_of(const Tensor& k, int64_t packed) { return packed < 0 ? k.size(0) : packed; }

inline void check_slots(const char* name, const Tensor& slots, const Tensor& k, int64_t packed = -1) {
    check_table(name, slots, k);
    const int64_t sequences = sequences_of(k, packed);
    const auto fits = [&](int64_t axis, int64_t full) { return slots.size(axis) == 1 || slots.size(axis) == full; };
    if (slots.dim() != 3 || !fits(0, sequences) || !fits(1, k.size(2))) {
        refuse(
            name, " has shape ", shape_of(slots), "; it must be (B|1, Hkv|1, S) with B = ", sequences,
            ", Hkv = ", k.size(2));
    }
}

// Pages of int8 have scales, and no others.
inline void check_page_scales(const std::optional<Tensor>& page_scales, const Tensor& pages) {
    const char* const type = torch::headeronly::toString(pages.scalar_type());
    if (pages.scalar_type() != ScalarType::Char) {
        if (page_scales) refuse("page_scales is given for pages of ", type, "; only pages of Char have scales");
        return;
    }
    if (!page_scales) refuse("page_scales is None; pages of Char need the scale of every row");
    if (page_scales->scalar_type() != ScalarType::Float) {
        refuse("page_scales is ", torch::headeronly::toString(page_scales->scalar_type()), "; it must be Float");
    }
    if (page_scales->device() != pages.device()) refuse("page_scales is on another device than pages");
    if (page_scales->dim() != 3 || page_scales->size(0) != pages.size(0) || page_scales->size(1) != 2 ||
        page_scales->size(2) != pages.size(2)) {
        refuse(
            "page_scales has shape ", shape_of(*page_scales), "; it must be (num_pages, 2, page_size) = (",
            pages.size(0), ", 2, ", pages.size(2), ")");
    }
    if (!page_scales->is_contiguous()) refuse("page_scales is not contiguous; it must be");
}

// k, v, pages, arena and page_scales; rows of `packed` sequences, where they are.
inline void check_current(
    const Tensor& k, const Tensor& v, const Tensor& pages, const Tensor& arena,
    const std::optional<Tensor>& page_scales, Kernel kernel = Kernel::kGpu, int64_t packed = -1) {
    check_rows("k", k, "(B, n, Hkv, D)", kernel);
    check_rows("v", v, "(B, n, Hkv, D)", kernel);
    if (!same_shape(v, k)) refuse("v has shape ", shape_of(v), "; it must have that of k, ", shape_of(k));
    check_same("v", v, "k", k);
    if (pages.scalar_type() == ScalarType::Char) {
        if (pages.device() != k.device()) refuse("pages is on another device than k");
    } else {
        check_same("pages", pages, "k", k);
    }
    if (pages.dim() != 4 || pages.size(1) != 2 || pages.size(3) != k.size(3)) {
        refuse("pages has shape ", shape_of(pages), "; it must be (num_pages, 2, page_size, D = ", k.size(3), ")");
    }
    const int64_t page_size = pages.size(2);
    if (page_size != 16 && page_size != 32 && page_size != 64 && page_size != 128) {
        refuse("pages has a page_size of ", page_size, "; it must be one of (16, 32, 64, 128)");
    }
    if (!pages.is_contiguous()) refuse("pages is not contiguous; it must be");
    if (kernel == Kernel::kGpu && reinterpret_cast<uintptr_t>(pages.data_ptr()) % 16 != 0)
        refuse("pages must begin at a multiple of 16 bytes");
    check_page_scales(page_scales, pages);
    check_table("arena", arena, k);
    const int64_t sequences = sequences_of(k, packed);
    if (arena.dim() != 2 || arena.size(0) != sequences || arena.size(1) != k.size(2)) {
        refuse("arena has shape ", shape_of(arena), "; it must be (B, Hkv) = (", sequences, ", ", k.size(2), ")");
    }
}

inline void check_attn(
    const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& pages, const Tensor& arena,
    const Tensor& read_slots, const Tensor& write_slots, double softmax_scale,
    const std::optional<Tensor>& page_scales, Kernel kernel = Kernel::kGpu, int64_t packed = -1) {
    check_rows("q", q, "(B, n, H, D)", kernel);
    check_current(k, v, pages, arena, page_scales, kernel, packed);
    check_same("q", q, "k", k);
    if (q.size(0) != k.size(0) || q.size(1) != k.size(1) || q.size(3) != k.size(3)) {
        refuse("q has shape ", shape_of(q), "; its B, n and D must be those of k, which has shape ", shape_of(k));
    }
    if (q.size(2) % k.size(2) != 0) {
        refuse("q has ", q.size(2), " heads; they must be a multiple of the ", k.size(2), " KV heads of k");
    }
    check_slots("read_slots", read_slots, k, packed);
    check_slots("write_slots", write_slots, k, packed);
    if (!(softmax_scale >= FLT_MIN && softmax_scale <= FLT_MAX / 2)) {  // half: kernels multiply it by log2(e)
        refuse("softmax_scale is ", softmax_scale, "; it must be finite and above 0, in fp32 as well");
    }
}

}  // namespace amskv
