#include "cpu/attn.h"
#include "cpu/prepare_qk.h"

namespace amskv::cpu {

const InstructionSet kAvx512bf16{"avx512bf16", &attn_any, &prepare_any};

}  // namespace amskv::cpu
