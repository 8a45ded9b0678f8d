"""Heads of sizes without kernels: every cache attends as at the true size, in rows of the next size that has them."""

import copy
import math

import pytest
import torch
from torch.nn import functional as F

from amskv_kernels import AMSKV, H2O, CachePlan, Full, HeatKV, PagedKVCache, ScaleKV, ScaleSchedule, SlidingWindow
from amskv_kernels.cache import OnlineKVCache, UnplannedKVCache
from amskv_kernels.planning.layout import row_size
from amskv_kernels.policies import HeadOrders

SCHEDULE = ScaleSchedule([(1, 1), (2, 2), (3, 3), (5, 4), (6, 6)])
LAYERS, HEADS, KV_HEADS, BATCH, WIDTH = 2, 4, 2, 3, 24
SIZES = {8: 64, 40: 64, 72: 96, 104: 128, 112: 128, 120: 128}
ORDERS = HeadOrders.from_scores(
    torch.rand(LAYERS, KV_HEADS, len(SCHEDULE), generator=torch.Generator().manual_seed(1)).tolist(), SCHEDULE, 1
)
WHOLE = [Full(), SlidingWindow(1), AMSKV(demanding_layers=(1,))]
CHOSEN = [H2O(12), ScaleKV(24, "paper", drafters=((0,),)), ScaleKV(24, "released", drafters=((0,),))]
MADE = {
    "planned": lambda policy, **sizes: PagedKVCache(
        CachePlan.build(SCHEDULE, policy, LAYERS, 16, kv_heads=KV_HEADS), **sizes
    ),
    "online": lambda policy, **sizes: OnlineKVCache(SCHEDULE, LAYERS, AMSKV.with_capacity(15, 40), -1.0, **sizes),
    "unplanned": lambda policy, **sizes: UnplannedKVCache(SCHEDULE, LAYERS, policy, **sizes),
}


def cache_of(kind, policy, head_dim, dtype=torch.float32):
    cache = MADE[kind](policy, batch=BATCH, kv_heads=KV_HEADS, head_dim=head_dim, dtype=dtype)
    if kind == "planned" and cache._selector is None and dtype != torch.int8:
        cache.pages.fill_(math.nan)  # a compaction copies whole rows
    return cache


def calls_of(head_dim, seed=0):
    """Layer, q, k, v of every call: views of one packed projection."""
    rng = torch.Generator().manual_seed(seed)
    for n in SCHEDULE.tokens:
        for layer in range(LAYERS):
            packed = torch.randn(BATCH, n, HEADS + 2 * KV_HEADS, head_dim, generator=rng)
            yield layer, *packed.split((HEADS, KV_HEADS, KV_HEADS), dim=2)


@pytest.mark.parametrize("head_dim", SIZES)
@pytest.mark.parametrize("kind", ["planned", "unplanned"])
@pytest.mark.parametrize("policy", WHOLE, ids=lambda policy: type(policy).__name__)
def test_attention_is_that_of_the_true_size(kind, policy, head_dim):
    cache, past = cache_of(kind, policy, head_dim), {}
    for call, (layer, q, k, v) in enumerate(calls_of(head_dim)):
        step = call // LAYERS
        past[step, layer] = k, v
        seen = [past[each, layer] for each in (*policy.visible(SCHEDULE, layer, step), step)]
        keys, values = (torch.cat(each, dim=1).repeat_interleave(2, dim=2).double() for each in zip(*seen, strict=True))
        weights = (torch.einsum("bqhd,bkhd->bhqk", q.double(), keys) / math.sqrt(head_dim)).softmax(-1)
        out = cache.attend(layer, q, k, v)
        assert out.shape == q.shape and out.is_contiguous()
        torch.testing.assert_close(out.double(), torch.einsum("bhqk,bkhd->bqhd", weights, values), rtol=0, atol=1e-5)


def wider(x, size):
    return F.pad(x, (0, size - x.shape[-1]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8])
