#include "cpu/cpu.h"

#ifdef __AMX_BF16__
#include "cpu/attn.h"
#include "cpu/prepare_qk.h"
#endif

namespace amskv::cpu {

#ifdef __AMX_BF16__
const InstructionSet kAmx{"amx", &attn_any, &append_any, &compact_any, &prepare_any};
#else
const InstructionSet kAmx{};  // the compiler does not know it
#endif

}  // namespace amskv::cpu
