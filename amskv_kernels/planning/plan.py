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

from dataclasses import dataclass, field
from functools import cached_property
from typing import SupportsIndex

import numpy as np
import numpy.typing as npt

from amskv_kernels.arguments import check_index, instance_of, one_of, whole_number
from amskv_kernels.planning.layout import PAGE_SIZES, ROWS_MASK
from amskv_kernels.planning.pages import Extent, Slots
from amskv_kernels.policies.base import Policy, Selection, TokenPolicy
from amskv_kernels.schedule import ScaleSchedule


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
        # The scans build plans, so they import this module.
        from amskv_kernels.planning.scales import plan_scales
        from amskv_kernels.planning.tokens import plan_tokens

        if isinstance(policy, TokenPolicy):
            return plan_tokens(schedule, policy, num_layers, page_size)
        return plan_scales(schedule, policy, num_layers, page_size, kv_heads)

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