@pytest.mark.parametrize("head_dim", [40, 104])
@pytest.mark.parametrize(
    ("kind", "policy"),
    [*(("planned", policy) for policy in (*CHOSEN, HeatKV(0.6, ORDERS))), ("online", None), ("unplanned", Full())],
    ids=lambda each: getattr(each, "mode", type(each).__name__) if each is not None else "",
)
def test_every_cache_does_as_with_heads_that_zeros_make_longer(kind, policy, head_dim, dtype):
    size, rng = SIZES[head_dim], torch.Generator().manual_seed(3)
    padded, long = (cache_of(kind, policy, each, dtype) for each in (head_dim, size))
    weight = torch.randn(HEADS, head_dim, WIDTH, generator=rng)
    # Raw queries are scaled by the size of heads; the longer ones make up for theirs.
    longer = F.pad(weight, (0, 0, 0, size - head_dim)) * math.sqrt(size / head_dim)
    for layer, q, k, v in calls_of(head_dim):
        if kind == "planned":
            x = torch.randn(BATCH, q.shape[1], WIDTH, generator=rng)
            padded.prepare(layer, x, weight.flatten(0, 1))
            long.prepare(layer, x, longer.flatten(0, 1))
        got = padded.attend(layer, q, k, v)
        expected = long.attend(layer, *(wider(each, size) for each in (q, k, v)), 1 / math.sqrt(head_dim))
        torch.testing.assert_close(got, expected[..., :head_dim], rtol=0, atol=1e-5)
    assert padded.nbytes == long.nbytes


def test_lse_looks_and_what_lies_beside_are_of_the_true_size():
    head_dim, scale = 104, 1 / math.sqrt(104)
    cache, again = cache_of("planned", Full(), head_dim), cache_of("planned", Full(), head_dim)
    for layer, q, k, v in calls_of(head_dim):
        if layer == 0:
            looked = again.look(layer, q, k, v)
        out, lse = cache.attend_with_lse(layer, q, k, v)
        torch.testing.assert_close(again.attend(layer, q, k, v), out)
        if layer == 0:
            torch.testing.assert_close(looked, out)
        apart, own_lse = cache.attend_beside(q, k, v, scale)
        logits = torch.einsum("bqhd,bkhd->bhqk", q, k.repeat_interleave(2, dim=2)) * scale
        torch.testing.assert_close(own_lse, logits.logsumexp(-1))
        values = v.repeat_interleave(2, dim=2)
        torch.testing.assert_close(apart, torch.einsum("bhqk,bkhd->bqhd", logits.softmax(-1), values))
        assert lse.shape == own_lse.shape and (lse >= own_lse - 1e-5).all()


@pytest.mark.parametrize("kind", MADE)
def test_heads_of_another_size_are_refused_and_change_nothing(kind):
    cache = cache_of(kind, Full(), 104)
    layer, q, k, v = next(calls_of(104))
    for bad, name, message in (
        ((q[..., :96], k, v), "q", r"\(3, 1, 4, 96\)"),
        ((q, wider(k, 128), v), "k", r"\(3, 1, 2, 128\)"),
        ((q, k, wider(v, 112)), "v", r"\(3, 1, 2, 112\)"),
        ((q[:, :, 0], k, v), "q", r"\(3, 1, 104\)"),
    ):
        with pytest.raises(ValueError, match=rf"^{name} has shape {message}; it must be \(B, n, heads, D = 104\)"):
            cache.attend(layer, *bad)
    assert cache.attend(layer, q, k, v).shape == q.shape


def test_what_rows_cost_is_shown():
    for kind in MADE:
        cache = cache_of(kind, Full(), 104)
        cache.attend(*next(calls_of(104)))
        assert f"head_dim=104 in rows of 128, 23% more bytes, torch.float32 on cpu: {cache.nbytes} bytes" in repr(cache)
    assert "batch=3, head_dim=64, torch.float32" in repr(cache_of("planned", Full(), 64))
    cache = copy.deepcopy(cache_of("planned", Full(), 104))
    assert cache.attend(*next(calls_of(104))).shape == (BATCH, 1, HEADS, 104)
    assert {size: row_size("head_dim", size) for size in SIZES} == SIZES
    assert [row_size("head_dim", size) for size in (64, 96, 128)] == [64, 96, 128]
