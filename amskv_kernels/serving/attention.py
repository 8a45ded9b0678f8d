"""The attention of one tick: every sequence over its own pages, at its own step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from amskv_kernels import ops  # noqa: F401 - registers torch.ops.amskv
from amskv_kernels.serving.batch import Group, Tables
from amskv_kernels.serving.pool import UnitPool


class PoolAttention:
    """Runs `torch.ops.amskv.attn` over the pool, for all sequences of a tick.

    Args:
        pool: whose pages hold the history.
        rows: sequences at most.
    """

    def __init__(self, pool: UnitPool, rows: int) -> None:
        self.pool = pool
        self._tables = Tables(pool, rows)
        self._groups: Sequence[Group] = ()
        self._slots: tuple[Tensor, Tensor]

    def begin(self, groups: Sequence[Group]) -> None:
        """A tick whose units have been taken: its tables go to the device, once for all layers."""
        self._groups = groups
        self._tables.fill(groups)
        device = self.pool.pages.device
        read, write = torch.from_numpy(self._tables.read), torch.from_numpy(self._tables.write)
        self._slots = (read.to(device), write.to(device))

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, softmax_scale: float, out: Tensor) -> None:
        """q, k, v (T, H, D) -> out (T, H, D); see `PackedAttention`."""
        read, write = (slots[layer] for slots in self._slots)
        for group in self._groups:
            rows, own = group.rows, slice(group.first, group.last)
            shape = (group.sequences, group.tokens)
            found, _ = torch.ops.amskv.attn.default(
                *(x[rows].unflatten(0, shape) for x in (q, k, v)), self.pool.pages, self.pool.arena[own], read[own],
                write[own], softmax_scale, self.pool.page_scales,
            )  # fmt: skip
            out[rows] = found.flatten(0, 1)
