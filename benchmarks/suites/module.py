"""One layer's attention module over all steps of a generation: norm, RoPE, cache, attention, against stock code."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from amskv_kernels.models import ConcatKVCache
from amskv_kernels.models.rope import rope2d_tables
from amskv_kernels.ops.checks import PlannedAttn
from amskv_kernels.ops.prepared import prepare_attn
from amskv_kernels.planning.memory import MIB, STOCK_PAIR_BYTES
from benchmarks.harness import peers
from benchmarks.harness.cases import Case, Group, history_rows, layer_kinds, stored_rows
from benchmarks.harness.gate import ROUNDING, WrongResultError, error
from benchmarks.harness.inputs import Pool, UnavailableError, fill, group_work
from benchmarks.harness.results import Row
from benchmarks.harness.roofs import DTYPES, ITEMSIZE, Work
from benchmarks.harness.tasks import Context, Task, rates, ratios, timed
from benchmarks.suites.steps import rank_of

STOCK = "stock"
LENGTH = 4.0  # of every query, where a model starts its training


class Layer:
    """The inputs of one layer, step by step, and the two ways through its attention.

    VAR: L2 norm, softmax scale 1. Infinity: the same, then RoPE2D.
    """

    def __init__(self, pool: Pool, layer: int) -> None:
        case, shape = pool.case, pool.case.shape
        self.pool, self.case, self.layer = pool, case, layer
        schedule, device = shape.schedule, pool.device
        self.rows = (shape.heads, shape.kv_heads, shape.kv_heads)
        self.qkv = [
            fill(
                torch.empty(case.sequences, n, sum(self.rows), shape.head_dim, dtype=DTYPES[case.dtype], device=device),
                step,
            )
            for step, n in enumerate(schedule.tokens)
        ]
        self.calls = [
            prepare_attn(PlannedAttn(pool.pages, pool.arena, *pool.tables(step, layer), n, pool.pages.dtype))
            for step, n in enumerate(schedule.tokens)
        ]
        self.length = torch.full((shape.heads,), LENGTH, device=device)
        self.turns: list[tuple[Tensor, Tensor] | tuple[None, None]] = [
            rope2d_tables(schedule, step, shape.head_dim, device=device)
            if case.model.startswith("infinity")
            else (None, None)
            for step in range(len(schedule))
        ]

    def ours(self) -> Tensor:
        """Two ops a step, attention as `PagedKVCache` makes it; the last step's output."""
        kv_heads = self.rows[1]
        for qkv, (cos, sin), attn in zip(self.qkv, self.turns, self.calls, strict=True):
            q, k = torch.ops.amskv.prepare_qk(qkv, kv_heads, self.length, cos, sin, True)
            out = attn(q, k, qkv[:, :, -kv_heads:], 1.0)
        return out

    def stock(self) -> Tensor:
        """As public code has it: fp32 norm, fp32 K in the cache, concatenation, a cast of all of K; all scales."""
        cache = ConcatKVCache()
        for qkv, (cos, sin) in zip(self.qkv, self.turns, strict=True):
            q, k, v = qkv.split(self.rows, dim=2)
            q, k = F.normalize(q.float(), dim=-1) * self.length[:, None], F.normalize(k.float(), dim=-1)
            if cos is not None and sin is not None:
                q, k = _turned(q, cos, sin), _turned(k, cos, sin)
            out = cache.attend(0, q, k, v, 1.0)
        return out

    def visible(self, step: int) -> tuple[int, ...]:
        """Earlier scales that this layer reads at a step."""
        return self.case.plan.visible(self.layer, step)

    def truth(self, b: int, h: int, scales: tuple[int, ...]) -> Tensor:
        """The last step's output for one sequence and head in fp64, over these scales and its own: (n, D)."""
        heads, kv_heads, _ = self.rows
        kv = heads + h // (heads // kv_heads)
        keys, values = [], []
        for step in (*scales, len(self.qkv) - 1):
            row, (cos, sin) = self.qkv[step][b].double(), self.turns[step]
            q, k = F.normalize(row[:, h : h + 1], dim=-1) * LENGTH, F.normalize(row[:, kv : kv + 1], dim=-1)
            if cos is not None and sin is not None:
                q, k = (_turned(x[None], cos.double(), sin.double())[0] for x in (q, k))
            keys.append(k[:, 0])
            values.append(row[:, kv + kv_heads])
        return (q[:, 0] @ torch.cat(keys).T).softmax(-1) @ torch.cat(values)


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE of interleaved pairs, as one complex product."""
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * torch.complex(cos, sin)[:, None]).flatten(-2)


def tasks(suite: str, cases: list[Case], context: Context) -> Iterator[Task]:
    """One task per case and kind of layer."""
    for case in cases:
        for layers in layer_kinds(case):

            def make(case: Case = case, layers: tuple[int, ...] = layers) -> Row:
                pool = context.slot.get(case, lambda: Pool(case, context.device))
                return {"suite": suite, **module_row(pool, layers, context)}

            work = _work(case, layers[0])
            cost = 6 * context.rounds[0] * context.ceilings(case.dtype).roof_us(work) * 1e-6 + 1.0
            yield Task(f"{suite}/{case.name}/layer {layers[0]}", cost, make, rank_of(case))


def _work(case: Case, layer: int) -> Work:
    """Bytes and operations of one layer's attention calls over all steps."""
    plan, total = case.plan, Work(0, 0)
    for step, n in enumerate(plan.schedule.tokens):
        rows = (history_rows(plan, step, layer), stored_rows(plan, step, layer))
        one = group_work(case, Group(step, n, *rows, (layer,)))
        total = Work(total.bytes + one.bytes, total.flops + one.flops)
    return total


