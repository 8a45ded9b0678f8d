import pytest
import torch

from amskv_kernels import AMSKV, CachePlan, Full, PagedKVCache, ScaleSchedule, Sink, SlidingWindow
from amskv_kernels.ops import backend
from amskv_kernels.policies.parse import parse_policy

SCHEDULE = ScaleSchedule([(1, 1), (2, 2), (3, 2), (3, 5), (6, 6)])


def cache_for(policy=None, *, layers=3, page_size=None, **arguments):
    plan = CachePlan.build(SCHEDULE, policy or Full(), layers, page_size)
    return PagedKVCache(plan, **{"batch": 2, "kv_heads": 2, "head_dim": 64, "dtype": torch.float32, **arguments})


def qkv(n, batch=2, heads=2, kv_heads=2, head_dim=64):
    return torch.randn(batch, n, heads + 2 * kv_heads, head_dim).split([heads, kv_heads, kv_heads], dim=2)


@pytest.mark.parametrize(
    "policy",
    [Full(), AMSKV(demanding_layers=(1,)), SlidingWindow(1), Sink(1, 1), AMSKV.with_capacity(7, 26)],
    ids=str,
)
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (6, 2)])
@pytest.mark.parametrize("page_size", [None, 16, 128])
def test_attention_sees_the_visible_scales_and_nothing_else(policy, heads, kv_heads, page_size):
    cache = cache_for(policy, kv_heads=kv_heads, page_size=page_size)
    cache.pages.fill_(torch.nan)
    for _ in range(2):  # the second one finds the first one's leftovers
        past = [[] for _ in range(3)]
        for step, n in enumerate(SCHEDULE.tokens):
            for layer in range(3):
                q, k, v = qkv(n, heads=heads, kv_heads=kv_heads)
                seen = [past[layer][s] for s in policy.visible(SCHEDULE, layer, step)] + [(k, v)]
                past[layer].append((k, v))
                keys, values = (torch.cat(x, dim=1).transpose(1, 2) for x in zip(*seen, strict=True))
                expected = torch.nn.functional.scaled_dot_product_attention(
                    q.transpose(1, 2), keys, values, enable_gqa=True
                ).transpose(1, 2)
                torch.testing.assert_close(cache.attend(layer, q, k, v), expected, rtol=1e-5, atol=1e-5)
        assert (cache.step, cache.layer) == (len(SCHEDULE), 0)
        cache.reset()


@pytest.mark.parametrize("policy", ["full", "sliding:1", "h2o:40", "recent:40"])
def test_no_backend_of_the_cpu_reads_the_rest_of_a_page(policy):
    """The native kernels leave it as it is, NaN here, and another backend takes every other call."""
    found = []
    for names in (["torch"], ["auto", "torch"], ["torch", "auto"]):
        rng = torch.Generator().manual_seed(5)
        cache = cache_for(parse_policy(policy, SCHEDULE, 3), page_size=32)
        cache.pages.fill_(torch.nan)
        outputs = []
        for i, n in enumerate(n for n in SCHEDULE.tokens for _ in range(3)):
            parts = torch.randn(3, 2, n, 2, 64, generator=rng)
            with backend(names[(i // 3 + i) % len(names)]):
                outputs.append(cache.attend(i % 3, *parts))
        found.append(outputs)
    for outputs in found[1:]:
        torch.testing.assert_close(outputs, found[0], rtol=1e-5, atol=1e-5)


def test_pool_is_what_the_plan_says():
    cache = cache_for(AMSKV(), dtype=torch.bfloat16)
    assert cache.nbytes == cache.plan.allocated_tokens * 2 * 64 * 2 * 2 * 2
    assert cache.pages.shape[0] == cache.plan.pages * 2 * 2


def test_softmax_scale_is_passed_on():
    q, k, v = qkv(1)
    torch.testing.assert_close(cache_for().attend(0, q, k, v, softmax_scale=3.0), v)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda c: c.attend(1, *qkv(1)), "layer is 1; the plan's next call is layer 0 of step 0"),
        (lambda c: c.attend(0, *qkv(4)), "q has 4 tokens; step 0 of schedule custom has 1·1 = 1"),
        (lambda c: c.attend("0", *qkv(1)), "layer is '0'; it must be a whole number ≥ 0"),
        (lambda c: c.attend(0, *qkv(1, batch=3)), "q has batch 3; this cache was made for 2 sequences"),
        (
            lambda c: c.attend(0, *qkv(1, head_dim=96)),
            r"pages has shape .*; it must be \(num_pages, 2, page_size, D = 96",
        ),
        (lambda c: c.attend(0, *qkv(1, kv_heads=1)), r"arena has shape \(2, 2\); it must be \(B, Hkv\) = \(2, 1\)"),
    ],
)
def test_misuse_is_named_and_changes_nothing(call, message):
    cache = cache_for()
    before = cache.pages.clone()
    with pytest.raises(ValueError, match=message):
        call(cache)
    assert (cache.step, cache.layer) == (0, 0)
    assert torch.equal(cache.pages, before)


