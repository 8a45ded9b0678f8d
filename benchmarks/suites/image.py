"""Whole images: a VAR generation with stock's cache and with ours, eager and as one CUDA graph, up to out-of-memory."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from amskv_kernels import CachePlan, PagedKVCache, parse_policy
from amskv_kernels.models import VAR, VQVAE, ConcatKVCache, VARConfig, VQVAEConfig
from amskv_kernels.models.var import Attention
from amskv_kernels.planning.memory import MIB
from benchmarks.harness.cases import build_plan
from benchmarks.harness.gate import ROUNDING, WrongResultError, error
from benchmarks.harness.inputs import UnavailableError
from benchmarks.harness.results import Row
from benchmarks.harness.tasks import Context, Task, first_line

STOCK = "stock"
MODELS = ("var-d30", "var-d16")
CACHES = (STOCK, "full", "ams-kv:75", "ams-kv:84.83", "scalekv:10")
BATCHES = {"eager": (1, 8, 64, 128, 256), "graph": (1, 8, 64)}
QUICK_BATCHES = {"eager": (8, 64), "graph": (8,)}
DECODED_AT_ONCE = 32  # images; all at once, the decoder's maps and not the cache would decide how many fit
CAP_GB = 80  # the smaller cards' memory, as a limit on this one
DIGITS = Path(__file__).parents[2] / "examples" / "digits" / "weights" / "var.safetensors"


@dataclass
class Painter:
    """A VAR with its VQ-VAE, drawing the same labels through any cache."""

    var: VAR
    vae: VQVAE
    dtype: torch.dtype
    device: str
    sampling: dict[str, Any] = field(default_factory=dict)
    errors: dict[str, float | None] = field(default_factory=dict)  # of caches that `check` has passed

    def plan(self, policy: str) -> CachePlan:
        """The plan of a policy for this model."""
        config = self.var.config
        chosen = parse_policy(policy, config.schedule, config.depth)
        return CachePlan.build(config.schedule, chosen, config.depth, kv_heads=config.num_heads)

    def attention(self, cache: str, images: int) -> Attention:
        """A fresh cache by name."""
        if cache == STOCK:
            return ConcatKVCache()
        config = self.var.config
        return PagedKVCache(
            self.plan(cache), batch=2 * images, kv_heads=config.num_heads, head_dim=config.head_dim,
            dtype=self.dtype, device=self.device,
        )  # fmt: skip

    def labels(self, images: int) -> Tensor:
        """Classes, all different as far as they go."""
        return torch.arange(images, device=self.device) % self.var.config.num_classes

    def draw(self, attention: Any, labels: Tensor, progress: Callable[[int, int], None] | None = None) -> Tensor:
        """Images (B, 3, H, W); the cache starts empty."""
        attention.reset()
        return self.var.generate(self.vae, labels, attention, progress=progress, **self.sampling).images


def random_painter(
    model: str, device: str, dtype: torch.dtype = torch.bfloat16, config: VARConfig | None = None,
    vae_config: VQVAEConfig | None = None, decoded_at_once: int = DECODED_AT_ONCE,
) -> Painter:  # fmt: skip
    """A released model's shapes with random weights; the decoder in 16 bit, as autocast would run it."""
    config = config or VARConfig.named(model)
    vae_config = vae_config or VQVAEConfig(schedule=config.schedule)
    torch.manual_seed(0)
    with torch.device(device):
        var, vae = VAR(config), VQVAE(vae_config)
    var.to(dtype).eval().requires_grad_(False)
    vae.eval().requires_grad_(False)
    del vae.encoder  # never runs here
    for part in (vae.decoder, vae.post_quant_conv):
        part.to(dtype)
    vae.post_quant_conv.register_forward_pre_hook(lambda module, inputs: (inputs[0].to(dtype),))
    decode = vae.decode
    vae.decode = lambda fhat: torch.cat([decode(part) for part in fhat.split(decoded_at_once)])  # type: ignore[method-assign]
    return Painter(var, vae, dtype, device)


def digits_painter() -> Painter:
    """The small trained model of the examples, in fp32 on the CPU."""
    from examples.digits.model import SAMPLING, load

    var, vae = load()
    return Painter(var, vae, torch.float32, "cpu", SAMPLING)


