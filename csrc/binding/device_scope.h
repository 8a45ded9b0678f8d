// The device and stream that a call runs on.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>

#include "amskv/amskv.h"

namespace amskv {

// Makes the tensor's device current for its lifetime; refuses tensors that are not on a CUDA device.
class DeviceScope {
public:
    explicit DeviceScope(const torch::stable::Tensor& x);

    int32_t index() const { return index_; }
    Stream stream() const { return stream_; }

private:
    int32_t index_ = 0;
    Stream stream_ = nullptr;
    std::optional<torch::stable::accelerator::DeviceGuard> guard_;
};

}  // namespace amskv
