"""Caches with pages of eight bits: rows that eight bits hold exactly give what fp32 pages give, whatever the policy."""

from __future__ import annotations

import copy

import pytest
import torch

from amskv_kernels import AMSKV, CachePlan, Full, PagedKVCache, ScaleSchedule
from amskv_kernels.cache import OnlineKVCache
from amskv_kernels.policies import H2O, Policy, Recent, ScaleKV, SnapKV

SCHEDULE = ScaleSchedule([(1, 1), (2, 2), (4, 4), (6, 6), (8, 8)])
LAYERS, BATCH, HEADS, D = 2, 2, 2, 64
SIZES = {"batch": BATCH, "kv_heads": HEADS, "head_dim": D}


def held_exactly(n: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Rows that eight bits hold without loss: whole numbers of which one is 127, times a power of two."""
    x = torch.randint(-126, 127, (BATCH, n, HEADS, D)).float()
    x[..., 7] = 127
    return (x * 2.0 ** torch.randint(-8, -5, (BATCH, n, HEADS, 1))).to(dtype)


POLICIES = [
    Full(), AMSKV(demanding_layers=(1,)), Recent(30), SnapKV(24), H2O(20), ScaleKV(40, drafters=((1,),)),
]  # fmt: skip


def outputs(caches: list, seed: int, dtype: torch.dtype = torch.float32) -> None:
    """The same generation in both: outputs must not differ by more than rounding."""
    torch.manual_seed(seed)
    weight = torch.randn(HEADS * D, 32)
    for n in SCHEDULE.tokens:
        for layer in range(LAYERS):
            q, x = torch.randn(BATCH, n, HEADS, D).to(dtype), torch.randn(BATCH, n, 32)
            k, v = (held_exactly(n, dtype) for _ in "kv")
            found = []
            for cache in caches:
                if isinstance(cache, PagedKVCache):
                    cache.prepare(layer, x, weight)
                found.append(cache.attend(layer, q, k, v))
            tolerance = 1e-4 if dtype == torch.float32 else 2e-2
            torch.testing.assert_close(found[0], found[1], rtol=tolerance, atol=tolerance)
            assert found[0].isfinite().all()


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: type(policy).__name__)
def test_generations_are_those_of_fp32_pages(policy: Policy):
    plan = CachePlan.build(SCHEDULE, policy, LAYERS, kv_heads=HEADS)
    eight, full = (PagedKVCache(plan, dtype=dtype, **SIZES) for dtype in (torch.int8, torch.float32))
    eight.page_scales.fill_(torch.nan)
    for seed in range(2):
        outputs([eight, full], seed)
        eight.reset()
        full.reset()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_one_cache_takes_every_dtype_of_its_models(dtype):
    plan = CachePlan.build(SCHEDULE, Full(), LAYERS)
    eight, half = (PagedKVCache(plan, dtype=pages, **SIZES) for pages in (torch.int8, dtype))
    outputs([eight, half], 3, dtype)
    eight.reset()
    outputs([eight, PagedKVCache(plan, dtype=torch.float32, **SIZES)], 4)


@pytest.mark.parametrize("theta", [-100.0, 100.0])
def test_the_online_mode_grows_pages_and_scales(theta):
    policy = AMSKV.with_capacity(9, 40, condensed=2)
    eight, full = (
        OnlineKVCache(SCHEDULE, LAYERS, policy, theta, dtype=dtype, **SIZES) for dtype in (torch.int8, torch.float32)
    )
    for seed in range(2):
        outputs([eight, full], seed)
        assert eight.nbytes * 64 * 4 == full.nbytes * 68  # D bytes and a scale to four bytes each
        eight.reset()
        full.reset()


@pytest.mark.parametrize("dtype", [torch.int8, torch.float32], ids=str)
def test_the_online_mode_counts_every_byte_it_takes(dtype):
    cache = OnlineKVCache(SCHEDULE, LAYERS, AMSKV.with_capacity(9, 40, condensed=2), -100.0, dtype=dtype, **SIZES)
    outputs([cache, OnlineKVCache(SCHEDULE, LAYERS, cache.policy, -100.0, dtype=dtype, **SIZES)], 7)
    taken = [each for each in vars(cache._pool).values() if isinstance(each, torch.Tensor) and each.dim() > 2]
    assert cache.nbytes == sum(each.nbytes for each in taken) > 0


def test_bytes_are_pages_and_scales():
    plan = CachePlan.build(SCHEDULE, Full(), LAYERS)
    cache = PagedKVCache(plan, dtype=torch.int8, **SIZES)
    assert cache.nbytes == cache.pages.nbytes + cache.page_scales.nbytes
    assert cache.nbytes == plan.allocated_tokens * 2 * (D + 4) * BATCH * HEADS
    assert PagedKVCache(plan, **SIZES).page_scales is None


def test_a_copied_cache_has_scales_of_its_own():
    cache = PagedKVCache(CachePlan.build(SCHEDULE, Full(), LAYERS), dtype=torch.int8, **SIZES)
    outputs([cache, copy.deepcopy(cache)], 5)
    cache.reset()
    twin = copy.deepcopy(cache)
    twin.page_scales.fill_(torch.nan)
    outputs([cache, PagedKVCache(cache.plan, dtype=torch.float32, **SIZES)], 6)
    assert twin.page_scales.isnan().all()


def test_compiled_attention_passes_the_scales():
    plan = CachePlan.build(ScaleSchedule([(1, 1), (2, 2)]), Full(), 1)
    eight, full = (PagedKVCache(plan, dtype=dtype, **SIZES) for dtype in (torch.int8, torch.float32))
    step = torch.compile(lambda q, k, v: eight.attend(0, q, k, v), backend="aot_eager")
    for n in (1, 4):
        q, k, v = torch.randn(BATCH, n, HEADS, D), held_exactly(n), held_exactly(n)
        torch.testing.assert_close(step(q, k, v), full.attend(0, q, k, v), rtol=1e-4, atol=1e-4)
