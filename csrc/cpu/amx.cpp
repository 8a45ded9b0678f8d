#include "cpu/attn.h"
#include "cpu/prepare_qk.h"

namespace amskv::cpu {

const InstructionSet kAmx{"amx", &attn_any, &prepare_any};

}  // namespace amskv::cpu
