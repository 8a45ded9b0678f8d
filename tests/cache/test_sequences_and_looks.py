"""What generations do beside one step after another: sequences that leave, steps run twice, lse, counts not planned."""

import math

import pytest
import torch

from amskv_kernels import AMSKV, H2O, Full, HeatKV, PagedKVCache, ScaleKV, ScaleSchedule, SlidingWindow
from amskv_kernels.cache import OnlineKVCache, UnplannedKVCache
from amskv_kernels.planning.plan import CachePlan
from amskv_kernels.policies import HeadOrders

SCHEDULE = ScaleSchedule([(1, 1), (2, 2), (3, 3), (5, 4), (6, 6)])
LAYERS, HEADS, KV_HEADS, HEAD_DIM = 2, 4, 2, 64
CLOSE = {"rtol": 0, "atol": 1e-5}


def inputs(batch, seed=0, counts=None):
    """q, k, v of every call, by step and layer; queries grouped over fewer KV heads."""
    rng = torch.Generator().manual_seed(seed)
    return {
        (step, layer): tuple(
            torch.randn(batch, (counts or {}).get((step, layer), n), heads, HEAD_DIM, generator=rng)
            for heads in (HEADS, KV_HEADS, KV_HEADS)
        )
        for step, n in enumerate(SCHEDULE.tokens)
        for layer in range(LAYERS)
    }


def paged(policy, batch, dtype=torch.float32):
    plan = CachePlan.build(SCHEDULE, policy, LAYERS, 16, kv_heads=KV_HEADS)
    cache = PagedKVCache(plan, batch=batch, kv_heads=KV_HEADS, head_dim=HEAD_DIM, dtype=dtype)
    cache.pages.fill_(127 if dtype == torch.int8 else math.nan)  # what nothing stored is read by nothing
    if cache.page_scales is not None:
        cache.page_scales.fill_(math.nan)
    return cache


def orders():
    scores = torch.rand(LAYERS, KV_HEADS, len(SCHEDULE), generator=torch.Generator().manual_seed(1)).tolist()
    return HeadOrders.from_scores(scores, SCHEDULE, 1)


POLICIES = [Full(), SlidingWindow(1), H2O(12), ScaleKV(24, "paper", drafters=((0,),)), HeatKV(0.6, orders())]


def run(cache, calls, leave_at=None, batch=None):
    outs = []
    for (step, layer), qkv in calls.items():
        if step == leave_at and layer == 0:
            cache.keep_first(batch)
        part = qkv if leave_at is None or step < leave_at else [each[:batch] for each in qkv]
        outs.append(cache.attend(layer, *part))
    return outs


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8])
@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: type(policy).__name__)
def test_sequences_that_stay_get_what_they_would_have_got(policy, dtype):
    calls, cache = inputs(4), paged(policy, 4, dtype)
    cache.pages.zero_()  # a compaction copies whole rows
    whole = run(cache, calls)
    for leave_at in (0, 2, 4):
        cache.reset()
        got = run(cache, calls, leave_at, 1)
        assert cache.batch == 1 and got[-1].shape[0] == 1
        for one, other in zip(got, whole, strict=True):
            torch.testing.assert_close(one, other[: len(one)], **CLOSE)
    cache.reset()  # they are all back
    assert cache.batch == 4
    for one, other in zip(run(cache, calls), whole, strict=True):
        assert torch.equal(one, other)


def test_sequences_leave_the_online_mode_too():
    cache = OnlineKVCache(
        SCHEDULE, LAYERS, AMSKV.with_capacity(15, 40), -1.0, batch=3, kv_heads=KV_HEADS, head_dim=HEAD_DIM,
        dtype=torch.float32,
    )  # fmt: skip
    calls = inputs(3)
    whole = run(cache, calls)
    cache.reset()
    got = run(cache, calls, 2, 2)
    for one, other in zip(got, whole, strict=True):
        torch.testing.assert_close(one, other[: len(one)], **CLOSE)
    cache.reset()
    assert cache.batch == 3


def test_more_sequences_than_there_are_or_none_are_refused():
    cache = paged(Full(), 2)
    for batch, message in ((0, "batch is 0; it must be a whole number ≥ 1"), (3, "batch is 3; it must be at most 2")):
        with pytest.raises(ValueError, match=message):
            cache.keep_first(batch)
    cache.keep_first(1)
    with pytest.raises(ValueError, match="batch is 2; it must be at most 1"):
        cache.keep_first(2)


@pytest.mark.parametrize("policy", [Full(), SlidingWindow(1), HeatKV(0.6, orders())], ids=lambda p: type(p).__name__)
def test_a_look_is_the_coming_step_and_stores_nothing(policy):
    calls, cache = inputs(2), paged(policy, 2)
    whole = run(cache, calls)
    cache.reset()
    for step in range(len(SCHEDULE)):
        others = inputs(2, seed=step + 1)
        for _ in range(2):
            pages = cache.pages.clone()
            for layer in range(LAYERS):
                looked = cache.look(layer, *calls[step, layer])
                torch.testing.assert_close(looked, whole[step * LAYERS + layer], **CLOSE)
                cache.look(layer, *others[step, layer])  # whatever it is, it leaves no trace
            assert cache.step == step
            torch.testing.assert_close(cache.pages, pages, rtol=0, atol=0, equal_nan=True)
        for layer in range(LAYERS):
            torch.testing.assert_close(cache.attend(layer, *calls[step, layer]), whole[step * LAYERS + layer], **CLOSE)


