"""The plan of a generation's cache: lifetimes → pages → slot tables, with its exact memory. NumPy only.

It is register allocation. An entry (layer, scale) is a value: written when its layer attends at its own step,
dead after the last step that reads it, never written if none does. Pages are registers: a linear scan over
time (step, layer) hands them out and takes them back, shared by all layers. Entries of one layer that die
together form a *run* and share their partial page, which grows in place: a later entry is stored in the rows
after an earlier one's, so only a run, not every scale, pays for rounding to whole pages.

A policy that treats the heads of a layer differently is planned the same way, each (layer, head) on its own; all heads
of a sequence then share one arena. Under a token policy a layer's tokens are one run: where it keeps all, the run
grows, where it keeps fewer, the chosen ones move to a fresh run and the old one's pages are free.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple, SupportsIndex

import numpy as np
import numpy.typing as npt

from amskv_kernels.arguments import check_index, instance_of, one_of, whole_number
from amskv_kernels.layout import PAGE_SIZES, ROWS_BITS, ROWS_MASK
from amskv_kernels.policies.base import HeadPolicy, Policy, Selection, TokenPolicy
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


@dataclass(frozen=True)
class Compaction:
    """What becomes of a layer's keys in a call that does not keep all of them; the same for all its heads.

    Attributes:
        held: rows in the layer's pages; keys count from here, then the current map's.
        kept: how many keys stay.
        observers: positions of the scoring queries in the current map.
        always: keys that stay whatever their score, ascending.
        slots: (S,) slots of the fresh pages that take the kept keys.
    """

    held: int
    kept: int
    observers: tuple[int, ...]
    always: tuple[int, ...]
    slots: Slots


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


@dataclass(frozen=True, eq=False)  # holds arrays, so a plan equals itself alone
class CachePlan:
    """Which page of an arena holds which entry, at every (step, layer) of a generation.

    One arena belongs to one sequence and KV head, or, where heads differ, to one sequence and all its `heads`; all
    arenas of a batch follow the same plan.

    Attributes:
        schedule: the model's schedule.
        num_layers: L.
        page_size: rows of a page.
        pages: pages of one arena: the most that are ever live at once.
        retained: (K,) tokens of all layers held from each step to the next, per arena.
        live: (K, L) tokens in pages during each call: what it and later calls read, and what it writes.
        live_pages: (K, L) pages these take.
        heads: KV heads that share an arena, each with slot tables of its own; 1 where all heads are alike.
        selection: how a token policy chooses; None where whole scales are kept.
        lossless: whether every call reads every earlier token.
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
    heads: int = 1
    selection: Selection | None = None
    lossless: bool = False
    _compactions: dict[tuple[int, int], Compaction] = field(default_factory=dict)

    @classmethod
    def build(
        cls,
        schedule: ScaleSchedule,
        policy: Policy,
        num_layers: int,
        page_size: int | None = None,
        kv_heads: int | None = None,
    ) -> CachePlan:
        """Plan a generation.

        Args:
            schedule: the model's schedule.
            policy: what each layer reads at each step.
            num_layers: L.
            page_size: 16, 32, 64 or 128; by default the one that suits the schedule (see `PAGE_SLACK`).
            kv_heads: Hkv; needed where the policy treats heads differently.

        Raises:
            TypeError: the schedule or the policy is something else.
            ValueError: a page size, layer or head count out of range, a policy that names a layer the model does
                not have, reads a scale not yet drawn, or brings a dropped scale back, or whose budget is too small
                for what it always keeps.
        """
        instance_of("schedule", schedule, ScaleSchedule)
        instance_of("policy", policy, Policy)
        whole_number("num_layers", num_layers, 1)
        if page_size is not None:
            one_of("page_size", page_size, PAGE_SIZES)
        if kv_heads is not None:
            whole_number("kv_heads", kv_heads, 1)
        policy.check_layers(num_layers)
        if isinstance(policy, TokenPolicy):
            return plan_tokens(schedule, policy, num_layers, page_size)
        heads = _heads(policy, schedule, num_layers, kv_heads)
        last_read = lifetimes(schedule, policy, num_layers, heads)
        chosen = _choose_page_size(schedule, last_read, heads) if page_size is None else page_size
        return _scan(schedule, last_read, chosen, heads)

    def __repr__(self) -> str:
        heads = "" if self.heads == 1 else f" of {self.heads} heads"
        return (
            f"CachePlan({self.schedule.name}: {len(self.schedule)} steps, {self.num_layers} layers{heads}, "
            f"{self.pages} pages of {self.page_size} rows, {self.retained_tokens} tokens retained, "
            f"{self.peak_tokens} at peak)"
        )

    def read_slots(self, step: int, layer: int) -> Slots:
        """(S,) slots of the history that `layer` reads at `step`; (heads, S) where heads differ, padded with 0.

        Raises:
            IndexError: a step or layer out of range.
        """
        self._check_call(step, layer)
        return self._read[step][layer]

    def write_slots(self, step: int, layer: int) -> Slots:
        """(S,) slots that take the current scale; empty when nothing will read it; (heads, S) where heads differ.

        Where their rows sum to more than the scale's tokens, the first page already holds the difference.

        Raises:
            IndexError: a step or layer out of range.
        """
        self._check_call(step, layer)
        return self._write[step][layer]

    def read_rows(self, step: int, layer: int) -> int:
        """Tokens that `layer` reads from pages at `step`; where heads differ, all of them together.

        Raises:
            IndexError: a step or layer out of range.
        """
        return int((self.read_slots(step, layer) & ROWS_MASK).sum())

    def compaction(self, step: int, layer: int) -> Compaction | None:
        """What a token policy does after `layer` has attended at `step`; None where it keeps all or none.

        Raises:
            IndexError: a step or layer out of range.
        """
        self._check_call(step, layer)
        return self._compactions.get((step, layer))

    def visible(self, layer: int, step: int, head: int = 0) -> tuple[int, ...]:
        """Earlier scales that `layer` reads at `step`, as the policy gave them; where heads differ, those of `head`.

        Raises:
            ValueError: the plan is of a token policy, which holds no whole scales.
            IndexError: a layer, step or head out of range.
        """
        self._check_call(step, layer)
        check_index("head", head, self.heads)
        if self.selection is not None:
            raise ValueError("this plan is of a token policy; which tokens a layer holds is decided on the device")
        return tuple(int(s) for s in np.flatnonzero(self._last_read[layer * self.heads + head, :step] >= step))

    def slots_of(self, layer: int, step: int, scale: int, head: int = 0) -> tuple[Extent, ...]:
        """Where `layer` finds `scale` at `step`: the scale index of the paged layout.

        Raises:
            ValueError: the layer, where heads differ its `head`, does not hold that scale at that step.
            IndexError: a layer, step, scale or head out of range.
        """
        check_index("scale", scale, len(self.schedule))
        if scale not in self.visible(layer, step, head):
            where = f"layer {layer}" if self.heads == 1 else f"head {head} of layer {layer}"
            raise ValueError(f"{where} does not hold scale {scale} at step {step}")
        return self._extents[layer * self.heads + head, scale]

    def _check_call(self, step: SupportsIndex, layer: SupportsIndex) -> None:
        check_index("step", step, len(self.schedule))
        check_index("layer", layer, self.num_layers)

    @cached_property
    def retained_tokens(self) -> int:
        """Tokens all layers hold between steps, at the widest step, per arena: of `heads` heads."""
        return int(self.retained.max())

    @cached_property
    def peak_tokens(self) -> int:
        """Most tokens held during any call: those in pages plus the current scale's own K, V in flight."""
        in_flight = self.heads * np.asarray(self.schedule.tokens)[:, None]
        return int((self.live + in_flight).max())

    @property
    def allocated_tokens(self) -> int:
        """Rows of one arena: pages · page_size."""
        return self.pages * self.page_size