def check(layer: Layer, name: str, out: Tensor, scales: tuple[int, ...]) -> float:
    """The error of the last step's output, first and last (sequence, head).

    Raises:
        WrongResultError: beyond what the element type explains, three roundings of inputs included.
    """
    worst = max(
        error(out[b, :, h], layer.truth(b, h, scales)) for b, h in ((0, 0), (out.shape[0] - 1, out.shape[2] - 1))
    )
    limit = 3 * ROUNDING[out.dtype]
    if not worst <= limit:
        raise WrongResultError(f"{name} is off by {worst:.2e}; {limit:.2e} is the limit")
    return worst


def module_row(pool: Pool, layers: tuple[int, ...], context: Context) -> Row:
    """Race of one layer's module over all steps, and the memory of the whole model's caches."""
    if pool.case.plan.selection is not None or pool.case.plan.heads > 1:
        raise UnavailableError("policies that choose tokens or heads are not measured as a module yet")
    case, layer = pool.case, Layer(pool, layers[0])
    last = len(layer.qkv) - 1
    every = tuple(range(last))
    errors = {
        peers.OURS: check(layer, peers.OURS, layer.ours(), layer.visible(last)),
        STOCK: check(layer, STOCK, layer.stock(), every),
    }
    times = context.race({peers.OURS: [layer.ours], STOCK: [layer.stock]})
    work = _work(case, layers[0])
    ceilings = context.ceilings(case.dtype)

    def extra(name: str, median_us: float) -> Row:
        return {"error": errors[name], **(rates(work, ceilings, median_us) if name == peers.OURS else {})}

    return {
        **case.describe(),
        "layers": len(layers),
        "history": history_rows(case.plan, last, layers[0]),
        "backend": peers.backends(pool.device)[0],
        "bytes": work.bytes,
        "flops": work.flops,
        "times": timed(times, context.timer.how, extra),
        "ratios": ratios(times, peers.OURS),
        "memory": _memory(pool, layer),
    }


def _memory(pool: Pool, layer: Layer) -> dict[str, Any]:
    """MiB: the caches of all layers, exact; what one layer's run takes besides, measured where the device tells."""
    case, shape = pool.case, pool.case.shape
    stock_pair = max(STOCK_PAIR_BYTES, 4 + ITEMSIZE[case.dtype])
    stock = shape.schedule.total * shape.layers * shape.kv_heads * shape.head_dim * stock_pair * case.sequences
    found: dict[str, Any] = {"pool_mib": pool.pages.nbytes / MIB, "stock_cache_mib": stock / MIB}
    if pool.device == "cuda":
        for name, run in (("ours", layer.ours), ("stock", layer.stock)):
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            run()
            found[f"{name}_one_layer_mib"] = (torch.cuda.max_memory_allocated() - before) / MIB
    return found
