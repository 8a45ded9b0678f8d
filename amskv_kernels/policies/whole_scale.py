"""Policies that keep or drop whole scales, the same for every head: Full, SlidingWindow, Sink, AMS-KV."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from amskv_kernels.arguments import instance_of, real_number, whole_number
from amskv_kernels.policies.base import Policy, check_layers_exist, layer_set
from amskv_kernels.schedule import ScaleSchedule

Unit = Literal["tokens", "scales"]


@dataclass(frozen=True)
class Full(Policy):
    """Every earlier scale: lossless. The last scale, which nothing reads, is still never stored."""

    def visible(self, schedule: ScaleSchedule, layer: int, step: int) -> tuple[int, ...]:
        return tuple(range(step))


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
                f"demanding_local is {self.demanding_local}; it must be at least local, which is {self.local}"
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
        table = None if similarity is None else tuple(tuple(float(x) for x in row) for row in similarity)
        demanding = layer_set("demanding_layers", demanding_layers)
        return AMSKVCapacity(c_min, c_max, unit, condensed, demanding, table, theta)

    @staticmethod
    def for_saving(
        schedule: ScaleSchedule,
        num_layers: int,
        saved: float,
        ranking: Sequence[int] | None = None,
        condensed: int = 2,
    ) -> AMSKVCapacity:
        """The capacity setting that saves at least the share `saved` of all tokens, AMS-KV's own convention.

        The paper publishes the percentages (71.29, 75, 78.72, 84.83) but not the settings; these are ours.
        Efficient layers get the largest of "condensed + one scale" and "condensed + the last r prefix scales"
        that fits the mean. Demanding layers get a larger window of the last 2, 3 or 4 prefix scales, whichever
        lets most of the mean be spent, and as many layers are demanding as the mean allows: the first of
        `ranking` (most demanding first), which without a calibration is layer order, since the paper finds
        early layers demanding. Never storing the last scale saves 38 … 46 % by itself: a smaller `saved` drops
        nothing.

        Args:
            schedule: the model's schedule.
            num_layers: L.
            saved: share of all tokens saved, in (0, 1).
            ranking: all layers, most demanding first.
            condensed: scales never dropped.

        Raises:
            TypeError: `schedule` is no ScaleSchedule, or `saved` no number.
            ValueError: no layer, `saved` is more than the condensed scales leave, or `ranking` is not a
                permutation of the layers.
        """
        instance_of("schedule", schedule, ScaleSchedule)
        num_layers, saved = whole_number("num_layers", num_layers, 1), real_number("saved", saved)
        order = list(range(num_layers)) if ranking is None else list(ranking)
        if sorted(order) != list(range(num_layers)):
            raise ValueError(f"ranking is {order!r}; it must name each of the layers 0 … {num_layers - 1} once")
        tokens = schedule.tokens[:-1]
        locked = sum(tokens[: whole_number("condensed", condensed, 0)])
        windows = [locked + sum(tokens[-r:]) for r in range(1, len(tokens) - condensed + 1)]
        most = 1 - locked / schedule.total
        if not 0 < saved <= most or not windows:
            raise ValueError(
                f"saved is {saved:.4f}; with {condensed} condensed scales, schedule {schedule.name} can save "
                f"more than 0 and at most {most:.4f} of all tokens"
            )
        # 5e-5: a published percentage is rounded to 0.01 %.
        mean = (1 - saved + 5e-5) * schedule.total
        singles = [locked, *(locked + n for n in tokens[condensed:])]
        efficient = max(size for size in (*singles, *windows) if size <= mean)
        best = (efficient, 0)
        for demanding in [size for size in windows[1:] if size > efficient][:3]:
            count = int((mean - efficient) * num_layers / (demanding - efficient))
            best = max(best, (demanding, count), key=lambda pair: (pair[0] - efficient) * pair[1])
        return AMSKV.with_capacity(efficient, best[0], condensed=condensed, demanding_layers=order[: best[1]])


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

    Raises:
        ValueError: capacities out of order, an unknown unit, or only one of similarity and theta.
    """

    c_min: int
    c_max: int
    unit: Unit = "tokens"
    condensed: int = 2
    demanding_layers: tuple[int, ...] = ()
    similarity: tuple[tuple[float, ...], ...] | None = None
    theta: float | None = None

    def __post_init__(self) -> None:
        whole_number("condensed", self.condensed, 0)
        whole_number("c_min", self.c_min, 1)
        if whole_number("c_max", self.c_max, 1) < self.c_min:
            raise ValueError(f"c_max is {self.c_max}; it must be at least c_min, which is {self.c_min}")
        if self.unit not in ("tokens", "scales"):
            raise ValueError(f"unit is {self.unit!r}; it must be 'tokens' or 'scales'")
        if (self.similarity is None) != (self.theta is None):
            raise ValueError("similarity and theta decide together: give both or neither")
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
