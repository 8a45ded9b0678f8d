"""Random arguments for `attn`, shared by the tests of every implementation.

Rows that no slot names hold NaN, so reading one shows in the output.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from amskv_kernels.ops.quantise import dequantise, quantise
from amskv_kernels.planning.layout import ROWS_BITS


@dataclass(frozen=True)
class Case:
    """Shape of a random call; `history` and `stored` list the rows of each page named."""

    batch: int = 2
    n: int = 5
    heads: int = 2
    kv_heads: int = 2
    head_dim: int = 64
    page_size: int = 16
    history: tuple[int, ...] = ()
    stored: tuple[int, ...] = ()
    held: int = 0  # rows that the first page written already holds; it is then read too
    per_batch: bool = False
    per_head: bool = False
    dtype: torch.dtype = torch.float32


def make(case: Case, seed: int = 0, device: str = "cpu") -> tuple:
    """Arguments of torch.ops.amskv.attn; with `per_batch` / `per_head`, each row of slots names other rows."""
    rng = torch.Generator().manual_seed(seed)
    rows_b, rows_h = case.batch if case.per_batch else 1, case.kv_heads if case.per_head else 1
    span = len(case.history) + len(case.stored) + 2  # pages of an arena, two of them never named
    arenas = case.batch * case.kv_heads
    start = torch.randperm(arenas, generator=rng).to(torch.int32) * span
    pages = torch.full((arenas * span, 2, case.page_size, case.head_dim), torch.nan, dtype=case.dtype)
    read, write = [], []
    for _ in range(rows_b * rows_h):
        offsets = torch.randperm(span, generator=rng).tolist()
        history = [r if torch.rand((), generator=rng) < 0.8 or not _ragged(case) else 0 for r in case.history]
        read.append([(offsets.pop() << ROWS_BITS) | r for r in history])
        write.append([(offsets.pop() << ROWS_BITS) | r for r in case.stored])
        if case.held:
            read[-1].insert(0, (write[-1][0] >> ROWS_BITS << ROWS_BITS) | case.held)
    read_slots, write_slots = (
        torch.tensor(t, dtype=torch.int32).view(rows_b, rows_h, len(t[0]) if t else 1).contiguous()
        for t in (read, write)
    )
    arena = start.view(case.batch, case.kv_heads)
    for b in range(case.batch):
        for h in range(case.kv_heads):
            for slot in read_slots[b % rows_b, h % rows_h].tolist():
                page, rows = int(arena[b, h]) + (slot >> ROWS_BITS), slot & 0xFF
                fresh = torch.randn(2, rows, case.head_dim, generator=rng)
                pages[page, :, :rows] = fresh.to(case.dtype)
    qkv = torch.randn(case.batch, case.n, case.heads + 2 * case.kv_heads, case.head_dim, generator=rng)
    q, k, v = qkv.to(case.dtype).to(device).split([case.heads, case.kv_heads, case.kv_heads], dim=2)
    rest = (pages, arena, read_slots, write_slots)
    return (q, k, v, *(x.to(device) for x in rest), case.head_dim**-0.5)


def eight_bit(pages: Tensor) -> tuple[Tensor, Tensor]:
    """The same pool in eight bits, and its scales; rows of NaN get bytes that show if they are read."""
    rows, scales = quantise(pages)
    rows[scales.isnan()] = 99
    return rows, scales


def make_eight_bit(case: Case, seed: int = 0, device: str = "cpu") -> tuple:
    """Arguments of torch.ops.amskv.attn with pages of int8 and their scales."""
    q, k, v, pages, *rest = make(case, seed, device)
    pages, page_scales = eight_bit(pages)
    return (q, k, v, pages, *rest, page_scales)


def exact(args: tuple) -> tuple:
    """The call of `make_eight_bit` with pages that hold what its bytes stand for, in q's dtype."""
    *args, page_scales = args
    args[3] = dequantise(args[3], page_scales).to(args[0].dtype)
    return tuple(args)


