// The executor's device, for the op library built without CUDA: a Hopper GPU of one multiprocessor, CPU tensors.
#include "amskv/amskv.h"
#include "binding/device_scope.h"

namespace amskv {

DeviceScope::DeviceScope(const torch::stable::Tensor&) {}

Error device_of_current(Device* device) {
    *device = {1, 227 * 1024, kHopperCapability};
    return kOk;
}

int32_t driver_cuda() { return 0; }

const char* error_string(Error error) { return error == kOk ? "no error" : "invalid argument"; }

}  // namespace amskv
