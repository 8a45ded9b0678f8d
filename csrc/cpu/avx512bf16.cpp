#include "cpu/cpu.h"

#ifdef __AVX512BF16__
#include "cpu/attn.h"
#include "cpu/prepare_qk.h"
#endif

namespace amskv::cpu {

#ifdef __AVX512BF16__
const InstructionSet kAvx512bf16{"avx512bf16", &attn_any, &append_any, &compact_any, &prepare_any};
#else
const InstructionSet kAvx512bf16{};  // the compiler does not know it
#endif

}  // namespace amskv::cpu
