"""The plan of a generation's cache: lifetimes → pages → slot tables, with its exact memory. NumPy only.

It is register allocation. An entry (layer, scale) is a value: written when its layer attends at its own step,
dead after the last step that reads it, never written if none does. Pages are registers: a linear scan over
time (step, layer) hands them out and takes them back, shared by all layers. Entries of one layer that die
together form a *run* and share their partial page, which grows in place: a later entry is stored in the rows
after an earlier one's, so only a run, not every scale, pays for rounding to whole pages.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from amskv_kernels.layout import PAGE_SIZES, ROWS_BITS, ROWS_MASK
from amskv_kernels.policies.base import Policy
from amskv_kernels.schedule import ScaleSchedule

# Larger pages mean fewer, longer copies, but more rounding: take the largest page whose pool is at most
# half a percent above the smallest pool any page size gives.
PAGE_SLACK = 0.005

Slots = npt.NDArray[np.int32]


class Extent(NamedTuple):
    """Rows [first_row, first_row + rows) of the page at `page_offset` in an arena."""

    page_offset: int
    first_row: int
    rows: int


def page_slots(pages: Slots, rows: int, page_size: int) -> Slots:
    """Slot entries of `rows` rows stored back to back in `pages`: all full but the last."""
    table = (pages << ROWS_BITS) + np.int32(page_size)
    if table.size:
        table[-1] -= len(pages) * page_size - rows
    return table


@dataclass
class _Run:
    """Entries of one layer that die together, stored back to back."""

    pages: Slots
    rows: int = 0

    def slots(self, page_size: int, first_page: int = 0) -> Slots:
        """The run's filled pages from `first_page` on, as slot entries."""
        return page_slots(self.pages[first_page:], self.rows - first_page * page_size, page_size)


@dataclass(frozen=True)
class CachePlan:
    """Which page of an arena holds which entry, at every (step, layer) of a generation.

    One arena belongs to one sequence and KV head; all arenas of a batch follow the same plan.

    Attributes:
        schedule: the model's schedule.
        num_layers: L.
        page_size: rows of a page.
        pages: pages of one arena: the most that are ever live at once.
        retained: (K,) tokens of all layers held from each step to the next, per sequence and head.
        live: (K, L) tokens in pages during each call: what it and later calls read, and what it writes.
        live_pages: (K, L) pages these take.
    """

    schedule: ScaleSchedule
    num_layers: int
    page_size: int
    pages: int
    retained: npt.NDArray[np.int64]
    live: npt.NDArray[np.int64]
    live_pages: npt.NDArray[np.int64]
    _read: tuple[tuple[Slots, ...], ...]
    _write: tuple[tuple[Slots, ...], ...]
    _extents: dict[tuple[int, int], tuple[Extent, ...]]
    _last_read: npt.NDArray[np.int64]

    @classmethod
    def build(cls, schedule: ScaleSchedule, policy: Policy, num_layers: int, page_size: int | None = None) -> CachePlan:
        """Plan a generation.

        Args:
            schedule: the model's schedule.
            policy: what each layer reads at each step.
            num_layers: L.
            page_size: 16, 32, 64 or 128; by default the one that suits the schedule (see `PAGE_SLACK`).

        Raises:
            ValueError: a page size or layer count out of range, a policy that names a layer the model does
                not have, reads a scale not yet drawn, or brings a dropped scale back.
        """
        if not isinstance(num_layers, int) or num_layers < 1:
            raise ValueError(f"num_layers is {num_layers!r}; it must be a whole number ≥ 1")
        if page_size is not None and page_size not in PAGE_SIZES:
            raise ValueError(f"page_size is {page_size!r}; it must be one of {PAGE_SIZES}")
        policy.check_layers(num_layers)
        last_read = lifetimes(schedule, policy, num_layers)
        chosen = _choose_page_size(schedule, last_read) if page_size is None else page_size
        return _scan(schedule, last_read, chosen)

    def read_slots(self, step: int, layer: int) -> Slots:
        """(S,) slots of the history that `layer` reads at `step`."""
        return self._read[step][layer]

    def write_slots(self, step: int, layer: int) -> Slots:
        """(S,) slots that take the current scale; empty when nothing will read it.

        Where their rows sum to more than the scale's tokens, the first page already holds the difference.
        """
        return self._write[step][layer]

    def visible(self, layer: int, step: int) -> tuple[int, ...]:
        """Earlier scales that `layer` reads at `step`, as the policy gave them."""
        return tuple(int(s) for s in np.flatnonzero(self._last_read[layer, :step] >= step))

    def slots_of(self, layer: int, step: int, scale: int) -> tuple[Extent, ...]:
        """Where `layer` finds `scale` at `step`: the scale index of the paged layout.

        Raises:
            ValueError: the layer does not hold that scale at that step.
        """
        if scale not in self.visible(layer, step):
            raise ValueError(f"layer {layer} does not hold scale {scale} at step {step}")
        return self._extents[layer, scale]

    @cached_property
    def retained_tokens(self) -> int:
        """Tokens all layers hold between steps, at the widest step, per sequence and KV head."""
        return int(self.retained.max())

    @cached_property
    def peak_tokens(self) -> int:
        """Most tokens held during any call: those in pages plus the current scale's own K, V in flight."""
        in_flight = np.asarray(self.schedule.tokens)[:, None]
        return int((self.live + in_flight).max())

    @property
    def allocated_tokens(self) -> int:
        """Rows of one arena: pages · page_size."""
        return self.pages * self.page_size


