// How a call is cut into blocks: arithmetic on shapes, no CUDA.
#pragma once

#include "amskv/amskv.h"

namespace amskv {

struct Cut {
    int row_tiles;  // of one sequence and KV head
    int key_tiles;
    int items;  // tiles of query rows · splits · KV heads · sequences: what teams work on
    bool valid;
};

Cut cut_of(const AttnParams& params, const AttnPlan& plan);

}  // namespace amskv
