"""The pool that all sequences share: its pages, the free units, and which unit holds which logical page of whom."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from amskv_kernels.arguments import check_device, whole_number
from amskv_kernels.ops.checks import check_pool
from amskv_kernels.planning.layout import MOST_PAGES, MOST_POOL_PAGES, row_bytes
from amskv_kernels.planning.memory import MIB
from amskv_kernels.serving.units import Pages, PlanUnits


class UnitPool:
    """Pages for the sequences of one plan, unit by unit.

    Args:
        plan: what a sequence holds at every step.
        memory: bytes of the pool, rounded down to whole units.
        rows: sequences at most.
        kv_heads: Hkv.
        head_dim: D, 64, 96 or 128.
        dtype: of the pages: fp16, bf16, fp32, or int8 with one fp32 scale per row of K and of V.
        device: where they live.

    Raises:
        TypeError: a dtype or device of another type.
        ValueError: a size out of range, a device that torch does not know, or memory for less than one sequence.
    """

    def __init__(
        self, plan: PlanUnits, *, memory: int, rows: int, kv_heads: int, head_dim: int, dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:  # fmt: skip
        check_pool(rows, kv_heads, head_dim, dtype, device)
        check_device("device", device)
        self.plan = plan
        heads = kv_heads if plan.plan.heads == 1 else 1  # pages of a unit
        self.unit_bytes = heads * 2 * plan.plan.page_size * row_bytes(head_dim, dtype.itemsize)
        self.units = min(whole_number("memory", memory, 1) // self.unit_bytes, MOST_PAGES, MOST_POOL_PAGES // heads)
        least = int(plan.curve.max())
        if self.units < least:
            raise ValueError(
                f"memory is {memory / MIB:.2f} MiB, {self.units} pages of all heads; one sequence of this plan holds "
                f"up to {least}, {least * self.unit_bytes / MIB:.2f} MiB"
            )
        shape = (heads * self.units, 2, plan.plan.page_size, head_dim)
        self.pages = torch.zeros(shape, dtype=dtype, device=device)
        self.page_scales = torch.zeros(shape[:3], device=device) if dtype == torch.int8 else None
        first = torch.arange(heads, dtype=torch.int32, device=device) * self.units
        self.arena = first.expand(rows, kv_heads).contiguous()
        self.maps = np.zeros((rows, plan.plan.pages), dtype=np.int32)
        self._free = np.arange(self.units, dtype=np.int32)[::-1].copy()  # the first `_left` of them are free
        self._left = self.units

    def clear(self) -> None:
        """Everything is free."""
        self._free[:] = np.arange(self.units)[::-1]
        self._left = self.units

    @property
    def used(self) -> int:
        """Units that someone holds."""
        return self.units - self._left

    @property
    def nbytes(self) -> int:
        """Bytes of the pool, its scales included."""
        return self.units * self.unit_bytes

    def begin(self, rows: npt.NDArray[np.int64], step: int) -> None:
        """Take what the sequences at `rows` first touch in `step`; admission has seen to it that it is there."""
        fresh = self.plan.steps[step].fresh
        self._left -= len(rows) * len(fresh)
        assert self._left >= 0, "more units are wanted than were booked"
        self.maps[np.ix_(rows, fresh)] = self._free[self._left :][: len(rows) * len(fresh)].reshape(len(rows), -1)

    def end(self, rows: npt.NDArray[np.int64], step: int) -> None:
        """Give back what no later step than `step` finds in its pages."""
        self._give_back(rows, self.plan.steps[step].released)

    def abandon(self, rows: npt.NDArray[np.int64], step: int) -> None:
        """Give back all that sequences hold before `step`, which they will not begin."""
        self._give_back(rows, self.plan.steps[step].carried)

    def _give_back(self, rows: npt.NDArray[np.int64], pages: Pages) -> None:
        units = self.maps[np.ix_(rows, pages)].ravel()
        self._free[self._left : self._left + len(units)] = units
        self._left += len(units)
