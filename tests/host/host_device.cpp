// The executor's device, for the op library built without CUDA: an sm_80 with one multiprocessor, CPU tensors.
#include "amskv/amskv.h"
#include "device_scope.h"

namespace amskv {

DeviceScope::DeviceScope(const torch::stable::Tensor&) {}

Error device_of_current(Device* device) {
    *device = {1, 163 * 1024, kLeastCapability};
    return kOk;
}

int32_t driver_cuda() { return 0; }

const char* error_string(Error error) { return error == kOk ? "no error" : "invalid argument"; }

}  // namespace amskv
