"""A call that fails, wherever it fails, can be made again as if it had never been tried."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from amskv_kernels import AMSKV, CachePlan, Full, PagedKVCache, ScaleSchedule
from amskv_kernels.cache import OnlineKVCache
from amskv_kernels.policies import H2O, Recent, ScaleKV, SnapKV

SCHEDULE = ScaleSchedule([(1, 1), (2, 3), (4, 4), (5, 5), (6, 6)])
LAYERS, BATCH, HEADS, D = 2, 2, 2, 64


class Fails(TorchDispatchMode):
    """The `at`-th op call from here raises, as an allocation does that finds no memory: before it, or half-way."""

    def __init__(self, at, done):
        super().__init__()
        self.left, self.done = at, done

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.left -= 1
        out = func(*args, **kwargs or {}) if self.left or self.done else None
        if self.left == 0:
            raise torch.OutOfMemoryError(f"no memory in {func}")
        return out


def paged(policy):
    plan = CachePlan.build(SCHEDULE, policy, LAYERS, 16)
    cache = PagedKVCache(plan, batch=BATCH, kv_heads=HEADS, head_dim=D, dtype=torch.float32)
    cache.pages.fill_(torch.nan)
    return cache


def online(theta):
    policy = AMSKV.with_capacity(25, 50, condensed=1)
    sizes = {"batch": BATCH, "kv_heads": HEADS, "head_dim": D, "dtype": torch.float32}
    return OnlineKVCache(SCHEDULE, LAYERS, policy, theta, **sizes)


def state(cache):
    """What must not grow with failures: pages handed out, and sums of attention."""
    if isinstance(cache, OnlineKVCache):
        return cache._pool._free.live, [sorted(layer.held) for layer in cache._layers], cache.nbytes
    return None if cache._selector is None else {layer: sums.clone() for layer, sums in cache._selector._sums.items()}


MAKERS = {
    "full": lambda: paged(Full()),
    "scalekv": lambda: paged(ScaleKV(30)),
    "scalekv, paper": lambda: paged(ScaleKV(30, "paper")),
    "snapkv": lambda: paged(SnapKV(30)),
    "h2o": lambda: paged(H2O(20)),
    "recent": lambda: paged(Recent(20, first=2)),
    "online": lambda: online(-torch.inf),
    "online, turning": lambda: online(torch.inf),
}


@pytest.mark.parametrize("done", [False, True], ids=["before", "half-way"])
@pytest.mark.parametrize("name", MAKERS)
def test_every_failing_call_can_be_made_again(name, done):
    torch.manual_seed(1)
    clean, tried = MAKERS[name](), MAKERS[name]()
    weight, failures = torch.randn(HEADS * D, 9), 0
    for n in SCHEDULE.tokens:
        for layer in range(LAYERS):
            x, (q, k, v) = torch.randn(BATCH, n, 9), torch.randn(3, BATCH, n, HEADS, D)
            for cache in (clean, tried):
                if isinstance(cache, PagedKVCache):
                    cache.prepare(layer, x, weight)
            expected, at = clean.attend(layer, q, k, v), 1
            while True:
                try:
                    with Fails(at, done):
                        got = tried.attend(layer, q, k, v)
                except torch.OutOfMemoryError:
                    at, failures = at + 1, failures + 1
                else:
                    break
            assert torch.equal(got, expected)
            torch.testing.assert_close(state(tried), state(clean), rtol=0, atol=0)
    assert failures >= LAYERS * len(SCHEDULE)


@pytest.mark.parametrize("theta", [-torch.inf, torch.inf])
def test_no_page_of_the_online_mode_leaks(theta):
    """Over many failures and generations the pool stays what one clean generation needs."""
    cache = online(theta)
    sizes = set()
    for _ in range(3):
        cache.reset()
        for n in SCHEDULE.tokens:
            for layer in range(LAYERS):
                q, k, v = torch.randn(3, BATCH, n, HEADS, D)
                for _ in range(3):
                    with pytest.raises(RuntimeError, match="no memory"), Fails(1, False):
                        cache.attend(layer, q, k, v)
                cache.attend(layer, q, k, v)
        sizes.add((cache.nbytes, cache._pool._free.count))
    assert len(sizes) == 1


def test_the_online_mode_names_what_its_arena_may_need():
    huge = ScaleSchedule([(8192, 8192), (1, 1)])
    sizes = {"batch": 1, "kv_heads": 1, "head_dim": D}
    with pytest.raises(ValueError, match="needs 12582912 pages of 16 rows in an arena; a slot can name at most"):
        OnlineKVCache(huge, 3, AMSKV.with_capacity(1, 2**27, condensed=0), 0.0, **sizes)
    with pytest.raises(ValueError, match="the pool may need 4294967296 pages; page numbers are 32-bit"):
        OnlineKVCache(huge, 1, AMSKV.with_capacity(1, 2**27, condensed=0), 0.0, **sizes | {"batch": 1024})
    with pytest.raises(ValueError, match="a capacity of 4 tokens cannot hold the 2 condensed scales"):
        OnlineKVCache(SCHEDULE, 1, AMSKV.with_capacity(4, 9), 0.0, **sizes)


@pytest.mark.parametrize(
    ("x", "weight", "error", "message"),
    [
        (None, torch.zeros(128, 9), TypeError, "x is None; it must be a Tensor"),
        (torch.zeros(2, 1, 9), 3, TypeError, "weight is 3; it must be a Tensor"),
        (torch.zeros(2, 2, 9), torch.zeros(128, 9), ValueError, r"x has shape \(2, 2, 9\); it must be \(B, n, C\)"),
        (torch.zeros(2, 25, 9), torch.zeros(9), ValueError, r"weight has shape \(9,\); it must be \(H · D, C\)"),
        (torch.zeros(2, 25, 9), torch.zeros(100, 9), ValueError, r"weight has shape \(100, 9\); it must be"),
        (torch.zeros(2, 25, 9), torch.zeros(0, 9), ValueError, r"weight has shape \(0, 9\); it must be"),
        (torch.zeros(2, 25, 9), torch.zeros(128, 8), ValueError, r"weight has shape \(128, 8\); it must be .* C = 9"),
    ],
)
def test_what_prepare_is_told_is_checked(x, weight, error, message):
    cache = paged(ScaleKV(30))
    for n in SCHEDULE.tokens[:3]:
        for layer in range(LAYERS):
            cache.attend(layer, *torch.randn(3, BATCH, n, HEADS, D))
    with pytest.raises(error, match=message):
        cache.prepare(0, x, weight)


def test_prepare_for_another_layer_is_refused():
    """Its queries would choose the keys of the layer that comes."""
    cache = paged(ScaleKV(30))
    x, weight = torch.randn(2, 1, 9), torch.randn(128, 9)
    for layer, told in ((1, "the next call is layer 0 of step 0"), (-1, "must be a whole number"), (None, "must be")):
        with pytest.raises((TypeError, ValueError), match=f"layer is {layer}; .*{told}"):
            cache.prepare(layer, x, weight)
    cache.prepare(0, x, weight)
