"""Token and head policies on the device: the CPU's results, no wait for the host, and one CUDA graph a generation."""

from __future__ import annotations

import pytest
import torch

from amskv_kernels import H2O, CachePlan, HeatKV, PagedKVCache, Recent, ScaleKV, ScaleSchedule, SnapKV
from amskv_kernels.policies import HeadOrders

SCHEDULE = ScaleSchedule([(1, 1), (2, 2), (4, 4), (6, 7), (8, 8), (12, 12)])
LAYERS, BATCH, HEADS, D = 2, 2, 3, 64
SCORES = torch.rand(LAYERS, HEADS, len(SCHEDULE), generator=torch.Generator().manual_seed(0)).tolist()
POLICIES = [
    ScaleKV(40), ScaleKV(40, "paper"), SnapKV(40), H2O(40), Recent(40, 3),
    HeatKV(0.5, HeadOrders.from_scores(SCORES, SCHEDULE, 2)),
]  # fmt: skip


def inputs(device):
    rng = torch.Generator().manual_seed(1)
    for n in SCHEDULE.tokens:
        for layer in range(LAYERS):
            qkv = torch.randn(3, BATCH, n, HEADS, D, generator=rng)
            x, weight = torch.randn(BATCH, n, 32, generator=rng), torch.randn(HEADS * D, 32, generator=rng)
            yield layer, [each.to(device) for each in qkv], x.to(device), weight.to(device)


def generate(cache, calls):
    cache.reset()
    out = []
    for layer, (q, k, v), x, weight in calls:
        cache.prepare(layer, x, weight)
        out.append(cache.attend(layer, q, k, v))
    return out


def caches(policy, device):
    plan = CachePlan.build(SCHEDULE, policy, LAYERS, 16, kv_heads=HEADS)
    return PagedKVCache(plan, batch=BATCH, kv_heads=HEADS, head_dim=D, dtype=torch.float32, device=device)


@pytest.mark.parametrize("policy", POLICIES[1:], ids=str)  # max-pooled neighbours tie: either may stay
def test_the_device_keeps_what_the_cpu_keeps(policy):
    torch.backends.cuda.matmul.allow_tf32 = False
    expected = generate(caches(policy, "cpu"), inputs("cpu"))
    for one, other in zip(generate(caches(policy, "cuda"), inputs("cuda")), expected, strict=True):
        # A key chosen otherwise, on a tie or a hair's breadth, shows in a few rows only.
        wrong = ~torch.isclose(one.cpu(), other, rtol=2e-2, atol=2e-2)
        assert wrong.float().mean() < 0.05


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_nothing_waits_and_a_generation_is_one_graph(policy):
    cache, calls = caches(policy, "cuda"), list(inputs("cuda"))
    generate(cache, calls)  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        expected = [out.clone() for out in generate(cache, calls)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = generate(cache, calls)
    for out in got:
        out.fill_(torch.nan)
    cache.pages.fill_(torch.nan)
    graph.replay()
    torch.cuda.synchronize()
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other)
