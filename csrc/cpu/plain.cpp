#include "cpu/attn.h"

namespace amskv::cpu {

const InstructionSet kPlain{"plain", &attn_any};

}  // namespace amskv::cpu
