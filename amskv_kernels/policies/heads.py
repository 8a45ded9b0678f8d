"""Policies that keep whole scales head by head: HeatKV."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from amskv_kernels.arguments import instance_of, real_number, shown, whole_number
from amskv_kernels.files import MISTAKES, check_fits, finite_table, read_json, reason, write_json
from amskv_kernels.policies.base import HeadPolicy, set_fields
from amskv_kernels.policies.budgets import ROUNDING, Share, Tokens, budget_mean
from amskv_kernels.schedule import ScaleSchedule

FORMAT = "amskv-head-orders-1"

HeadOf = tuple[int, int]
# Whose attention S-CAS is: that of the sequences with a prompt or class, the first half of a guided batch, as HeatKV's
# authors measure it, or of all.
HALVES = ("conditional", "both")
# Last step at which (layer, head, scale) is read; absent: never.
Reads = dict[tuple[int, int, int], int]


@dataclass(frozen=True, eq=False)
class HeadOrders:
    """For each source scale all (head, layer) pairs, the one that later scales need least first.

    Args:
        orders: one per scale from the first unprotected one to the last but one; each of all heads of all layers.
        schedule: the (h, w) sizes measured on; None in files that do not say.
        images: how many images were measured; 0 in files that do not say.
        model: a name for people.
        half: which sequences of a guided generation were measured, see `HALVES`; None in files that do not say.

    Raises:
        TypeError: a field of another type.
        ValueError: a field out of range, or no order at all; names the field.
    """

    orders: tuple[tuple[HeadOf, ...], ...]
    schedule: tuple[tuple[int, int], ...] | None = None
    images: int = 0
    model: str = "unnamed"
    half: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.orders, Iterable):
            raise TypeError(f"orders is {shown(self.orders)}; it must be [head, layer] pairs for each source scale")
        orders = tuple(_order(i, order) for i, order in enumerate(self.orders))
        if not orders or not all(orders):
            raise ValueError("the order is empty")
        sizes = None if self.schedule is None else ScaleSchedule(self.schedule).sizes
        images = whole_number("images", self.images, 0)
        instance_of("model", self.model, str)
        if self.half is not None:
            check_half(self.half)
        set_fields(self, orders=orders, schedule=sizes, images=images)

    @classmethod
    def from_scores(
        cls, scores: Sequence[Sequence[Sequence[float]]], schedule: ScaleSchedule, protected: int = 3,
        images: int = 0, model: str = "unnamed", half: str | None = None,
    ) -> HeadOrders:  # fmt: skip
        """Orders from S-CAS: (L, H, K) mean attention that a head pays to a scale while later ones are drawn.

        Raises:
            TypeError: a schedule of another type, or scores that are no numbers.
            ValueError: scores that are not finite or not (L, H, K), or as many protected scales as are read later.
        """
        instance_of("schedule", schedule, ScaleSchedule)
        whole_number("protected", protected, 0)
        if len(schedule) - 1 <= protected:
            raise ValueError(
                f"protected is {shown(protected)}; schedule {schedule.name} has {len(schedule) - 1} earlier scales"
            )
        if not isinstance(scores, Iterable) or not (layers := tuple(scores)):
            raise ValueError(f"scores is {shown(scores)}; it must be a table of numbers (L, H, K)")
        tables = [finite_table(f"scores[{i}]", layer, len(schedule)) for i, layer in enumerate(layers)]
        if len({len(table) for table in tables}) != 1:
            raise ValueError("scores has layers of different head counts; it must be a table of numbers (L, H, K)")
        pairs = [(head, layer) for head in range(len(tables[0])) for layer in range(len(tables))]
        return cls(
            tuple(
                tuple(sorted(pairs, key=lambda pair: (tables[pair[1]][pair[0]][scale], pair)))
                for scale in range(protected, len(schedule) - 1)
            ),
            schedule.sizes, images, model, half,
        )  # fmt: skip

    def save(self, path: str | Path) -> None:
        """Write as JSON."""
        write_json(path, {"format": FORMAT, **asdict(self)}, indent=None)

    @classmethod
    def load(cls, path: str | Path) -> HeadOrders:
        """Read what `save` wrote, or the JSON that HeatKV's authors release: the bare orders, or a field "orders".

        A pair is [head, layer], as in the released files.

        Raises:
            ValueError: the file is missing, is not JSON, or holds something else; names the file.
        """
        raw = read_json(path, "head order")
        fields: dict[str, Any] = raw if isinstance(raw, dict) else {"orders": raw}
        try:
            named = {"model": Path(path).stem} | {
                k: fields[k] for k in ("schedule", "images", "model", "half") if k in fields
            }
            return cls(fields["orders"], **named)
        except MISTAKES as error:
            raise ValueError(
                f"head order {path} is corrupt: {reason(error)}; it must hold a list of [head, layer] pairs per source "
                f"scale"
            ) from error

    def check_fits(self, schedule: ScaleSchedule, num_layers: int, kv_heads: int) -> None:
        """Raise ValueError when the orders are of another model or schedule."""
        if self.schedule is not None:
            check_fits("the head order", self.schedule, num_layers, schedule, num_layers)
        expected = {(head, layer) for head in range(kv_heads) for layer in range(num_layers)}
        for i, order in enumerate(self.orders):
            if len(order) != len(expected) or set(order) != expected:
                strange = next((pair for pair in order if pair not in expected), None)
                found = f"{len(order)} pairs" if strange is None else f"head {strange[0]} of layer {strange[1]}"
                raise ValueError(
                    f"the head order's list {i} has {found}; this model has {num_layers} layers of {kv_heads} KV "
                    f"heads, each of which must stand in it once"
                )


def check_half(half: object) -> str:
    """One of `HALVES`, or a ValueError."""
    if not isinstance(half, str) or half not in HALVES:
        raise ValueError(f"half is {shown(half)}; it must be {' or '.join(map(repr, HALVES))}")
    return half


def _order(scale: int, pairs: Any) -> tuple[HeadOf, ...]:
    """The (head, layer) pairs of one source scale, checked."""
    found = []
    for pair in pairs if isinstance(pairs, Iterable) else (pairs,):
        members = tuple(pair) if isinstance(pair, Iterable) else ()
        if len(members) != 2:
            raise ValueError(f"orders[{scale}] has {shown(pair)}; each must be two whole numbers [head, layer]")
        found.append((whole_number("head", members[0], 0), whole_number("layer", members[1], 0)))
    return tuple(found)


@dataclass(frozen=True, eq=False)
class HeatKV(HeadPolicy):
    """HeatKV (arXiv 2605.14877): under a cap on all heads together, those that need a scale least drop it first.

    The first scales are protected. After step t, the same number of heads drops each of the other scales: as many as
    the cap asks for. The cap is strict: where the layers that have stored the current scale already would exceed it
    together with those that have not had their turn, the last layers drop early what they drop at this step anyway.

    Args:
        budget: `Tokens`, a `Share`, or, as the paper counts, the share of the tokens of all scales but the last.
        orders: see `HeadOrders`; the scales before its first are protected.

    Raises:
        TypeError: a budget that is none, or orders of another type.
        ValueError: a share outside (0, 1]; later, orders of another model, or a budget without room for the
            protected scales.
    """

    budget: Tokens | Share | float
    orders: HeadOrders

    def __post_init__(self) -> None:
        instance_of("orders", self.orders, HeadOrders)
        if not isinstance(self.budget, Tokens | Share) and not 0 < real_number("budget", self.budget) <= 1:
            raise ValueError(f"budget is {shown(self.budget)}; it must be above 0 and at most 1")
        object.__setattr__(self, "_reads", {})

    def __repr__(self) -> str:
        return f"HeatKV(budget={self.budget!r}, orders of {self.orders.model})"

    def check_heads(self, schedule: ScaleSchedule, num_layers: int, kv_heads: int) -> None:
        self.orders.check_fits(schedule, num_layers, kv_heads)
        protected = len(schedule) - 1 - len(self.orders.orders)
        if protected < 0:
            raise ValueError(
                f"the head order covers {len(self.orders.orders)} source scales; schedule {schedule.name} has "
                f"{len(schedule) - 1} that are read later"
            )
        kept, cap = sum(schedule.tokens[:protected]), self.cap(schedule)
        if cap + ROUNDING < kept:
            raise ValueError(
                f"budget is {self.budget!r}, {cap:.4g} of {schedule.prefix} tokens; it must hold the {kept} tokens of "
                f"the {protected} protected scales"
            )

    def cap(self, schedule: ScaleSchedule) -> float:
        """Tokens that may be held per head and layer, on the mean over all."""
        budget = self.budget
        return budget_mean(budget if isinstance(budget, Tokens | Share) else float(budget), schedule)

    def visible_to(self, schedule: ScaleSchedule, layer: int, head: int, step: int) -> tuple[int, ...]:
        reads = self._schedule_reads(schedule)
        return tuple(scale for scale in range(step) if reads.get((layer, head, scale), -1) >= step)

    def dropped(self, schedule: ScaleSchedule, step: int) -> int:
        """How many of the heads drop each unprotected scale after `step` (x_t)."""
        heads = len(self.orders.orders[0]) if self.orders.orders else 0
        held = schedule.offsets[step] + schedule.tokens[step]
        cap, protected = self.cap(schedule), self._protected(schedule)
        if held <= cap:
            return 0
        return min(heads, math.ceil(heads * (held - cap) / (held - sum(schedule.tokens[:protected]))))

    def _protected(self, schedule: ScaleSchedule) -> int:
        return len(schedule) - 1 - len(self.orders.orders)

    def _schedule_reads(self, schedule: ScaleSchedule) -> Reads:
        found: dict[ScaleSchedule, Reads] = self._reads  # type: ignore[attr-defined]
        if schedule not in found:
            found[schedule] = self._compute_reads(schedule)
        return found[schedule]

    def _compute_reads(self, schedule: ScaleSchedule) -> Reads:
        """What each head reads last, by going through the steps."""
        pairs = [] if not self.orders.orders else sorted((layer, head) for head, layer in self.orders.orders[0])
        num_layers = 1 + max((layer for layer, _ in pairs), default=0)
        last, protected = len(schedule) - 1, self._protected(schedule)
        held = {(*pair, scale) for pair in pairs for scale in range(last)}  # ever read, as far as decided
        reads = {(*pair, scale): last for pair in pairs for scale in range(protected)}
        for step in range(last):
            going: list[list[tuple[int, int, int]]] = [[] for _ in range(num_layers)]  # by layer
            for scale in range(protected, step + 1):
                for head, layer in self.orders.orders[scale - protected][: self.dropped(schedule, step)]:
                    if (layer, head, scale) in held:
                        going[layer].append((layer, head, scale))
            early = self._early(schedule, step, held, going)
            for entry in (entry for layer in going for entry in layer):
                held.discard(entry)
                # Dropped before its first read, it is never stored.
                read = step - 1 if entry in early else step
                if read > entry[2]:
                    reads[entry] = read
        return reads | {entry: last for entry in held if entry[2] < last}

    def _early(
        self, schedule: ScaleSchedule, step: int, held: set[tuple[int, int, int]],
        going: list[list[tuple[int, int, int]]],
    ) -> set[tuple[int, int, int]]:  # fmt: skip
        """What must go before its layer's turn at this step, so that the cap holds after every layer."""
        tokens, num_layers = schedule.tokens, len(going)
        heads = len(self.orders.orders[0]) // num_layers if self.orders.orders else 0
        cap = self.cap(schedule) * num_layers * heads
        total = sum(tokens[scale] for _, _, scale in held if scale < step)
        waiting: Iterator[tuple[int, int, int]] = (
            entry
            for layer in reversed(range(num_layers))
            for entry in sorted(going[layer], key=lambda entry: -entry[2])
            if entry[2] < step
        )
        early: set[tuple[int, int, int]] = set()
        for layer in range(num_layers):
            stored = heads - sum(scale == step for _, _, scale in going[layer])
            total += stored * tokens[step] - sum(
                tokens[scale] for _, _, scale in (e for e in going[layer] if e[2] < step and e not in early)
            )
            while total > cap + 1e-6:
                entry = next(waiting, None)
                if entry is None or entry[0] <= layer:
                    raise ValueError(
                        f"budget {self.budget!r} is too small for schedule {schedule.name}: at step {step} the cap is "
                        f"exceeded after layer {layer}"
                    )
                early.add(entry)
                total -= tokens[entry[2]]
        return early
