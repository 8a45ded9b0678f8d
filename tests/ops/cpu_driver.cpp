// Random calls of the CPU kernels in every instruction set, each array on the heap with not an element to spare,
// against the definition in double. Exits with 1 at the first difference; test_cpu_sanitized.py compiles it.
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <limits>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

#include "cpu/cpu.h"

using namespace amskv;

namespace {

std::mt19937 rng(20260101);
int below(int limit) { return static_cast<int>(rng() % limit); }
float normal() { return std::normal_distribution<float>()(rng); }

// A float as bf16 holds it, and as its 16 bits.
float rounded(float x) {
    const auto bits = std::bit_cast<uint32_t>(x);
    return x != x ? x : std::bit_cast<float>((bits + 0x7fff + ((bits >> 16) & 1)) & 0xffff0000);
}
uint16_t upper_bits(float x) { return std::bit_cast<uint32_t>(x) >> 16; }

struct Call {
    DType dtype;
    bool eight_bits;  // pages of int8, `pages` what they stand for
    int batch = 1 + below(2), kv_heads = 1 + below(2), group = 1 + below(3), tokens = 1 + below(150);
    int head_dim = 64 + 32 * below(3), page_size = 16 << below(4);
    int gap = below(3);  // elements between the rows of q, k and v
    std::vector<int32_t> read, write, arena;
    std::vector<float> pages, q, k, v, out, lse;
    std::vector<uint16_t> bf16[5];  // pages, q, k, v, out as a call in bf16 takes them
    std::vector<int8_t> bytes;
    std::vector<float> scales;

    Call(DType type, bool int8_pages) : dtype(type), eight_bits(int8_pages) {
        for (int i = below(5); i > 0; --i) read.push_back(below(page_size + 1));
        const int held = below(2) ? below(page_size) : 0;
        for (int left = below(2) ? tokens + held : 0; left > 0; left -= write.back())
            write.push_back(std::min(left, write.empty() ? std::max(held + 1, page_size) : 1 + below(page_size)));
        const int span = static_cast<int>(read.size() + write.size());
        for (int i = 0; i < span; ++i) {
            int32_t& slot = i < static_cast<int>(read.size()) ? read[i] : write[i - read.size()];
            slot |= (span - 1 - i) << kRowsBits;
        }
        if (held && !write.empty()) read.push_back((write[0] >> kRowsBits << kRowsBits) | held);
        for (int i = 0; i < batch * kv_heads; ++i) arena.push_back(i * span);
        pages.assign(int64_t{batch} * kv_heads * span * 2 * half_page(), std::numeric_limits<float>::quiet_NaN());
        for (int i = 0; i < batch * kv_heads; ++i) {
            for (const int32_t slot : read) {
                float* const page = pages.data() + (arena[i] + (slot >> kRowsBits)) * 2 * half_page();
                for (int j = 0; j < (slot & 255) * head_dim; ++j) page[j] = normal(), page[half_page() + j] = normal();
            }
        }
        for (auto* x : {&q, &k, &v}) {
            const int64_t rows = int64_t{batch} * tokens * kv_heads * (x == &q ? group : 1);
            x->resize(rows * (head_dim + gap) - gap);
            for (float& value : *x) value = normal();
        }
        out.resize(int64_t{batch} * tokens * kv_heads * group * head_dim);
        lse.resize(int64_t{batch} * tokens * kv_heads * group);
        if (eight_bits) round_pages();
        if (dtype != DType::kBFloat16) return;
        std::vector<float>* const arrays[] = {&pages, &q, &k, &v, &out};
        for (int i = eight_bits ? 1 : 0; i < 5; ++i) {
            for (float& x : *arrays[i]) x = rounded(x);
            bf16[i].resize(arrays[i]->size());
            std::transform(arrays[i]->begin(), arrays[i]->end(), bf16[i].begin(), upper_bits);
        }
    }

    void round_pages() {
        bytes.assign(pages.size(), 99);
        scales.assign(pages.size() / head_dim, std::numeric_limits<float>::quiet_NaN());
        for (size_t row = 0; row < scales.size(); ++row) {
            float* const x = pages.data() + row * head_dim;
            if (x[0] != x[0]) continue;  // not named
            const auto smaller = [](float a, float b) { return std::abs(a) < std::abs(b); };
            scales[row] = std::abs(*std::max_element(x, x + head_dim, smaller)) / 127;
            for (int d = 0; d < head_dim; ++d) {
                bytes[row * head_dim + d] = static_cast<int8_t>(std::nearbyint(x[d] / scales[row]));
                x[d] = bytes[row * head_dim + d] * scales[row];
            }
        }
    }

