"""The attention of one tick: every sequence over its own pages, at its own step, in one call."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from amskv_kernels import ops  # noqa: F401 - registers torch.ops.amskv
from amskv_kernels.serving.batch import Group, Tables
from amskv_kernels.serving.pool import UnitPool


class PoolAttention:
    """Runs `torch.ops.amskv.attn_ragged` over the pool, for all sequences of a tick.

    Args:
        pool: whose pages hold the history.
        rows: sequences at most.
    """

    def __init__(self, pool: UnitPool, rows: int) -> None:
        self.pool = pool
        self._tables = Tables(pool, rows)
        self._call: tuple[Tensor, Tensor, Tensor, Tensor]

    def begin(self, groups: Sequence[Group]) -> None:
        """A tick whose units have been taken: its tables go to the device, once for all layers."""
        tables, sequences, device = self._tables, groups[-1].last, self.pool.pages.device
        tables.fill(groups)
        self._rows = groups[-1].rows.stop
        read, write = (torch.from_numpy(table).to(device) for table in (tables.read, tables.write))
        starts = torch.from_numpy(tables.starts[: sequences + 1]).to(device)
        self._call = (self.pool.arena[:sequences], read[:, :sequences], write[:, :sequences], starts)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, softmax_scale: float, out: Tensor) -> None:
        """q, k, v (T, H, D) -> out (T, H, D); see `PackedAttention`."""
        rows, (arena, read, write, starts) = self._rows, self._call
        found, _ = torch.ops.amskv.attn_ragged.default(
            q[:rows], k[:rows], v[:rows], self.pool.pages, arena, read[layer], write[layer], starts, softmax_scale,
            self.pool.page_scales,
        )  # fmt: skip
        out[:rows] = found
