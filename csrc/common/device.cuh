// The one place that says what a device primitive is: PTX under nvcc, its documented meaning under a host compiler.
#pragma once

#ifdef __CUDACC__
#include "common/primitives.cuh"
#else
#include "host_primitives.h"  // tests/host
#endif