def lifetimes(schedule: ScaleSchedule, policy: Policy, num_layers: int) -> npt.NDArray[np.int64]:
    """(L, K) the last step at which each layer reads each scale; −1 for one that is never read.

    Raises:
        ValueError: the policy reads a scale not yet drawn, or one it has dropped before.
    """
    last_read = np.full((num_layers, len(schedule)), -1, dtype=np.int64)
    for layer in range(num_layers):
        held: tuple[int, ...] = ()
        for step in range(len(schedule)):
            visible = tuple(policy.visible(schedule, layer, step))
            where = f"{type(policy).__name__} reads scale"
            for scale in visible:
                if not isinstance(scale, int) or not 0 <= scale < step:
                    raise ValueError(
                        f"{where} {scale!r} in layer {layer} at step {step}; it must be an earlier one, 0 … {step - 1}"
                    )
                if scale not in held and scale != step - 1:
                    raise ValueError(
                        f"{where} {scale} in layer {layer} at step {step}, after having dropped it; "
                        f"a dropped scale must never return"
                    )
                last_read[layer, scale] = step
            if list(visible) != sorted(set(visible)):
                raise ValueError(f"{where}s {visible} in layer {layer} at step {step}; they must ascend, each once")
            held = visible
    return last_read


def _choose_page_size(schedule: ScaleSchedule, last_read: npt.NDArray[np.int64]) -> int:
    rows = {size: max(_live_pages(schedule, last_read, size), default=0) * size for size in PAGE_SIZES}
    smallest = min(rows.values())
    return max(size for size in PAGE_SIZES if rows[size] <= (1 + PAGE_SLACK) * smallest)


def _live_pages(schedule: ScaleSchedule, last_read: npt.NDArray[np.int64], page_size: int) -> Iterator[int]:
    """Pages live during each call, by counting alone."""
    tokens = schedule.tokens
    runs: list[dict[int, int]] = [{} for _ in last_read]
    deaths = last_read.tolist()
    live = 0
    for step, count in enumerate(tokens):
        for layer, rows in enumerate(runs):
            dies = deaths[layer][step]
            if dies >= 0:
                before = rows.get(dies, 0)
                rows[dies] = before + count
                live += -(-(before + count) // page_size) - -(-before // page_size)
            yield live
            live -= -(-rows.pop(step, 0) // page_size)


class Pages:
    """Free pages of an arena, lowest first, so that a scale's pages tend to lie side by side."""

    def __init__(self) -> None:
        self.count = 0
        self.free: list[int] = []

    def take(self, number: int) -> Slots:
        """`number` pages, new ones where none is free."""
        taken = [heapq.heappop(self.free) for _ in range(min(number, len(self.free)))]
        fresh = range(self.count, self.count + number - len(taken))
        self.count += len(fresh)
        return np.array([*taken, *fresh], dtype=np.int32)

    def give_back(self, pages: Slots) -> None:
        """Free `pages` for others."""
        for page in pages.tolist():
            heapq.heappush(self.free, page)

    @property
    def live(self) -> int:
        """Pages taken and not given back."""
        return self.count - len(self.free)


def _scan(schedule: ScaleSchedule, last_read: npt.NDArray[np.int64], page_size: int) -> CachePlan:
    num_layers, steps = last_read.shape
    pages = Pages()
    runs: list[dict[int, _Run]] = [{} for _ in range(num_layers)]
    none = np.empty(0, dtype=np.int32)
    read: list[tuple[Slots, ...]] = []
    write: list[tuple[Slots, ...]] = []
    extents: dict[tuple[int, int], tuple[Extent, ...]] = {}
    live, live_pages = np.zeros((2, steps, num_layers), dtype=np.int64)
    retained = np.zeros(steps, dtype=np.int64)
    tokens_live = 0
    deaths = last_read.tolist()
    for step, count in enumerate(schedule.tokens):
        reads, writes = [], []
        for layer, held in enumerate(runs):
            reads.append(np.concatenate([run.slots(page_size) for run in held.values()]) if held else none)
            dies = deaths[layer][step]
            if dies < 0:
                writes.append(none)
            else:
                run = held.setdefault(dies, _Run(none))
                slots, extents[layer, step] = _store(run, count, page_size, pages)
                writes.append(slots)
                tokens_live += count
            live[step, layer], live_pages[step, layer] = tokens_live, pages.live
            dead = held.pop(step, None)
            if dead is not None:
                tokens_live -= dead.rows
                pages.give_back(dead.pages)
        read.append(tuple(reads))
        write.append(tuple(writes))
        retained[step] = tokens_live
    return CachePlan(
        schedule, num_layers, page_size, pages.count, retained, live, live_pages,
        tuple(read), tuple(write), extents, last_read,
    )  # fmt: skip


def _store(run: _Run, count: int, page_size: int, pages: Pages) -> tuple[Slots, tuple[Extent, ...]]:
    """Add `count` rows to the run: its write slots, and where the rows lie."""
    first_page, first_row = divmod(run.rows, page_size)
    run.rows += count
    run.pages = np.concatenate([run.pages, pages.take(-(-run.rows // page_size) - len(run.pages))])
    slots = run.slots(page_size, first_page)
    extents = []
    for slot in slots.tolist():
        end = slot & ROWS_MASK
        extents.append(Extent(slot >> ROWS_BITS, first_row, end - first_row))
        first_row = 0
    return slots, tuple(extents)