def test_a_look_out_of_turn_is_refused():
    calls, cache = inputs(2), paged(Full(), 2)
    with pytest.raises(ValueError, match="layer is 2; it must be at most 1"):
        cache.look(2, *calls[0, 0])
    with pytest.raises(ValueError, match="q has 4 tokens; step 0 of schedule custom has 1·1 = 1"):
        cache.look(1, *calls[1, 1])
    cache.attend(0, *calls[0, 0])
    with pytest.raises(ValueError, match="step 0 has begun; look before layer 0 of a step has attended"):
        cache.look(1, *calls[0, 1])
    cache.reset()
    run(cache, calls)
    with pytest.raises(ValueError, match="all 5 steps of schedule custom are done"):
        cache.look(1, *calls[4, 1])


def test_lse_weighs_what_the_cache_gave():
    calls, cache, with_lse = inputs(2), paged(Full(), 2), paged(Full(), 2)
    for (step, layer), (q, k, v) in calls.items():
        expected = cache.attend(layer, q, k, v)
        out, lse = with_lse.attend_with_lse(layer, q, k, v)
        torch.testing.assert_close(out, expected, **CLOSE)
        keys = torch.cat([calls[each, layer][1] for each in range(step + 1)], dim=1).repeat_interleave(2, dim=2)
        logits = torch.einsum("bqhd,bkhd->bhqk", q.double(), keys.double()) / 8
        torch.testing.assert_close(lse.double(), logits.logsumexp(-1), **CLOSE)


def truth(calls, policy, drawn):
    """Attention of every call to what the policy shows of the steps that were drawn, in fp64."""
    outs = []
    for (step, layer), (q, *_) in calls.items():
        shown = [each for each in (*policy.visible(SCHEDULE, layer, step), step) if each in drawn]
        k, v = (
            torch.cat([calls[each, layer][i] for each in shown], dim=1).repeat_interleave(2, dim=2).double()
            for i in (1, 2)
        )
        weights = (torch.einsum("bqhd,bkhd->bhqk", q.double(), k) / 8).softmax(-1)
        outs.append(torch.einsum("bhqk,bkhd->bqhd", weights, v))
    return outs


@pytest.mark.parametrize(
    "policy", [Full(), SlidingWindow(2), AMSKV(demanding_layers=(1,))], ids=lambda p: type(p).__name__
)
def test_counts_need_no_plan(policy):
    drawn = [0, 1, 2, 4]  # the fourth is left out
    counts = {(2, 1): 5, (4, 0): 17, (4, 1): 20}
    calls = {call: qkv for call, qkv in inputs(2, counts=counts).items() if call[0] in drawn}
    cache = UnplannedKVCache(
        SCHEDULE, LAYERS, policy, batch=2, kv_heads=KV_HEADS, head_dim=HEAD_DIM, dtype=torch.float32
    )
    for _ in range(2):
        for ((step, layer), qkv), expected in zip(calls.items(), truth(calls, policy, drawn), strict=True):
            if layer == 0:
                cache.go_to(step)
            torch.testing.assert_close(cache.attend(layer, *qkv).double(), expected, **CLOSE)
        assert cache.step == len(SCHEDULE)
        assert cache.tokens(0) == 0, "nothing reads the last scale"
        size = cache.nbytes
        cache.reset()
    assert cache.nbytes == size, "the pool serves the next generation"


def test_what_needs_a_plan_and_what_is_out_of_turn_is_refused():
    sizes = {"batch": 2, "kv_heads": KV_HEADS, "head_dim": HEAD_DIM, "dtype": torch.float32}
    for policy in (H2O(12), HeatKV(0.6, orders())):
        with pytest.raises(TypeError, match="it must be one of whole scales, the same for all heads"):
            UnplannedKVCache(SCHEDULE, LAYERS, policy, **sizes)
    with pytest.raises(ValueError, match="demanding_layers names layer 9"):
        UnplannedKVCache(SCHEDULE, LAYERS, AMSKV(demanding_layers=(9,)), **sizes)
    cache, calls = UnplannedKVCache(SCHEDULE, LAYERS, Full(), **sizes), inputs(2)
    with pytest.raises(ValueError, match="the next call is layer 0 of step 0, 2 sequences"):
        cache.attend(1, *calls[0, 1])
    with pytest.raises(ValueError, match="step is 5; it must be at most 4"):
        cache.go_to(5)
    cache.attend(0, *calls[0, 0])
    with pytest.raises(ValueError, match="step is 3; step 0 is at layer 1 of 2"):
        cache.go_to(3)
    cache.attend(1, *calls[0, 1])
    with pytest.raises(ValueError, match="step is 0; it must be a whole number ≥ 1"):
        cache.go_to(0)
    cache.go_to(4)
    for layer in range(LAYERS):
        cache.attend(layer, *calls[4, layer])
    with pytest.raises(ValueError, match=r"all 5 steps of schedule custom are done; call reset\(\)"):
        cache.attend(0, *calls[4, 0])
