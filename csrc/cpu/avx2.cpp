#include "cpu/attn.h"

namespace amskv::cpu {

const InstructionSet kAvx2{"avx2", &attn_any};

}  // namespace amskv::cpu