def lifetimes(
    schedule: ScaleSchedule, policy: Policy, num_layers: int, kv_heads: int = 1
) -> npt.NDArray[np.int64]:  # fmt: skip
    """(L · Hkv, K) the last step at which each layer's head reads each scale; −1 for one that is never read.

    Raises:
        ValueError: the policy reads a scale not yet drawn, or one it has dropped before.
    """
    last_read = np.full((num_layers * kv_heads, len(schedule)), -1, dtype=np.int64)
    visible_to = policy.visible_to if isinstance(policy, HeadPolicy) else None
    where = f"{type(policy).__name__} reads scale"
    for row in range(num_layers * kv_heads):
        layer, head = divmod(row, kv_heads)
        held: tuple[int, ...] = ()
        for step in range(len(schedule)):
            if visible_to is None:
                visible = tuple(policy.visible(schedule, layer, step))
            else:
                visible = tuple(visible_to(schedule, layer, head, step))
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
                last_read[row, scale] = step
            if list(visible) != sorted(set(visible)):
                raise ValueError(f"{where}s {visible} in layer {layer} at step {step}; they must ascend, each once")
            held = visible
    return last_read


def _heads(policy: Policy, schedule: ScaleSchedule, num_layers: int, kv_heads: int | None) -> int:
    """How many heads of a layer are planned on their own."""
    if not isinstance(policy, HeadPolicy):
        return 1
    if kv_heads is None:
        raise ValueError(f"kv_heads is None; {type(policy).__name__} treats heads differently and must know it")
    policy.check_heads(schedule, num_layers, kv_heads)
    return kv_heads