def _ragged(case: Case) -> bool:
    return case.per_batch or case.per_head


def sdpa_error(args: tuple, truth: Tensor) -> float:
    """Largest error of PyTorch's own attention on the same keys in the same dtype, against `truth`."""
    q, k, v, pages, arena, read_slots, _, scale = args
    group = q.shape[2] // k.shape[2]
    worst = 0.0
    for b in range(q.shape[0]):
        for h in range(q.shape[2]):
            own = read_slots[b % read_slots.shape[0], (h // group) % read_slots.shape[1]].tolist()
            named = [(int(arena[b, h // group]) + (s >> ROWS_BITS), s & 0xFF) for s in own]
            keys, values = (
                torch.cat([*(pages[page, i, :rows] for page, rows in named), x[b, :, h // group]])
                for i, x in enumerate((k, v))
            )
            out = torch.nn.functional.scaled_dot_product_attention(
                q[b, :, h][None, None], keys[None, None], values[None, None], scale=scale
            )[0, 0]
            worst = max(worst, float((out.double().cpu() - truth[b, :, h]).abs().max()))
    return worst


# Sums of a score near 10 in two orders differ by some 1e-6, and its weight with them; in 16 bits nobody would notice.
SCORES_ROUNDED = 2e-6


def most_error(args: tuple, truth: Tensor, slack: float = 2) -> float:
    """How far a result may be from `truth`: `slack` times as far as PyTorch's own, whose worst row is another one."""
    return slack * sdpa_error(args, truth) + SCORES_ROUNDED


def _set(x: Tensor, index: tuple, value: float) -> Tensor:
    x = x.clone()
    x[index] = value
    return x


NAN, INF, FIRST, EVERY = float("nan"), float("inf"), (0, 0, 0, 5), (0, slice(None), 0, 5)
# What happens to (q, k, v) of the first sequence and head; the others must not notice.
SPOILT = {
    "NaN in a query": lambda q, k, v: (_set(q, FIRST, NAN), k, v),
    "NaN in a key": lambda q, k, v: (q, _set(k, FIRST, NAN), v),
    "NaN in a value": lambda q, k, v: (q, k, _set(v, FIRST, NAN)),
    "NaN in every key": lambda q, k, v: (q, _set(k, EVERY, NAN), v),
    "inf in a query": lambda q, k, v: (_set(q, FIRST, INF), k, v),
    "a score of inf": lambda q, k, v: (_set(q, EVERY, 1.0), _set(k, FIRST, INF), v),
    "a score of -inf": lambda q, k, v: (_set(q, EVERY, 1.0), _set(k, FIRST, -INF), v),
    "inf in a value": lambda q, k, v: (q, k, _set(v, FIRST, INF)),
    "every score -inf": lambda q, k, v: (_set(q, EVERY, 1.0), _set(k, EVERY, -INF), v),
    "every score of a query -inf": lambda q, k, v: (_set(q, FIRST, -INF), _set(k, EVERY, 1.0), v),
}
OF_HISTORY = {"every score -inf": -INF, "every score of a query -inf": 1.0}  # what its keys hold there too


def spoilt(args: tuple, what: str) -> tuple:
    """The same call with values that are no numbers."""
    q, k, v = SPOILT[what](*args[:3])
    pages = args[3].clone()
    if what in OF_HISTORY:
        pages[:, 0, :, 5] = torch.where(pages[:, 0, :, 5].isnan(), NAN, OF_HISTORY[what]).to(pages.dtype)
    return (q, k, v, pages, *args[4:])


def same_kinds(found: Tensor, truth: Tensor) -> bool:
    """Whether NaN, inf and −inf stand in the same places."""
    pairs = ((found.isnan(), truth.isnan()), (found.isposinf(), truth.isposinf()), (found.isneginf(), truth.isneginf()))
    return all(torch.equal(x, y) for x, y in pairs)