class Checked:
    """Passes calls on to a cache, and compares each result with attention in fp32 over the scales the plan shows."""

    def __init__(self, inner: Any, plan: CachePlan, limit: float) -> None:
        self.inner, self.plan, self.limit, self.worst = inner, plan, limit, 0.0
        self.held: dict[int, list[tuple[Tensor, Tensor]]] = {}

    def reset(self) -> None:
        """A new generation."""
        self.inner.reset()
        self.held.clear()

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, softmax_scale: float) -> Tensor:
        """The inner cache's result.

        Raises:
            WrongResultError: it is not attention over these scales.
        """
        out = self.inner.attend(layer, q, k, v, softmax_scale)
        held = self.held.setdefault(layer, [])
        held.append((k.clone(), v.clone()))
        seen = [held[scale] for scale in (*self.plan.visible(layer, len(held) - 1), len(held) - 1)]
        keys, values = (torch.cat(x, dim=1).transpose(1, 2).float() for x in zip(*seen, strict=True))
        truth = F.scaled_dot_product_attention(q.transpose(1, 2).float(), keys, values, scale=softmax_scale)
        self.worst = max(self.worst, error(out, truth.transpose(1, 2).double()))
        if not self.worst <= self.limit:
            raise WrongResultError(f"layer {layer} is off by {self.worst:.2e}; {self.limit:.2e} is the limit")
        return out


def check(painter: Painter, cache: str) -> float | None:
    """Every attention of one image's generation against fp32.

    None for stock, which is PyTorch's own, and where tokens are chosen on the device: there images must be finite.
    """
    if cache == STOCK or cache in painter.errors:
        return painter.errors.get(cache)
    attention, plan = painter.attention(cache, 1), painter.plan(cache)
    checked = Checked(attention, plan, 2 * ROUNDING[painter.dtype]) if plan.selection is None else None
    if not bool(painter.draw(checked or attention, painter.labels(1)).isfinite().all()):
        raise WrongResultError(f"images under {cache} are not finite")
    painter.errors[cache] = None if checked is None else checked.worst
    return painter.errors[cache]


def available(model: str, context: Context) -> list[str]:
    """The caches that can be planned for a model; the others are named."""
    found = [STOCK]
    for cache in CACHES[1:]:
        try:
            build_plan(model, cache)
        except ValueError as error:
            context.absent[f"image/{cache}"] = str(error)
            continue
        found.append(cache)
    return found


def tasks(context: Context) -> Iterator[Task]:
    """On a GPU random weights at the released shapes; on a CPU the digits, if their weights are there."""
    if context.device == "cpu":
        if not DIGITS.exists():
            context.absent["digits"] = "the example's weights are not there"
            return
        images = 4 if context.quick else 25
        caches, rounds = available("var-d16", context), 1 if context.quick else 3
        yield Task("image/digits", 8.0, lambda: _digits_row(caches, images, rounds))
        return
    for model in MODELS[: 1 if context.quick else None]:
        for cache in available(model, context):
            for how, batches in (QUICK_BATCHES if context.quick else BATCHES).items():
                for images in batches:
                    yield _speed_task(context, model, cache, images, how)
            for cap in (None, CAP_GB) if model == MODELS[0] and not context.quick else ():
                yield _capacity_task(context, model, cache, cap)


def _digits_row(names: list[str], images: int, rounds: int) -> Row:
    """The digits under every cache, taking turns, order reversed every other round."""
    painter = digits_painter()
    errors = {cache: check(painter, cache) for cache in names}
    caches = {cache: painter.attention(cache, images) for cache in names}
    seconds: dict[str, list[float]] = {cache: [] for cache in names}
    for i in range(rounds):
        for cache in names[:: -1 if i % 2 else 1]:
            start = time.perf_counter()
            painter.draw(caches[cache], painter.labels(images))
            seconds[cache].append(time.perf_counter() - start)
    config, token = painter.var.config, 2 * images * painter.var.config.embed_dim * 8 / MIB
    rows = {
        cache: {
            "images_s": images / statistics.median(times),
            "seconds": times,
            "error": errors[cache],
            "cache_mib": token * config.depth * config.schedule.total
            if cache == STOCK
            else painter.plan(cache).allocated_tokens * token,
        }
        for cache, times in seconds.items()
    }
    return {"suite": "image", "model": "digits", "images": images, "dtype": "fp32", "caches": rows}


