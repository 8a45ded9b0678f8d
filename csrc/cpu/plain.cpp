#include "cpu/attn.h"
#include "cpu/prepare_qk.h"

namespace amskv::cpu {

const InstructionSet kPlain{"plain", &attn_any, &append_any, &compact_any, &prepare_any};

}  // namespace amskv::cpu
