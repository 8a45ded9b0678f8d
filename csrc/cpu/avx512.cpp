#include "cpu/attn.h"

namespace amskv::cpu {

const InstructionSet kAvx512{"avx512", &attn_any};

}  // namespace amskv::cpu