def _speed_task(context: Context, model: str, cache: str, images: int, how: str) -> Task:
    def make() -> Row:
        painter = context.slot.get(model, lambda: random_painter(model, context.device))
        row = {"suite": "image", "model": model, "cache": cache, "images": images, "how": how, "dtype": "bf16"}
        return {**row, "error": check(painter, cache), **_speed(painter, cache, images, how == "graph")}

    # A capture that fails may leave the random generator unusable: graphs come last.
    return Task(f"image/{model}/{cache}/{images}/{how}", 1.0 + images / 20, make, 3 if how == "graph" else 1)


def _speed(painter: Painter, cache: str, images: int, graph: bool) -> Row:
    """Images per second and peak memory."""
    _empty()
    torch.cuda.reset_peak_memory_stats()
    labels, attention = painter.labels(images), painter.attention(cache, images)
    painter.draw(attention, labels)  # warm-up
    run: Callable[[], object] = lambda: painter.draw(attention, labels)  # noqa: E731
    if graph:
        run = _captured(run)
        run()
    peak = torch.cuda.max_memory_allocated()
    times = []
    for _ in range(2):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return {"images_s": images / statistics.median(times), "seconds": times, "peak_gib": peak / 2**30}


def _captured(run: Callable[[], object]) -> Callable[[], object]:
    """One CUDA graph of a whole generation."""
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    try:
        with torch.cuda.graph(graph):
            run()
    except RuntimeError as reason:
        torch.cuda.synchronize()
        if isinstance(reason, torch.OutOfMemoryError):
            raise
        raise UnavailableError(f"a generation cannot be captured: {first_line(reason)}") from reason
    return graph.replay


def _capacity_task(context: Context, model: str, cache: str, cap: int | None) -> Task:
    def make() -> Row:
        painter = context.slot.get(model, lambda: random_painter(model, "cuda"))
        with memory_cap(cap):
            most, tried = largest_batch(lambda images: peak_bytes(painter, cache, images), _memory(cap))
        row = {"suite": "capacity", "model": model, "cache": cache, "cap_gb": cap, "dtype": "bf16"}
        return {**row, "images": most, "tried": tried}

    return Task(f"capacity/{model}/{cache}/{cap or 'all'}", 20.0, make, 1)


def peak_bytes(painter: Painter, cache: str, images: int) -> int | None:
    """Peak memory of one generation, None where it runs out."""
    _empty()
    torch.cuda.reset_peak_memory_stats()
    try:
        painter.draw(painter.attention(cache, images), painter.labels(images))
        torch.cuda.synchronize()
    except torch.OutOfMemoryError:
        return None
    return torch.cuda.max_memory_allocated()


def largest_batch(peak: Callable[[int], int | None], memory: int, step: int = 8) -> tuple[int, dict[str, int | None]]:
    """The largest multiple of `step` that fits: two points foretell it, a few trials confirm it.

    Args:
        peak: bytes of a batch, None where memory runs out.
        memory: bytes there are.
        step: what batches are multiples of.

    Returns:
        The batch (0: none), and every batch tried with its peak.
    """
    tried: dict[str, int | None] = {}

    def fits(images: int) -> bool:
        if str(images) not in tried:
            tried[str(images)] = peak(images)
        return tried[str(images)] is not None

    if not fits(step):
        return 0, tried
    if not fits(2 * step):
        return step, tried
    one, two = tried[str(step)] or 0, tried[str(2 * step)] or 0
    slope = max(1, two - one)
    low, high = 2, None
    guess = max(3, int((memory - one) / slope) + 1)
    while high is None or high - low > 1:
        if fits(guess * step):
            low = guess
            guess = max(low + 1, round(low * 1.06)) if high is None else (low + high) // 2
        else:
            high = guess
            guess = max(low + 1, min(high - 1, round(high * 0.95)))
    return low * step, tried


def _memory(cap: int | None) -> int:
    total = torch.cuda.get_device_properties(0).total_memory
    return total if cap is None else min(total, cap * 10**9)


@contextmanager
def memory_cap(cap: int | None) -> Iterator[None]:
    """This process may take `cap` GB only, for as long as it lasts."""
    total = torch.cuda.get_device_properties(0).total_memory
    if cap is not None and cap * 10**9 >= total:
        raise UnavailableError(f"this GPU has less than {cap} GB")
    if cap is not None:
        torch.cuda.set_per_process_memory_fraction(cap * 10**9 / total)
    try:
        yield
    finally:
        if cap is not None:
            torch.cuda.set_per_process_memory_fraction(1.0)


def _empty() -> None:
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
