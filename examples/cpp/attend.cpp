// Two scales of one head through the launchers, without Python or torch: the first is stored on the way, the second
// reads it back. Prints lse of the second scale beside what it must be.
#include <amskv/amskv.h>
#include <cuda_runtime_api.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <vector>

namespace {

constexpr int kTokens = 4, kHeadDim = 64, kPageSize = 16;
constexpr uint16_t kOne = 0x3c00;  // 1.0 in fp16

void check(amskv::Error error, const char* what) {
    if (error == amskv::kOk) return;
    std::fprintf(stderr, "%s: %s\n", what, amskv::error_string(error));
    std::exit(1);
}

template <typename T>
T* upload(const std::vector<T>& host) {
    T* device = nullptr;
    check(cudaMalloc(reinterpret_cast<void**>(&device), host.size() * sizeof(T)), "cudaMalloc");
    check(cudaMemcpy(device, host.data(), host.size() * sizeof(T), cudaMemcpyHostToDevice), "cudaMemcpy");
    return device;
}

}  // namespace

int main() {
    amskv::Device device{};
    check(amskv::device_of_current(&device), "no usable GPU");

    // q = k = v = 1 everywhere: every score is head_dim · softmax_scale = 8.
    const auto* const ones = upload(std::vector<uint16_t>(kTokens * kHeadDim, kOne));
    const amskv::Rows rows{ones, kTokens * kHeadDim, kHeadDim, kHeadDim};
    const auto* const slot = upload(std::vector<int32_t>{0 << amskv::kRowsBits | kTokens});  // page 0, four rows
    const amskv::SlotTable page{slot, 0, 0, 1}, none{slot, 0, 0, 0};

    amskv::AttnParams p{};
    p.q = p.k = p.v = rows;
    p.pool = {upload(std::vector<uint16_t>(2 * kPageSize * kHeadDim)), upload(std::vector<int32_t>{0}), kPageSize, 1};
    p.out = upload(std::vector<uint16_t>(kTokens * kHeadDim));
    p.lse = upload(std::vector<float>(kTokens));
    p.softmax_scale = 1 / std::sqrt(float{kHeadDim});
    p.batch = p.heads = p.kv_heads = 1;
    p.tokens = kTokens, p.head_dim = kHeadDim, p.dtype = amskv::DType::kFloat16;

    for (const bool first : {true, false}) {
        p.read = first ? none : page;
        p.write = first ? page : none;
        const amskv::AttnPlan plan = amskv::plan_attn(p, device);
        void* workspace = nullptr;
        if (const size_t bytes = amskv::attn_workspace_bytes(p, plan))
            check(cudaMalloc(&workspace, bytes), "cudaMalloc");
        check(amskv::attn(p, plan, workspace, nullptr), "attn");
    }

    std::vector<float> lse(kTokens);
    check(cudaMemcpy(lse.data(), p.lse, sizeof(float) * kTokens, cudaMemcpyDeviceToHost), "cudaMemcpy");
    std::printf("lse %.4f, expected %.4f\n", lse[0], 8 + std::log(2.0 * kTokens));
    return std::fabs(lse[0] - (8 + std::log(2.0 * kTokens))) < 1e-3 ? 0 : 1;
}
