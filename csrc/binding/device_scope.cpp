#include "binding/device_scope.h"

#include <dlfcn.h>

#include <stdexcept>

#include "binding/checks.h"

namespace amskv {
namespace {

// The stream shim lives in libtorch_cuda, which a CPU-only torch lacks: it is looked up among the loaded libraries.
// A weak symbol would stay null, because torch loads its libraries locally.
Stream current_stream(int32_t device) {
    using Get = AOTITorchError (*)(int32_t, void**);
    static const Get get = [] {
        void* const library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
        return library ? reinterpret_cast<Get>(dlsym(library, "aoti_torch_get_current_cuda_stream")) : nullptr;
    }();
    void* stream = nullptr;
    if (!get || get(device, &stream) != AOTI_TORCH_SUCCESS) throw std::runtime_error("this torch has no CUDA stream");
    return static_cast<Stream>(stream);
}

}  // namespace

DeviceScope::DeviceScope(const Tensor& x) {
    if (!x.is_cuda()) refuse("k is not on a CUDA device; the CUDA library serves no other");
    index_ = x.get_device_index();
    guard_.emplace(index_);
    stream_ = current_stream(index_);
}

}  // namespace amskv
