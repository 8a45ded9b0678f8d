"""Random arguments for `attn_ragged`: sequences of different lengths, histories and tables in one pool."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from torch import Tensor

from amskv_kernels.planning.layout import ROWS_BITS


@dataclass(frozen=True)
class Ragged:
    """Shape of a random call: rows of each sequence, 0 among them, and entries of a history at most."""

    lengths: tuple[int, ...]
    heads: int = 2
    kv_heads: int = 2
    head_dim: int = 64
    page_size: int = 16
    entries: int = 4
    per_head: bool = False
    alike: bool = False  # all sequences have the rows of the first in their pages
    dtype: torch.dtype = torch.float32


def make_ragged(case: Ragged, seed: int = 0) -> tuple:
    """Arguments of torch.ops.amskv.attn_ragged; what no slot names holds NaN."""
    rng, normal = random.Random(seed), torch.Generator().manual_seed(seed)
    sequences, heads = len(case.lengths), case.kv_heads if case.per_head else 1
    history = [[_history(rng, case) for _ in range(heads)] for _ in range(sequences)]
    stored = [[_stored(rng, n, case.page_size) for _ in range(heads)] for n in case.lengths]
    if case.alike:
        history, stored = ([rows[0]] * sequences for rows in (history, stored))
    span = 1 + max(len(h) + len(s) for own in zip(history, stored, strict=True) for h, s in zip(*own, strict=True))
    arenas = torch.randperm(sequences * case.kv_heads, generator=normal).to(torch.int32) * span
    arena = arenas.view(sequences, case.kv_heads)
    pages = torch.full((arena.numel() * span, 2, case.page_size, case.head_dim), torch.nan, dtype=case.dtype)
    read, write = (torch.zeros(sequences, heads, max(_longest(x), 1), dtype=torch.int32) for x in (history, stored))
    for i in range(sequences):
        for h in range(heads):
            offsets = rng.sample(range(span), span)
            for table, rows in ((read, history[i][h]), (write, stored[i][h])):
                slots = [offsets.pop() << ROWS_BITS | count for count in rows]
                table[i, h, : len(slots)] = torch.tensor(slots, dtype=torch.int32)
    for i in range(sequences):
        for h in range(case.kv_heads):
            for slot in read[i, h % heads].tolist():
                page, rows = int(arena[i, h]) + (slot >> ROWS_BITS), slot & 0xFF
                pages[page, :, :rows] = torch.randn(2, rows, case.head_dim, generator=normal).to(case.dtype)
    total = sum(case.lengths)
    qkv = torch.randn(total, case.heads + 2 * case.kv_heads, case.head_dim, generator=normal).to(case.dtype)
    q, k, v = qkv.split([case.heads, case.kv_heads, case.kv_heads], dim=1)
    starts = torch.tensor((0, *case.lengths)).cumsum(0).to(torch.int32)
    return q, k, v, pages, arena, read, write, starts, case.head_dim**-0.5


def apart(args: tuple) -> list[tuple[Tensor, ...]]:
    """The calls of `attn` that it stands for, one for each sequence that has rows."""
    q, k, v, pages, arena, read, write, starts, *rest = args
    found = []
    for i, (start, end) in enumerate(zip(starts.tolist(), starts.tolist()[1:], strict=False)):
        if start < end:
            tables = (x[i % len(x)][None] for x in (arena, read, write))
            found.append((*(x[None, start:end] for x in (q, k, v)), pages, *tables, *rest))
    return found


def _history(rng: random.Random, case: Ragged) -> list[int]:
    return [rng.choice((case.page_size, rng.randint(0, case.page_size))) for _ in range(rng.randint(0, case.entries))]


def _stored(rng: random.Random, n: int, page_size: int) -> list[int]:
    if rng.random() < 0.2:
        return []
    return [min(page_size, n - start) for start in range(0, n, page_size)]


def _longest(rows: list[list[list[int]]]) -> int:
    return max(len(own) for sequence in rows for own in sequence)