def test_a_finished_generation_must_be_reset():
    cache = cache_for(layers=1)
    for n in SCHEDULE.tokens:
        cache.attend(0, *qkv(n))
    with pytest.raises(ValueError, match=r"all 5 steps of schedule custom are done; call reset\(\)"):
        cache.attend(0, *qkv(1))
    cache.reset()
    cache.attend(0, *qkv(1))
    assert cache.step == 1


def test_gradients_are_refused():
    q, k, v = qkv(1)
    with pytest.raises(RuntimeError, match=r"no backward; call the model under torch.no_grad\(\)"):
        cache_for().attend(0, q.clone().requires_grad_(), k, v)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch": 0}, "batch is 0; it must be a whole number ≥ 1"),
        ({"batch": 2.5}, "batch is 2.5; it must be a whole number ≥ 1"),
        ({"batch": True}, "batch is True; it must be a whole number ≥ 1"),
        ({"kv_heads": 0}, "kv_heads is 0; it must be a whole number ≥ 1"),
        ({"kv_heads": "2"}, "kv_heads is '2'; it must be a whole number ≥ 1"),
        ({"head_dim": 100}, "head_dim is 100; it must be a multiple of 8"),
        ({"head_dim": 136}, "head_dim is 136; it must be at most 128"),
        ({"head_dim": 64.0}, "head_dim is 64.0; it must be a whole number ≥ 8"),
        ({"batch": 2**40}, "page numbers are 32-bit"),
        ({"device": "gpu"}, "device is 'gpu'; it must be one that torch knows, such as 'cpu' or 'cuda:0'"),
        ({"device": "mps"}, "device is 'mps'; this torch cannot use it: "),
        ({"device": "xpu"}, "device is 'xpu'; this torch cannot use it: "),
        ({"device": "cuda:99"}, r"device is cuda:99; it must be one of the \d+ that torch sees"),
    ],
)
def test_bad_sizes_and_devices_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        cache_for(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"dtype": torch.float64},
            "dtype is torch.float64; it must be one of torch.float16, torch.bfloat16, torch.float32, torch.int8",
        ),
        ({"dtype": "bf16"}, "dtype is 'bf16'; it must be one of torch.float16"),
        ({"device": 0}, "device is 0; it must be a torch.device or a string such as 'cuda:0'"),
    ],
)
def test_bad_types_are_refused(arguments, message):
    with pytest.raises(TypeError, match=message):
        cache_for(**arguments)


@pytest.mark.parametrize("missing", ["q", "k", "v"])
def test_what_is_no_tensor_is_named(missing):
    cache = cache_for()
    tensors = dict(zip("qkv", qkv(1), strict=True)) | {missing: None}
    with pytest.raises(TypeError, match=f"{missing} is None; it must be a Tensor"):
        cache.attend(0, **tensors)
    assert (cache.step, cache.layer) == (0, 0)


def test_a_plan_must_be_a_plan():
    with pytest.raises(TypeError, match=r"plan is Full\(\); it must be a CachePlan"):
        PagedKVCache(Full(), batch=2, kv_heads=2, head_dim=64)


def test_a_refused_call_leaves_the_cache_as_it_was():
    caches = [cache_for(AMSKV()), cache_for(AMSKV())]
    for n in SCHEDULE.tokens:
        for layer in range(3):
            q, k, v = qkv(n)
            with pytest.raises(TypeError, match=r"q is torch\.float16"):
                caches[0].attend(layer, q.half(), k, v)
            got, expected = (cache.attend(layer, q, k, v) for cache in caches)
            assert torch.equal(got, expected)


def test_a_pool_made_in_inference_mode_serves_outside_it():
    with torch.inference_mode():
        cache = cache_for(layers=1)
        cache.attend(0, *qkv(1))
    cache.reset()
    cache.attend(0, *qkv(1))
    assert cache.step == 1
