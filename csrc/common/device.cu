// Facts of the current device, and what its error codes mean.
#include <cuda_runtime.h>

#include "amskv/amskv.h"

namespace amskv {

Error device_of_current(Device* device) {
    int index = 0, major = 0, minor = 0;
    if (const cudaError_t error = cudaGetDevice(&index); error != cudaSuccess) return error;
    const auto read = [&](int* value, cudaDeviceAttr attribute) {
        return cudaDeviceGetAttribute(value, attribute, index);
    };
    cudaError_t error = read(&device->multiprocessors, cudaDevAttrMultiProcessorCount);
    if (error == cudaSuccess) error = read(&device->shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin);
    if (error == cudaSuccess) error = read(&major, cudaDevAttrComputeCapabilityMajor);
    if (error == cudaSuccess) error = read(&minor, cudaDevAttrComputeCapabilityMinor);
    device->capability = 10 * major + minor;
    return error;
}

int32_t driver_cuda() {
    int version = 0;
    return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
}

const char* error_string(Error error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

}  // namespace amskv
