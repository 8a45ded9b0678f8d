"""Policies that keep or drop whole scales, the same for every head: Full, SlidingWindow, Sink, AMS-KV."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal

from amskv_kernels.arguments import instance_of, real_number, shown, threshold, whole_number
from amskv_kernels.files import finite_table
from amskv_kernels.policies.base import (
    MOST_LAYERS,
    MadeFor,
    Policy,
    check_layers_exist,
    layer_numbers,
    layer_set,
)
from amskv_kernels.policies.budgets import ROUNDING, Budget, budget_mean
from amskv_kernels.policies.losses import Losses
from amskv_kernels.schedule import ScaleSchedule

Unit = Literal["tokens", "scales"]

CONDENSED = 2  # scales, as AMS-KV's paper has it


@dataclass(frozen=True)
class Full(Policy):
    """Every earlier scale: lossless. The last scale, which nothing reads, is still never stored."""

    def visible(self, schedule: ScaleSchedule, layer: int, step: int) -> tuple[int, ...]:
        return tuple(range(step))


@dataclass(frozen=True)
class Visible(Policy):
    """What a table says, of a model that has a rule of its own for what a scale may see: the same for every layer.

    Args:
        table: for each step the earlier scales that it reads, ascending.

    Raises:
        ValueError: the table is no sequence of sequences of scales.
    """

    table: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        try:
            rows = [layer_numbers(f"table[{step}]", row) for step, row in enumerate(self.table)]
        except TypeError as error:
            raise ValueError(f"table is {shown(self.table)}; it must be the scales that each step reads") from error
        object.__setattr__(self, "table", tuple(rows))

    def visible(self, schedule: ScaleSchedule, layer: int, step: int) -> tuple[int, ...]:
        return self.table[step]

    def check_fits(self, schedule: ScaleSchedule, num_layers: int) -> None:
        if len(self.table) != len(schedule):
            raise ValueError(f"table has {len(self.table)} steps; schedule {schedule.name} has {len(schedule)}")


@dataclass(frozen=True)
class SlidingWindow(Policy):
    """The last `local` scales before the current one."""

    local: int = 1

    def __post_init__(self) -> None:
        whole_number("local", self.local, 1)

    def visible(self, schedule: ScaleSchedule, layer: int, step: int) -> tuple[int, ...]:
        return tuple(range(max(0, step - self.local), step))


@dataclass(frozen=True)
class Sink(Policy):
    """The first `condensed` scales and the last `local` ones (StreamingLLM's attention sinks, by scale)."""

    condensed: int = 1
    local: int = 1

    def __post_init__(self) -> None:
        whole_number("condensed", self.condensed, 1)
        whole_number("local", self.local, 1)

    def visible(self, schedule: ScaleSchedule, layer: int, step: int) -> tuple[int, ...]:
        return _condensed_and_last(range(step), self.condensed, self.local)


@dataclass(frozen=True)
class AMSKV(Policy):
    """AMS-KV (arXiv 2511.16047), static form: condensed scales plus local ones, more in demanding layers.

    At each step a layer reads the first `condensed` scales and the last `local` (in `demanding_layers`:
    `demanding_local`) of those small enough to be cached. A scale of more than `max_scale_tokens` tokens is
    never cached, the "too large: skip" rule of Algorithm 1.

    Raises:
        ValueError: a count below its least value, demanding_local < local, a repeated or negative layer.
    """

    condensed: int = 2
    local: int = 1
    demanding_local: int = 3
    demanding_layers: tuple[int, ...] = ()
    max_scale_tokens: int | None = None

    def __post_init__(self) -> None:
        whole_number("condensed", self.condensed, 0)
        whole_number("local", self.local, 0)
        if whole_number("demanding_local", self.demanding_local, 0) < self.local:
            raise ValueError(
                f"demanding_local is {shown(self.demanding_local)}; it must be at least local, which is "
                f"{shown(self.local)}"
            )
        object.__setattr__(self, "demanding_layers", layer_set("demanding_layers", self.demanding_layers))
        if self.max_scale_tokens is not None:
            whole_number("max_scale_tokens", self.max_scale_tokens, 1)

    def visible(self, schedule: ScaleSchedule, layer: int, step: int) -> tuple[int, ...]:
        limit = schedule.total if self.max_scale_tokens is None else self.max_scale_tokens
        cached = [scale for scale in range(step) if schedule.tokens[scale] <= limit]
        local = self.demanding_local if layer in self.demanding_layers else self.local
        return _condensed_and_last(cached, self.condensed, local)

    def check_layers(self, num_layers: int) -> None:
        check_layers_exist("demanding_layers", self.demanding_layers, num_layers)

    @staticmethod
    def with_capacity(
        c_min: int,
        c_max: int,
        unit: Unit = "tokens",
        condensed: int = 2,
        demanding_layers: Iterable[int] = (),
        similarity: Sequence[Sequence[float]] | None = None,
        theta: float | None = None,
    ) -> AMSKVCapacity:
        """The capacity form, Algorithm 1 of the paper: see `AMSKVCapacity`."""
        return AMSKVCapacity(c_min, c_max, unit, condensed, demanding_layers, similarity, theta)  # type: ignore[arg-type]

    @staticmethod
    def for_saving(
        schedule: ScaleSchedule,
        num_layers: int,
        saved: float,
        ranking: Sequence[int] | None = None,
        condensed: int | None = None,
        losses: Losses | None = None,
    ) -> AMSKVCapacity:
        """The capacity setting that saves at least the share `saved` of all tokens, AMS-KV's own convention.

        The paper publishes the percentages (71.29, 75, 78.72, 84.83) but not the settings; these are ours, see
        `for_budget`. A published percentage is rounded to 0.01 %, so the mean may be 0.005 % of all tokens more.

        Raises:
            TypeError: `schedule` is no ScaleSchedule, or `saved` no number.
            ValueError: what `for_budget` raises.
        """
        instance_of("schedule", schedule, ScaleSchedule)
        saved = real_number("saved", saved)
        least = _least_condensed(condensed, losses)
        most = 1 - _least_tokens(schedule, least) / schedule.total
        if not 0 < saved <= most or least >= len(schedule) - 1:
            raise ValueError(
                f"saved is {saved:.4f}; with {shown(least)} condensed scales, schedule {schedule.name} can save "
                f"more than 0 and at most {most:.4f} of all tokens"
            )
        return _with_mean(schedule, num_layers, (1 - saved + 5e-5) * schedule.total, ranking, condensed, losses)

    @staticmethod
    def for_budget(
        schedule: ScaleSchedule,
        num_layers: int,
        budget: Budget,
        ranking: Sequence[int] | None = None,
        condensed: int | None = None,
        losses: Losses | None = None,
    ) -> AMSKVCapacity:
        """The capacity setting that holds most of `budget` tokens per layer, and no more, on the mean over layers.

        Efficient layers get the most that all layers can have, demanding ones a larger capacity, the one that lets most
        of the mean be spent, and as many layers are demanding as the mean allows: the first of `ranking`. Without a
        ranking that is layer order, since the paper finds early layers demanding, the first layer last: on the digits
        model it is among the least. With `losses` the capacities, and how many scales are condensed, are those of the
        least expected loss of all that spend nearly the whole mean, and layers are ranked by the similarity measured
        with them. Never storing the last scale saves 38 … 46 % by itself: a budget of more than the rest drops
        nothing. The policy serves this schedule and depth alone.

        Args:
            schedule: the model's schedule.
            num_layers: L.
            budget: see `amskv_kernels.policies.budgets`.
            ranking: all layers, most demanding first.
            condensed: scales never dropped. None: with losses, whatever loses least, from the first scale up; without,
                two as in the paper, or, where nothing has to go before the last step, as many as fit beside the
                largest scale.
            losses: of this model, as `amskv calibrate --method loss` measures them.

        Raises:
            TypeError: `schedule` is no ScaleSchedule.
            ValueError: no layer, a budget that cannot hold the condensed scales, `ranking` is not a permutation of
                the layers or stands beside losses, or losses of another model.
        """
        mean = budget_mean(budget, schedule)
        least = _least_condensed(condensed, losses)
        needed = _least_tokens(schedule, least)
        if mean + ROUNDING < needed or least >= len(schedule) - 1:
            held = f"{needed} of {shown(least)} condensed scales" if least else f"{needed} of the smallest scale"
            raise ValueError(
                f"budget is {budget!r}, {mean:.4g} tokens per layer; it must hold the {held} of schedule "
                f"{schedule.name}, and another scale must be read later"
            )
        return _with_mean(schedule, num_layers, mean + ROUNDING, ranking, condensed, losses)


@dataclass(frozen=True)
class AMSKVCapacity(Policy):
    """AMS-KV, Algorithm 1: a capacity per layer, the oldest scale that is not condensed goes first.

    Capacities count the condensed scales and are given in tokens or in scales. A layer's capacity is `c_min`
    until it overflows at a scale i with `similarity[layer][i] < theta`, from then on `c_max`; layers in
    `demanding_layers` start with `c_max` (a calibration's frozen decision). A scale of more than `c_max`
    tokens is never cached. Where the paper leaves the case open, a scale that would not fit even alone
    beside the condensed ones is not cached and evicts nothing.

    Args:
        similarity: (L, K) table, entry (l, i) the similarity of layer l's keys at scale i to scale i−1's.
        made_for: the model that the setting was found for; planning it for another one is refused.

    Raises:
        ValueError: capacities out of order, an unknown unit, only one of similarity and theta, or one that is not
            finite.
    """

    c_min: int
    c_max: int
    unit: Unit = "tokens"
    condensed: int = 2
    demanding_layers: tuple[int, ...] = ()
    similarity: tuple[tuple[float, ...], ...] | None = None
    theta: float | None = None
    made_for: MadeFor | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        whole_number("condensed", self.condensed, 0)
        whole_number("c_min", self.c_min, 1)
        if whole_number("c_max", self.c_max, 1) < self.c_min:
            raise ValueError(f"c_max is {shown(self.c_max)}; it must be at least c_min, which is {shown(self.c_min)}")
        if not isinstance(self.unit, str) or self.unit not in ("tokens", "scales"):
            raise ValueError(f"unit is {shown(self.unit)}; it must be 'tokens' or 'scales'")
        if (self.similarity is None) != (self.theta is None):
            raise ValueError("similarity and theta decide together: give both or neither")
        if self.similarity is not None and self.theta is not None:
            threshold("theta", self.theta)
            object.__setattr__(self, "similarity", finite_table("similarity", self.similarity))
        object.__setattr__(self, "demanding_layers", layer_set("demanding_layers", self.demanding_layers))

    def visible(self, schedule: ScaleSchedule, layer: int, step: int) -> tuple[int, ...]:
        if layer in self.demanding_layers:
            return _history(self, schedule, self.c_max, None)[step]
        return _history(self, schedule, self.c_min, None if self.similarity is None else layer)[step]

    def history(self, schedule: ScaleSchedule, capacity: int, layer: int | None) -> tuple[tuple[int, ...], ...]:
        """What a layer that starts with `capacity` reads at each step; `layer` None: no similarity decides."""
        held: list[tuple[int, ...]] = [()]
        for scale in range(len(schedule) - 1):
            if layer is not None and capacity == self.c_min:
                capacity = self.c_max if self._turns_demanding(schedule, layer, held[-1], scale) else capacity
            held.append(self.keep(schedule, held[-1], scale, capacity))
        return tuple(held)

    def _turns_demanding(self, schedule: ScaleSchedule, layer: int, held: tuple[int, ...], scale: int) -> bool:
        if self.similarity is None or self.theta is None or not self.overflows(schedule, held, scale, self.c_min):
            return False
        if layer >= len(self.similarity) or scale >= len(self.similarity[layer]):
            raise ValueError(f"similarity has no entry for layer {layer}, scale {scale}; it must cover (L, K)")
        return self.similarity[layer][scale] < self.theta

    def size(self, schedule: ScaleSchedule, scales: Iterable[int]) -> int:
        """Size of a set of scales in this policy's unit."""
        return sum(1 if self.unit == "scales" else schedule.tokens[scale] for scale in scales)

    def overflows(self, schedule: ScaleSchedule, held: tuple[int, ...], scale: int, capacity: int) -> bool:
        """Whether caching `scale`, were it not too large for any layer, would exceed `capacity`."""
        if self.size(schedule, (scale,)) > self.c_max:
            return False
        return self.size(schedule, (*held, scale)) > capacity

    def keep(self, schedule: ScaleSchedule, held: tuple[int, ...], scale: int, capacity: int) -> tuple[int, ...]:
        """What a layer of this capacity holds after `scale`, given what it `held` before."""
        locked = tuple(s for s in held if s < self.condensed)
        if self.size(schedule, (*locked, scale)) > capacity:
            if scale < self.condensed:
                raise ValueError(
                    f"a capacity of {capacity} {self.unit} cannot hold the {self.condensed} condensed scales "
                    f"of schedule {schedule.name}"
                )
            return held
        kept = list(held)
        while self.size(schedule, (*kept, scale)) > capacity and len(kept) > len(locked):
            kept.remove(next(s for s in kept if s >= self.condensed))
        return (*kept, scale)

    def check_layers(self, num_layers: int) -> None:
        check_layers_exist("demanding_layers", self.demanding_layers, num_layers)
        if self.similarity is not None and len(self.similarity) != num_layers:
            raise ValueError(f"similarity has {len(self.similarity)} layers; this model has {num_layers}")
        if self.made_for is not None:
            self.made_for.check_layers(num_layers)

    def check_fits(self, schedule: ScaleSchedule, num_layers: int) -> None:
        self.check_layers(num_layers)
        if self.made_for is not None:
            self.made_for.check(schedule, num_layers)
        if self.similarity is not None and len(self.similarity[0]) != len(schedule):
            raise ValueError(f"similarity has {len(self.similarity[0])} scales; this schedule has {len(schedule)}")


def _with_mean(
    schedule: ScaleSchedule, num_layers: int, mean: float, ranking: Sequence[int] | None,
    condensed: int | None, losses: Losses | None,
) -> AMSKVCapacity:  # fmt: skip
    """The setting of `AMSKV.for_budget` for a mean that holds the condensed scales and is a float."""
    num_layers = whole_number("num_layers", num_layers, 1, MOST_LAYERS)
    order = layer_numbers("ranking", (*range(1, num_layers), 0) if ranking is None else ranking)
    if sorted(order) != list(range(num_layers)):
        raise ValueError(f"ranking is {shown(order)}; it must name each of the layers 0 … {num_layers - 1} once")
    if losses is not None:
        instance_of("losses", losses, Losses)
        losses.check_fits(schedule, num_layers)
        if ranking is not None:
            raise ValueError("ranking and losses both say which layers are demanding; give one of them")
        order = losses.ranking
    from amskv_kernels.policies.capacities import find_setting  # it asks this module what a capacity holds

    setting = find_setting(schedule, num_layers, min(mean, schedule.prefix), condensed, order, losses)
    made_for = MadeFor(schedule, num_layers)
    return AMSKVCapacity(setting.c_min, setting.c_max, "tokens", *setting[2:], made_for=made_for)


def _least_condensed(condensed: int | None, losses: Losses | None) -> int:
    """How many scales are never dropped, at least, see `AMSKV.for_budget`."""
    if condensed is None:
        return CONDENSED if losses is None else 1
    return whole_number("condensed", condensed, 0)


def _least_tokens(schedule: ScaleSchedule, condensed: int) -> int:
    """What a layer must hold at least: its condensed scales, or without any the smallest that is read later."""
    return sum(schedule.tokens[:condensed]) or min(schedule.tokens[:-1], default=0)


@lru_cache(maxsize=256)
def _history(
    policy: AMSKVCapacity, schedule: ScaleSchedule, capacity: int, layer: int | None
) -> tuple[tuple[int, ...], ...]:  # fmt: skip
    """`AMSKVCapacity.history`, once for all the steps and layers that share it."""
    return policy.history(schedule, capacity, layer)


def _condensed_and_last(cached: Sequence[int], condensed: int, local: int) -> tuple[int, ...]:
    first = [scale for scale in cached if scale < condensed]
    rest = cached[len(first) :]
    return (*first, *rest[len(rest) - min(local, len(rest)) :])
