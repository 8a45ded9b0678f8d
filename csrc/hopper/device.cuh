// The one place that says what a Hopper primitive is: PTX under nvcc, its documented meaning under a host compiler.
#pragma once

#include "common/device.cuh"

#ifdef __CUDACC__
#include "hopper/primitives.cuh"
#else
#include "host_hopper_primitives.h"  // tests/host
#endif
