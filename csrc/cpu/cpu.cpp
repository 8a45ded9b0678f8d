#include "cpu/cpu.h"

#include <algorithm>
#include <array>

#ifdef __x86_64__
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace amskv::cpu {

AttnCut cut_attn(const AttnParams& p, int threads) {
    AttnCut cut{};
    cut.rows = p.heads / p.kv_heads * p.tokens;
    const int64_t heads = int64_t{p.batch} * p.kv_heads, tiles = (cut.rows + kTile - 1) / kTile;
    constexpr int kWidest = 16;  // lanes of AVX-512
    const int64_t vectors = (cut.rows + kWidest - 1) / kWidest;
    cut.rows_per_tile = static_cast<int32_t>((vectors + tiles - 1) / std::max<int64_t>(tiles, 1) * kWidest);
    const int64_t wanted = heads * tiles / (2 * threads);  // two tasks a thread even out what each of them takes
    cut.tiles_per_task = static_cast<int32_t>(std::clamp<int64_t>(wanted, 1, kMostTiles));
    cut.tasks_per_head = static_cast<int32_t>((tiles + cut.tiles_per_task - 1) / cut.tiles_per_task);
    cut.tasks = heads * cut.tasks_per_head;
    return cut;
}

#ifdef __x86_64__
// Whether there are tiles of bf16 and Linux lets this process use them, which it must be asked for.
static bool may_use_amx() {
    constexpr unsigned kTileBits = 1u << 22 | 1u << 24;  // of EDX of CPUID 7: AMX-BF16 and AMX-TILE
    constexpr long kAskForState = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    unsigned a, b, c, d;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & kTileBits) == kTileBits &&
           syscall(SYS_arch_prctl, kAskForState, kTileData) == 0;
}
#endif

const InstructionSet* instruction_set(int rank) {
#ifdef __x86_64__
    static const auto found = [] {
        constexpr int kMost = 5;
        std::array<const InstructionSet*, kMost + 1> sets{&kPlain};
        int count = 1;
        const auto add = [&](bool there, const InstructionSet& set) {
            if (there && set.attn) sets[count++] = &set;
        };
        const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
        const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                            __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
        const bool bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
        const bool slow = __builtin_cpu_is("intel");  // a pair in four times the clocks of one fused product in fp32
        add(avx2, kAvx2);
        add(bf16 && slow, kAvx512bf16);
        add(avx512, kAvx512);
        add(bf16 && !slow, kAvx512bf16);
        add(bf16 && may_use_amx(), kAmx);
        return sets;
    }();
    return found[rank];
#else
    return rank == 0 ? &kPlain : nullptr;
#endif
}

}  // namespace amskv::cpu
