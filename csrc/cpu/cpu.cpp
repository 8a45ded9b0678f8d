#include "cpu/cpu.h"

#include <algorithm>
#include <array>
#include <cstring>

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

void store_rows(const AppendParams& p, int batch, int head) {
    constexpr int32_t kRowsMask = (1 << kRowsBits) - 1;
    const int32_t* const slots = p.write.data + batch * p.write.batch_stride + head * p.write.head_stride;
    const int64_t size = p.dtype == DType::kFloat32 ? 4 : 2, bytes = size * p.head_dim;
    int64_t token = p.tokens;
    for (int i = 0; i < p.write.count; ++i) token -= slots[i] & kRowsMask;  // below 0: rows that the first page holds
    for (int i = 0; i < p.write.count; ++i) {
        const int rows = slots[i] & kRowsMask;
        if (rows == 0) continue;
        const int64_t page = p.pool.arena[batch * p.kv_heads + head] + (slots[i] >> kRowsBits);
        char* to = static_cast<char*>(p.pool.pages) + page * 2 * p.pool.page_size * bytes;
        for (const Rows* const x : {&p.k, &p.v}) {
            const char* const from =
                static_cast<const char*>(x->data) + (batch * x->batch_stride + head * x->head_stride) * size;
            for (int64_t row = std::max<int64_t>(0, -token); row < rows; ++row)
                std::memcpy(to + row * bytes, from + (token + row) * x->token_stride * size, bytes);
            std::memset(to + rows * bytes, 0, (p.pool.page_size - rows) * bytes);
            to += p.pool.page_size * bytes;
        }
        token += rows;
    }
}

}  // namespace amskv::cpu
