// Tensors as the launchers' plain structs.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "amskv/amskv.h"

namespace amskv {

using torch::stable::Tensor;

// A stride that no index multiplies may be anything.
inline int64_t stride_of(const Tensor& x, int64_t axis) { return x.size(axis) > 1 ? x.stride(axis) : 0; }

inline Rows rows_of(const Tensor& x) { return {x.data_ptr(), stride_of(x, 0), stride_of(x, 1), stride_of(x, 2)}; }

inline SlotTable table_of(const Tensor& slots) {
    return {
        static_cast<const int32_t*>(slots.data_ptr()), stride_of(slots, 0), stride_of(slots, 1),
        static_cast<int32_t>(slots.size(2))};
}

inline Pool pool_of(const Tensor& pages, const Tensor& arena, const std::optional<Tensor>& page_scales) {
    return {
        pages.data_ptr(), static_cast<const int32_t*>(arena.data_ptr()), static_cast<int32_t>(pages.size(2)),
        static_cast<int32_t>(pages.size(0)), page_scales ? static_cast<float*>(page_scales->data_ptr()) : nullptr};
}

}  // namespace amskv
