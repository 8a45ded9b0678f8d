"""A user's torch defaults (dtype, device, determinism, autocast) change no table and no result."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager

import pytest
import torch

from amskv_kernels import AMSKV, H2O, CachePlan, Full, PagedKVCache, ScaleKV, ScaleSchedule
from amskv_kernels.cache import OnlineKVCache
from amskv_kernels.calibrate import AttentionRecorder, LossRecorder, SimilarityRecorder
from amskv_kernels.models import VAR, VARConfig
from amskv_kernels.models.infinity import InfinityConfig, InfinityStack
from amskv_kernels.models.rope import rope2d_tables
from amskv_kernels.models.vqvae import VQVAE, VQVAEConfig

SCHEDULE = ScaleSchedule([(1, 1), (2, 3), (4, 4), (5, 6)])
LAYERS = 2


@contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def deterministic():
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


DEFAULTS = {
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "float64": lambda: default_dtype(torch.float64),
    "meta": lambda: torch.device("meta"),
    "deterministic": deterministic,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
}


def inputs() -> list[list[tuple[torch.Tensor, ...]]]:
    rng = torch.Generator("cpu").manual_seed(0)
    shape = {"generator": rng, "dtype": torch.float32, "device": "cpu"}
    return [
        [
            (torch.randn(2, n, 128, **shape), torch.randn(2, n, 6, 64, **shape).split(2, dim=2))
            for _ in range(LAYERS)
        ]
        for n in SCHEDULE.tokens
    ]  # fmt: skip


def sizes() -> dict:
    return {"batch": 2, "kv_heads": 2, "head_dim": 64, "dtype": torch.float32}


def drawn(cache) -> list[torch.Tensor]:
    """Every output of a generation."""
    weight = torch.eye(128, dtype=torch.float32, device="cpu")
    found = []
    for calls in inputs():
        for layer, (x, (q, k, v)) in enumerate(calls):
            getattr(cache, "prepare", lambda *_: None)(layer, x, weight)
            found.append(cache.attend(layer, q, k, v, 0.2))
    return found


def paged(policy) -> list[torch.Tensor]:
    return drawn(PagedKVCache(CachePlan.build(SCHEDULE, policy, LAYERS, 16), **sizes()))


def online() -> list[torch.Tensor]:
    return drawn(OnlineKVCache(SCHEDULE, LAYERS, AMSKV.with_capacity(7, 26), -1.0, **sizes()))


def recorded() -> list:
    similarity, attention = SimilarityRecorder(SCHEDULE, LAYERS), AttentionRecorder(SCHEDULE, LAYERS, top=4)
    losses = LossRecorder(SCHEDULE, LAYERS)
    for calls in inputs():
        for layer, (_, (q, k, v)) in enumerate(calls):
            similarity.observe(layer, q, k, v, 0.2)
            attention.observe(layer, q, k, v, 0.2)
            losses.observe(layer, q, k, v, 0.2)
    found = losses.losses()
    return [
        similarity.similarity(), attention.selectivity(), attention.scores(),
        found.mass.tolist(), found.gram.tolist(), found.similarity,
    ]  # fmt: skip


RESULTS = {
    "rope": lambda: list(rope2d_tables(SCHEDULE, 3, 64)),
    "full": lambda: paged(Full()),
    "h2o": lambda: paged(H2O(20)),
    "scalekv": lambda: paged(ScaleKV(20)),
    "online": online,
    "recorders": recorded,
}


@pytest.mark.parametrize("default", DEFAULTS)
@pytest.mark.parametrize("what", RESULTS)
def test_defaults_change_nothing(what, default):
    expected = RESULTS[what]()
    with DEFAULTS[default]():
        got = RESULTS[what]()
    for x, y in zip(got, expected, strict=True):
        if isinstance(x, torch.Tensor):
            assert (x.dtype, x.device) == (y.dtype, y.device)
            assert torch.equal(x, y)
        else:
            assert x == y


@pytest.fixture(scope="module")
def models():
    schedule = ScaleSchedule([(1, 1), (2, 2), (4, 4)])
    torch.manual_seed(0)
    var = VAR(VARConfig(schedule, 2, 128, 2, num_classes=4, vocab_size=32)).eval()
    vae = VQVAE(VQVAEConfig(ch=32, ch_mult=(1, 1), vocab_size=32, schedule=schedule)).eval()
    infinity = InfinityStack(InfinityConfig(1, 128, 2, chunks=1)).eval()
    return var, vae, infinity


@pytest.mark.parametrize("default", ["bfloat16", "float64", "meta"])
def test_models_draw_the_same(models, default):
    var, vae, infinity = models
    text = (torch.randn(3, 128), torch.tensor([0, 3], dtype=torch.int32), 3)
    labels = torch.tensor([0, 3])

    def draw() -> list[torch.Tensor]:
        plan = CachePlan.build(var.config.schedule, Full(), 2, 16)
        cache = PagedKVCache(plan, batch=4, kv_heads=2, head_dim=64, dtype=torch.float32)
        found = var.generate(vae, labels, cache, top_k=9, generator=torch.Generator("cpu").manual_seed(0))
        return [*found, infinity.generate(text, ScaleSchedule([(1, 1), (2, 2), (4, 4)]))]

    with torch.no_grad(), ExitStack() as stack:
        expected = draw()
        stack.enter_context(DEFAULTS[default]())
        got = draw()
    for x, y in zip(got, expected, strict=True):
        assert x.dtype == y.dtype
        assert torch.equal(x, y)