    // Whether the rows that the call stored are within half a scale of what they were.
    bool stored_rounded() const {
        const auto add_rows = [](int sum, int slot) { return sum + (slot & 255); };
        const int held = std::accumulate(write.begin(), write.end(), -tokens, add_rows);
        for (int head = 0; head < batch * kv_heads && !write.empty(); ++head) {
            int token = -held;
            for (const int32_t slot : write) {
                const int64_t page = arena[head] + (slot >> kRowsBits);
                for (int row = 0; row < (slot & 255); ++row, ++token) {
                    for (int i = 0; i < 2 * head_dim && token >= 0; ++i) {
                        const int64_t at = (page * 2 + i / head_dim) * page_size + row, d = i % head_dim;
                        const int64_t from = (int64_t{head / kv_heads} * tokens + token) * kv_heads + head % kv_heads;
                        const float x = (i < head_dim ? k : v)[from * (head_dim + gap) + d];
                        if (!(std::abs(bytes[at * head_dim + d] * scales[at] - x) <= 0.501f * scales[at])) return false;
                    }
                }
            }
        }
        return true;
    }

    void* data(int which) {
        std::vector<float>* const arrays[] = {&pages, &q, &k, &v, &out};
        if (which == 0 && eight_bits) return bytes.data();
        return dtype == DType::kBFloat16 ? static_cast<void*>(bf16[which].data()) : arrays[which]->data();
    }

    void read_out() {
        for (size_t i = 0; i < bf16[4].size(); ++i) out[i] = std::bit_cast<float>(uint32_t{bf16[4][i]} << 16);
    }

    int64_t half_page() const { return int64_t{page_size} * head_dim; }

    Rows rows(int which, int heads) {
        const int64_t row = head_dim + gap;
        return {data(which), tokens * heads * row, heads * row, row};
    }

    AttnParams params() {
        const auto table = [](const std::vector<int32_t>& x) {
            return SlotTable{x.data(), 0, 0, static_cast<int32_t>(x.size())};
        };
        const auto num_pages = static_cast<int32_t>(pages.size() / (2 * half_page()));
        return {
            rows(1, kv_heads * group), rows(2, kv_heads), rows(3, kv_heads),
            Pool{data(0), arena.data(), page_size, num_pages, eight_bits ? scales.data() : nullptr},
            table(read), table(write), data(4), lse.data(),
            0.125f, batch, tokens, kv_heads * group, kv_heads, head_dim, dtype};
    }

