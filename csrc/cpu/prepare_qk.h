// L2 norm, per-head scale and rotation of one token's heads of q and k, in fp32, rounded once.
#pragma once

#include "cpu/cpu.h"
#include "cpu/vector.h"

namespace amskv::cpu {
namespace {

inline float sum_of(Vec x) {
    float sum = 0;
    for (int i = 0; i < kLanes; ++i) sum += x[i];
    return sum;
}

// The token's angles beside each element: cos cos …, and −sin sin … for the pair's first and second.
struct Rotation {
    alignas(64) float cos[kMostHeadDim];
    alignas(64) float sin[kMostHeadDim];
};

inline Vec swap_pairs(Vec x) {
    Vec swapped;
    for (int i = 0; i < kLanes; ++i) swapped[i] = x[i ^ 1];
    return swapped;
}

template <typename T>
void prepare_head(const PrepareParams& p, const T* from, float scale, const Rotation& rotation, T* to) {
    float norm = 1;
    if (p.l2norm) {
        Vec squares = {};
        for (int d = 0; d < p.head_dim; d += kLanes) squares += load(from + d) * load(from + d);
        norm = __builtin_sqrtf(sum_of(squares));
        if (norm <= p.eps) norm = p.eps;  // NaN stays NaN
    }
    for (int d = 0; d < p.head_dim; d += kLanes) {
        Vec x = load(from + d) / norm * scale;
        if (p.cos) x = x * load(rotation.cos + d) + swap_pairs(x) * load(rotation.sin + d);
        store(to + d, x);
    }
}

template <typename T>
void prepare_token(const PrepareParams& p, int64_t token) {
    const int64_t batch = token / p.tokens, at = token % p.tokens;
    Rotation rotation;
    for (int i = 0; p.cos && i < p.head_dim / 2; ++i) {
        rotation.cos[2 * i] = rotation.cos[2 * i + 1] = p.cos[at * (p.head_dim / 2) + i];
        rotation.sin[2 * i + 1] = p.sin[at * (p.head_dim / 2) + i];
        rotation.sin[2 * i] = -rotation.sin[2 * i + 1];
    }
    const T* from = static_cast<const T*>(p.qkv.data) + batch * p.qkv.batch_stride + at * p.qkv.token_stride;
    T* q = static_cast<T*>(p.q) + token * p.heads * p.head_dim;
    T* k = static_cast<T*>(p.k) + token * p.kv_heads * p.head_dim;
    for (int head = 0; head < p.heads; ++head, from += p.qkv.head_stride, q += p.head_dim)
        prepare_head(p, from, p.q_scale ? p.q_scale[head] : 1, rotation, q);
    for (int head = 0; head < p.kv_heads; ++head, from += p.qkv.head_stride, k += p.head_dim)
        prepare_head(p, from, 1, rotation, k);
}

inline void prepare_any(const PrepareParams& p, int64_t token) {
    switch (p.dtype) {
        case DType::kFloat32: return prepare_token<float>(p, token);
        case DType::kFloat16: return prepare_token<Half>(p, token);
        case DType::kBFloat16: return prepare_token<BFloat16>(p, token);
    }
}

}  // namespace
}  // namespace amskv::cpu
