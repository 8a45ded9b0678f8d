// The Hopper kernel as the rest sees it.
#pragma once

#include "amskv/amskv.h"

namespace amskv::hopper {

// What the Hopper kernel needs of a call beyond its contract: a head size it has, strides that the copy engine can step
// by, and 16-bit pages (docs/hopper.md says why).
bool serves(const AttnParams& params);

Error attn(const AttnParams& params, const HopperPlan& plan, Stream stream);

}  // namespace amskv::hopper