def _smallest(rows: dict[int, int]) -> int:
    """The page size to take, given the pool's rows for each."""
    return max(size for size in PAGE_SIZES if rows[size] <= (1 + PAGE_SLACK) * min(rows.values()))


def _choose_page_size(schedule: ScaleSchedule, last_read: npt.NDArray[np.int64], heads: int) -> int:
    return _smallest(
        {size: max(_live_pages(schedule, last_read, size, heads), default=0) * size for size in PAGE_SIZES}
    )


def _live_pages(
    schedule: ScaleSchedule, last_read: npt.NDArray[np.int64], page_size: int, heads: int
) -> Iterator[int]:  # fmt: skip
    """Pages live during each call, by counting alone."""
    tokens = schedule.tokens
    runs: list[dict[int, int]] = [{} for _ in last_read]
    deaths = last_read.tolist()
    live = freed = 0
    for step, count in enumerate(tokens):
        for row, rows in enumerate(runs):
            dies = deaths[row][step]
            if dies >= 0:
                before = rows.get(dies, 0)
                rows[dies] = before + count
                live += -(-(before + count) // page_size) - -(-before // page_size)
            freed += -(-rows.pop(step, 0) // page_size)
            if (row + 1) % heads == 0:
                yield live
                live, freed = live - freed, 0


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


def _scan(schedule: ScaleSchedule, last_read: npt.NDArray[np.int64], page_size: int, heads: int) -> CachePlan:
    """Hand out pages call by call. A call is all heads of a layer: what one of them frees, only the next call takes."""
    steps, num_layers = len(schedule), len(last_read) // heads
    pages = Pages()
    runs: list[dict[int, _Run]] = [{} for _ in last_read]
    none = np.empty(0, dtype=np.int32)
    read: list[tuple[Slots, ...]] = []
    write: list[tuple[Slots, ...]] = []
    extents: dict[tuple[int, int], tuple[Extent, ...]] = {}
    live, live_pages = np.zeros((2, steps, num_layers), dtype=np.int64)
    retained = np.zeros(steps, dtype=np.int64)
    tokens_live = 0
    deaths = last_read.tolist()
    for step, count in enumerate(schedule.tokens):
        reads, writes, dead = [], [], []
        for row, held in enumerate(runs):
            reads.append(_full_first([run.slots(page_size) for run in held.values()], page_size) if held else none)
            dies = deaths[row][step]
            if dies < 0:
                writes.append(none)
            else:
                run = held.setdefault(dies, _Run(none))
                slots, extents[row, step] = _store(run, count, page_size, pages)
                writes.append(slots)
                tokens_live += count
            if step in held:
                dead.append(held.pop(step))
            if (row + 1) % heads == 0:
                layer = row // heads
                live[step, layer], live_pages[step, layer] = tokens_live, pages.live
                tokens_live -= sum(run.rows for run in dead)
                for run in dead:
                    pages.give_back(run.pages)
                dead.clear()
        read.append(_by_layer(reads, heads))
        write.append(_by_layer(writes, heads))
        retained[step] = tokens_live
    return CachePlan(
        schedule, num_layers, page_size, pages.count, retained, live, live_pages,
        tuple(read), tuple(write), extents, last_read, heads, lossless=reads_everything(last_read),
    )  # fmt: skip


def _full_first(tables: list[Slots], page_size: int) -> Slots:
    """One table, full pages before partial ones: kernels need no mask up to the first that is not full."""
    table = np.concatenate(tables)
    full = (table & ROWS_MASK) == page_size
    return np.concatenate([table[full], table[~full]])


def _by_layer(tables: list[Slots], heads: int) -> tuple[Slots, ...]:
    """One table per layer: those of its heads as rows, the shorter ones padded with empty slots."""
    if heads == 1:
        return tuple(tables)
    found = []
    for first in range(0, len(tables), heads):
        own = tables[first : first + heads]
        table = np.zeros((heads, max(len(each) for each in own)), dtype=np.int32)
        for row, each in zip(table, own, strict=True):
            row[: len(each)] = each
        found.append(table)
    return tuple(found)


def reads_everything(last_read: npt.NDArray[np.int64]) -> bool:
    """Whether every scale is read up to the last step."""
    steps = last_read.shape[1]
    return bool((last_read[:, :-1] == steps - 1).all())


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


def plan_tokens(
    schedule: ScaleSchedule, policy: TokenPolicy, num_layers: int, page_size: int | None = None
) -> CachePlan:  # fmt: skip
    """The plan of a token policy, see `CachePlan.build`.

    Raises:
        ValueError: the policy asks for tokens that a layer does not have, or has no room for what is always kept.
    """
    held = policy.held(schedule, num_layers)
    if page_size is not None:
        return _scan_tokens(schedule, policy, held, page_size)
    plans = {size: _scan_tokens(schedule, policy, held, size) for size in PAGE_SIZES}
    return plans[_smallest({size: plan.allocated_tokens for size, plan in plans.items()})]


def _scan_tokens(
    schedule: ScaleSchedule, policy: TokenPolicy, held: tuple[tuple[int, ...], ...], page_size: int
) -> CachePlan:  # fmt: skip
    steps, num_layers = len(schedule), len(held[0])
    none = np.empty(0, dtype=np.int32)
    pages, runs = Pages(), [_Run(none) for _ in range(num_layers)]
    read: list[tuple[Slots, ...]] = []
    write: list[tuple[Slots, ...]] = []
    compactions: dict[tuple[int, int], Compaction] = {}
    live, live_pages = np.zeros((2, steps, num_layers), dtype=np.int64)
    retained = np.zeros(steps, dtype=np.int64)
    for step, count in enumerate(schedule.tokens):
        read.append(tuple(run.slots(page_size) for run in runs))
        writes = []
        for layer, run in enumerate(runs):
            kept = held[step + 1][layer] if step + 1 < steps else 0
            writes.append(none)
            old = run
            if kept == run.rows + count:
                writes[-1], _ = _store(run, count, page_size, pages)
            else:
                runs[layer] = _Run(pages.take(-(-kept // page_size)), kept)
                if kept:
                    slots = runs[layer].slots(page_size)
                    compactions[step, layer] = _compaction(schedule, policy, step, layer, run.rows, kept, slots)
            # Until a compaction is done its source is still there.
            both = sum(each.rows for each in runs) + (old.rows if runs[layer] is not old else 0)
            live[step, layer], live_pages[step, layer] = both, pages.live
            if runs[layer] is not old:
                pages.give_back(old.pages)
        write.append(tuple(writes))
        retained[step] = sum(run.rows for run in runs)
    lossless = all(row == (offset,) * num_layers for row, offset in zip(held, schedule.offsets, strict=True))
    return CachePlan(
        schedule, num_layers, page_size, pages.count, retained, live, live_pages, tuple(read), tuple(write),
        {}, np.empty((0, steps), dtype=np.int64), 1, policy.selection, lossless, compactions,
    )  # fmt: skip


def _compaction(
    schedule: ScaleSchedule, policy: TokenPolicy, step: int, layer: int, held: int, kept: int, slots: Slots
) -> Compaction:  # fmt: skip
    size, selection = schedule.sizes[step], policy.selection
    if kept > held + size[0] * size[1]:
        raise ValueError(
            f"{type(policy).__name__} wants {kept} tokens in layer {layer} after step {step}; it holds {held} and "
            f"the step brings {size[0] * size[1]}"
        )
    return Compaction(held, kept, selection.observing(size), selection.always_kept(size, held, kept), slots)
