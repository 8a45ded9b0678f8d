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

from dataclasses import dataclass
from functools import cached_property
from typing import SupportsIndex

import numpy as np
import numpy.typing as npt

from amskv_kernels.arguments import check_index, instance_of, one_of, shown, whole_number
from amskv_kernels.planning.layout import PAGE_SIZES, ROWS_MASK
from amskv_kernels.planning.lifetimes import lifetimes, planned_heads, reads_everything
from amskv_kernels.planning.pages import choose_page_size
from amskv_kernels.planning.scales import count_scale_pages, retained_by_scales, scan_scales
from amskv_kernels.planning.tables import Compaction, Extent, PageTables, Slots
from amskv_kernels.planning.tokens import count_token_pages, held_tokens, scan_tokens
from amskv_kernels.policies.base import HeadPolicy, Policy, Selection, TokenPolicy
from amskv_kernels.schedule import ScaleSchedule

# Tables of one call take about half a kilobyte on the host: half a gigabyte at most, some 70 times the largest
# published model's.
MOST_ENTRIES = 2**20


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)  # holds arrays, so a plan equals itself alone
class CachePlan:
    """Which page of an arena holds which entry, at every (step, layer) of a generation. Made by `build`; read-only.

    One arena belongs to one sequence and KV head, or, where heads differ, to one sequence and all its `heads`; all
    arenas of a batch follow the same plan.

    Attributes:
        schedule: the model's schedule.
        num_layers: L.
        page_size: rows of a page.
        heads: KV heads that share an arena, each with slot tables of its own; 1 where all heads are alike.
        selection: how a token policy chooses; None where whole scales are kept.
        lossless: whether every call reads every earlier token.
    """

    schedule: ScaleSchedule
    num_layers: int
    page_size: int
    heads: int
    selection: Selection | None
    lossless: bool
    _tables: PageTables
    _last_read: npt.NDArray[np.int64] | None  # (L · heads, K); None where tokens are chosen

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
            page_size: 16, 32, 64 or 128; by default the largest that costs little (see `PAGE_SLACK`).
            kv_heads: Hkv; needed where the policy treats heads differently.

        Raises:
            TypeError: the schedule or the policy is something else.
            ValueError: a page size, layer or head count out of range; a policy made for another model, that names a
                layer the model does not have, reads a scale not yet drawn, or brings a dropped scale back, or whose
                budget is too small for what it always keeps; more pages than a slot can name.
        """
        instance_of("schedule", schedule, ScaleSchedule)
        instance_of("policy", policy, Policy)
        num_layers = whole_number("num_layers", num_layers, 1)
        if page_size is not None:
            one_of("page_size", page_size, PAGE_SIZES)
        kv_heads = None if kv_heads is None else whole_number("kv_heads", kv_heads, 1)
        heads = kv_heads if isinstance(policy, HeadPolicy) and kv_heads is not None else 1
        if (entries := len(schedule) * num_layers * heads) > MOST_ENTRIES:
            of_heads = "" if heads == 1 else f" · {shown(heads)} heads"
            raise ValueError(
                f"num_layers is {shown(num_layers)}; {len(schedule)} scales · {shown(num_layers)} layers{of_heads} are "
                f"{shown(entries)} entries, and a plan has at most {MOST_ENTRIES}"
            )
        policy.check_fits(schedule, num_layers)
        sizes = PAGE_SIZES if page_size is None else (int(page_size),)
        if isinstance(policy, TokenPolicy):
            if not schedule.still:
                raise ValueError(
                    f"{type(policy).__name__} chooses tokens of images; schedule {schedule.name} has frames"
                )
            return cls._of_tokens(schedule, policy, num_layers, sizes)
        heads = planned_heads(policy, schedule, num_layers, kv_heads)
        last_read = lifetimes(schedule, policy, num_layers, heads)
        pages = {size: count_scale_pages(schedule, last_read, size, heads) for size in sizes}
        chosen = choose_page_size(pages, retained_by_scales(schedule, last_read))
        return cls(
            schedule=schedule, num_layers=num_layers, page_size=chosen, heads=heads, selection=None,
            lossless=reads_everything(last_read), _tables=scan_scales(schedule, last_read, chosen, heads),
            _last_read=last_read,
        )  # fmt: skip

    @classmethod
    def _of_tokens(
        cls, schedule: ScaleSchedule, policy: TokenPolicy, num_layers: int, sizes: tuple[int, ...]
    ) -> CachePlan:  # fmt: skip
        held = held_tokens(policy, schedule, num_layers)
        pages = {size: count_token_pages(schedule, held, size) for size in sizes}
        chosen = choose_page_size(pages, max(map(sum, held)))
        everything = all(row == (offset,) * num_layers for row, offset in zip(held, schedule.offsets, strict=True))
        return cls(
            schedule=schedule, num_layers=num_layers, page_size=chosen, heads=1, selection=policy.selection,
            lossless=everything, _tables=scan_tokens(schedule, policy, held, chosen), _last_read=None,
        )  # fmt: skip

    @property
    def pages(self) -> int:
        """Pages of one arena: the most that are ever live at once."""
        return self._tables.pages

    @property
    def retained(self) -> npt.NDArray[np.int64]:
        """(K,) tokens of all layers held from each step to the next, per arena."""
        return self._tables.retained

    @property
    def live(self) -> npt.NDArray[np.int64]:
        """(K, L) tokens in pages during each call: what it and later calls read, and what it writes."""
        return self._tables.live

    @property
    def live_pages(self) -> npt.NDArray[np.int64]:
        """(K, L) pages these take."""
        return self._tables.live_pages

    def __repr__(self) -> str:
        heads = "" if self.heads == 1 else f" of {self.heads} heads"
        return (
            f"CachePlan({self.schedule.name}: {len(self.schedule)} steps, {self.num_layers} layers{heads}, "
            f"{self.pages} pages of {self.page_size} rows, {self.needed_tokens} tokens needed, "
            f"{self.retained_tokens} retained)"
        )

    def read_slots(self, step: int, layer: int) -> Slots:
        """(S,) slots of the history that `layer` reads at `step`; (heads, S) where heads differ, padded with 0.

        Raises:
            IndexError: a step or layer out of range.
        """
        self._check_call(step, layer)
        return self._tables.read[step][layer]

    def write_slots(self, step: int, layer: int) -> Slots:
        """(S,) slots that take the current scale; empty when nothing will read it; (heads, S) where heads differ.

        Where their rows sum to more than the scale's tokens, the first page already holds the difference.

        Raises:
            IndexError: a step or layer out of range.
        """
        self._check_call(step, layer)
        return self._tables.write[step][layer]

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
        return self._tables.compactions.get((step, layer))

    def visible(self, layer: int, step: int, head: int = 0) -> tuple[int, ...]:
        """Earlier scales that `layer` reads at `step`, as the policy gave them; where heads differ, those of `head`.

        Raises:
            ValueError: the plan is of a token policy, which holds no whole scales.
            IndexError: a layer, step or head out of range.
        """
        self._check_call(step, layer)
        check_index("head", head, self.heads)
        if self._last_read is None:
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
        return self._tables.extents[layer * self.heads + head, scale]

    def _check_call(self, step: SupportsIndex, layer: SupportsIndex) -> None:
        check_index("step", step, len(self.schedule))
        check_index("layer", layer, self.num_layers)

    @cached_property
    def retained_tokens(self) -> int:
        """Tokens all layers hold between steps, at the widest step, per arena: of `heads` heads."""
        return int(self.retained.max())

    @cached_property
    def peak_tokens(self) -> int:
        """Most tokens held during any call, pages not rounded up: those in pages plus the current scale's K, V."""
        return int((self.live + self.heads * np.asarray(self.schedule.tokens)[:, None]).max())

    @property
    def allocated_tokens(self) -> int:
        """Rows of one arena: pages · page_size."""
        return self.pages * self.page_size

    @property
    def in_flight_tokens(self) -> int:
        """Tokens of the largest scale, whose K, V a layer has beside the pages while it attends."""
        return self.heads * max(self.schedule.tokens)

    @property
    def needed_tokens(self) -> int:
        """What must be free for one arena: its rows and the largest scale in flight."""
        return self.allocated_tokens + self.in_flight_tokens

    @cached_property
    def summed_scores(self) -> int:
        """Most fp32 scores held between calls, where the selection adds them up: one per key and KV head."""
        if self.selection is None or not self.selection.accumulate:
            return 0
        last = {layer: step for step, layer in sorted(self._tables.compactions)}
        scores, most = [0] * self.num_layers, 0
        for step, count in enumerate(self.schedule.tokens):
            for layer in range(self.num_layers):
                at = self.compaction(step, layer)
                if at is not None:
                    scores[layer] = at.kept
                elif step < last.get(layer, -1):
                    scores[layer] = self.read_rows(step, layer) + count
                most = max(most, sum(scores))
        return most