    // Largest difference of one sequence and query head from the definition, whose history is that of `before`.
    double error(const std::vector<float>& before, int b, int head) const {
        const int kv_head = head / group, heads = kv_heads * group;
        std::vector<const float*> keys, values;
        for (const int32_t slot : read) {
            const int64_t page = arena[b * kv_heads + kv_head] + (slot >> kRowsBits);
            for (int row = 0; row < (slot & 255); ++row) {
                keys.push_back(before.data() + (page * 2 * page_size + row) * head_dim);
                values.push_back(keys.back() + page_size * head_dim);
            }
        }
        for (int token = 0; token < tokens; ++token) {
            const int64_t row = (int64_t{b} * tokens + token) * kv_heads + kv_head;
            keys.push_back(k.data() + row * (head_dim + gap)), values.push_back(v.data() + row * (head_dim + gap));
        }
        double worst = 0;
        for (int token = 0; token < tokens; ++token) {
            const int64_t row = (int64_t{b} * tokens + token) * heads + head;
            std::vector<double> weighed(head_dim);
            double total = 0;
            for (size_t i = 0; i < keys.size(); ++i) {
                double score = 0;
                for (int d = 0; d < head_dim; ++d) score += double{q[row * (head_dim + gap) + d]} * keys[i][d];
                const double weight = std::exp(0.125 * score);
                total += weight;
                for (int d = 0; d < head_dim; ++d) weighed[d] += weight * values[i][d];
            }
            for (int d = 0; d < head_dim; ++d)
                worst = std::max(worst, std::abs(out[row * head_dim + d] - weighed[d] / total));
            worst = std::max(worst, std::abs(lse[(int64_t{b} * heads + head) * tokens + token] - std::log(total)));
        }
        return worst;
    }
};

bool check_attn(const cpu::InstructionSet& set, DType dtype, bool int8_pages, cpu::Scratch& scratch) {
    const double allowed = dtype == DType::kBFloat16 ? 4e-2 : 2e-5;  // 4 in bf16: a rounding is 2⁻⁷
    Call call(dtype, int8_pages);
    const std::vector<float> before = call.pages;
    const AttnParams params = call.params();
    const cpu::AttnCut cut = cpu::cut_attn(params, 1 + below(8));
    for (int64_t task = cut.tasks; task-- > 0;) set.attn(params, cut, task, scratch);  // any order
    call.read_out();
    if (int8_pages && !call.stored_rounded()) {
        std::printf("%s: stored rows differ: n %d, head_dim %d\n", set.name, call.tokens, call.head_dim);
        return false;
    }
    for (int b = 0; b < call.batch; ++b) {
        for (int head = 0; head < params.heads; ++head) {
            const double error = call.error(before, b, head);
            if (!(error < allowed)) {
                std::printf("%s: attn differs by %g: n %d, head_dim %d\n", set.name, error, call.tokens, call.head_dim);
                return false;
            }
        }
    }
    return true;
}

// As many keys as a call would store, chosen at random, into the pages that it would write: each row to the bit, but for
// current ones that are rounded to eight bits.
bool check_compact(const cpu::InstructionSet& set, DType dtype, bool int8_pages) {
    Call call(dtype, int8_pages);
    const AttnParams p = call.params();
    std::vector<int64_t> there, targets;
    for (size_t i = 0; i < call.read.size(); ++i) {
        for (int row = 0; row < (call.read[i] & 255); ++row) there.push_back(int64_t(i) * call.page_size + row);
    }
    const int64_t paged = int64_t(call.read.size()) * call.page_size;
    for (int token = 0; token < call.tokens; ++token) there.push_back(paged + token);
    for (const int32_t slot : call.write) {
        for (int row = 0; row < (slot & 255); ++row) targets.push_back((slot >> kRowsBits) * 2 * call.page_size + row);
    }
    if (static_cast<int>(targets.size()) != call.tokens) return true;  // the first page holds rows
    std::vector<int64_t> keep;
    for (int head = 0; head < p.batch * p.kv_heads; ++head)
        std::sample(there.begin(), there.end(), std::back_inserter(keep), call.tokens, rng);
    const size_t size = int8_pages ? 1 : dtype == DType::kBFloat16 ? 2 : 4, row_bytes = call.head_dim * size;
    const char* const pool = static_cast<const char*>(p.pool.pages);
    const std::vector<char> before(pool, pool + call.pages.size() * size);
    const cpu::CompactParams c{
        {p.k, p.v, p.pool, p.write, p.batch, p.tokens, p.kv_heads, p.head_dim, dtype},
        p.read, keep.data(), call.tokens};
    for (int head = 0; head < p.batch * p.kv_heads; ++head) {
        set.compact(c, head / p.kv_heads, head % p.kv_heads);
        const int64_t first = int64_t{call.arena[head]} * 2 * call.page_size;
        for (int i = 0; i < 2 * call.tokens; ++i) {
            const int side = i % 2 * call.page_size, token = i / 2;
            const int64_t key = keep[int64_t{head} * call.tokens + token], to = first + targets[token] + side;
            const char* from = nullptr;
            if (key < paged) {
                const int64_t page = call.read[key / call.page_size] >> kRowsBits;
                const int64_t row = first + page * 2 * call.page_size + side + key % call.page_size;
                from = before.data() + row * row_bytes;
                if (int8_pages && call.scales[to] != call.scales[row]) return false;
            } else if (!int8_pages) {
                const Rows& x = i % 2 ? p.v : p.k;
                const int64_t at = head / p.kv_heads * x.batch_stride + head % p.kv_heads * x.head_stride;
                from = static_cast<const char*>(x.data) + (at + (key - paged) * x.token_stride) * size;
            }
            if (from && std::memcmp(pool + to * row_bytes, from, row_bytes) != 0) {
                std::printf("%s: compact differs: n %d, head_dim %d\n", set.name, call.tokens, call.head_dim);
                return false;
            }
        }
    }
    return true;
}

void run_prepare_qk(const cpu::InstructionSet& set) {
    constexpr DType kTypes[] = {DType::kFloat32, DType::kFloat16, DType::kBFloat16};
    const DType dtype = kTypes[below(3)];
    const int tokens = 1 + below(5), heads = 2, kv_heads = 1 + below(2), head_dim = 64 + 32 * below(3);
    const int64_t row = heads + 2 * kv_heads, bytes = tokens * head_dim * (dtype == DType::kFloat32 ? 4 : 2);
    std::vector<char> qkv(row * bytes), q(heads * bytes), k(kv_heads * bytes);
    for (char& x : qkv) x = static_cast<char>(rng());  // any bits
    const std::vector<float> scale(heads, 2), angles(tokens * head_dim / 2, 0.5f);
    const cpu::PrepareParams params{
        {qkv.data(), 0, row * head_dim, head_dim}, scale.data(), angles.data(), angles.data(), q.data(), k.data(),
        tokens, heads, kv_heads, head_dim, dtype, true, 1e-12f};
    for (int token = 0; token < tokens; ++token) set.prepare_qk(params, token);
}

}  // namespace

int main(int, char** arguments) {
    const auto scratch = std::make_unique<cpu::Scratch>();
    for (int rank = 0; const cpu::InstructionSet* set = cpu::instruction_set(rank); ++rank) {
        for (int i = std::atoi(arguments[1]); i > 0; --i) {
            for (const DType dtype : {DType::kFloat32, DType::kBFloat16}) {
                for (const bool int8_pages : {false, true}) {
                    if (!check_attn(*set, dtype, int8_pages, *scratch)) return 1;
                    if (!check_compact(*set, dtype, int8_pages)) return 1;
                }
            }
            run_prepare_qk(*set);
        }
        std::printf("%s\n", set->name);
    }
    return 0;
}
