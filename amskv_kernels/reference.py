"""The slow truth: the ops as their definitions read, one sequence and head at a time, in fp64."""

from __future__ import annotations

import torch
from torch import Tensor

from amskv_kernels.layout import ROWS_BITS, ROWS_MASK


def attn(
    q: Tensor, k: Tensor, v: Tensor, pages: Tensor, arena: Tensor,
    read_slots: Tensor, write_slots: Tensor, softmax_scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """softmax(softmax_scale · q [history, k]ᵀ) [history, v], then the store.

    Returns:
        out (B, n, H, D) and lse (B, H, n), natural log, both fp64.
    """
    (batch, n, heads, head_dim), group = q.shape, q.shape[2] // k.shape[2]
    out = torch.zeros(batch, n, heads, head_dim, dtype=torch.float64)
    lse = torch.full((batch, heads, n), -torch.inf, dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            named = _named(arena, read_slots, b, h // group)
            keys, values = (
                torch.cat([*(pages[page, i, :rows] for page, rows in named), x[b, :, h // group]]).double()
                for i, x in enumerate((k, v))
            )
            scores = softmax_scale * q[b, :, h].double() @ keys.T
            lse[b, h] = scores.logsumexp(-1)
            out[b, :, h] = (scores - lse[b, h, :, None]).exp() @ values
    append(k, v, pages, arena, write_slots)
    return out, lse


def append(k: Tensor, v: Tensor, pages: Tensor, arena: Tensor, write_slots: Tensor) -> None:
    """Rows of k, v in order, page by page, after the rows the first page holds; the rest of a page becomes 0."""
    for b in range(k.shape[0]):
        for h in range(k.shape[2]):
            named = _named(arena, write_slots, b, h)
            done = k.shape[1] - sum(rows for _, rows in named)  # below 0: minus the rows already there
            for page, rows in named:
                for i, x in enumerate((k, v)):
                    first = max(0, -done)
                    pages[page, i, first:rows] = x[b, done + first : done + rows, h]
                    pages[page, i, rows:] = 0
                done += rows


def _named(arena: Tensor, slots: Tensor, b: int, h: int) -> list[tuple[int, int]]:
    """The (page, rows) that the slots of one sequence and head name."""
    own = slots[b % slots.shape[0], h % slots.shape[1]].tolist()
    return [(int(arena[b, h]) + (s >> ROWS_BITS), s & ROWS_MASK) for s in own if s & ROWS_MASK]
