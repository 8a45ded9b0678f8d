"""`attn_ragged` by calls of `attn`: one for all neighbours that are alike."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from amskv_kernels.planning.layout import ROWS_MASK


def by_neighbours(
    attn: Callable[..., tuple[Tensor, Tensor]], q: Tensor, k: Tensor, v: Tensor, pages: Tensor, arena: Tensor,
    read_slots: Tensor, write_slots: Tensor, row_starts: Tensor, softmax_scale: float,
    page_scales: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See `amskv_kernels.ops.attn_ragged`; waits for the device to learn the lengths."""
    starts: list[int] = row_starts.tolist()
    out, lse = q.new_empty(q.shape), q.new_empty(q.shape[1], len(q), dtype=torch.float32)
    for first, last in _alike(starts, read_slots, write_slots):
        rows, shape = slice(starts[first], starts[last]), (last - first, starts[first + 1] - starts[first])
        if rows.start == rows.stop:
            continue
        tables = (x[first:last] if len(x) > 1 else x for x in (arena, read_slots, write_slots))
        own, own_lse = attn(
            *(x[rows].unflatten(0, shape) for x in (q, k, v)), pages, *tables, softmax_scale, page_scales
        )
        out[rows], lse[:, rows] = own.flatten(0, 1), own_lse.transpose(0, 1).flatten(1)
    return out, lse


def _alike(starts: list[int], *slots: Tensor) -> Iterator[tuple[int, int]]:
    """First and past-the-last of neighbouring sequences with as many rows, in themselves and in every page named."""
    lengths = np.diff(starts)
    changes = lengths[1:] != lengths[:-1]
    for table in slots:
        rows = table.cpu().numpy().reshape(len(table), -1) & ROWS_MASK
        changes = changes | (rows[1:] != rows[:-1]).any(1)  # none where there is one table for all
    ends = [*(np.flatnonzero(changes) + 1).tolist(), len(lengths)]
    yield from zip([0, *ends[:-1]], ends, strict=True)
