"""Policies that keep chosen tokens: ScaleKV, and SnapKV, PyramidKV, H2O and recency at equal budgets.

How many tokens a layer holds at each step is known before the first one; which ones is decided on the device, for every
sequence and head (`Selection`). Every policy takes a budget, see `amskv_kernels.policies.budgets`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

from amskv_kernels.arguments import real_number, shown, whole_number
from amskv_kernels.policies.base import (
    Layers,
    MadeFor,
    Selection,
    TokenPolicy,
    check_layers_exist,
    layer_set,
    set_fields,
)
from amskv_kernels.policies.budgets import Budget, budget_tokens, check_budget
from amskv_kernels.policies.drafters import Drafters, released_drafters
from amskv_kernels.schedule import ScaleSchedule

# The least refiner budget released, as a share of the mean.
FLOOR = 200 / 650
# B_r(0) and δ of the paper, which gives them for a mean of 650.
PAPER_REFINER = (600 / 650, 70 / 650)


def scalekv_budgets(mean: int, num_layers: int, drafters: int, limit: int, floor: int) -> tuple[int, int]:
    """Tokens of a drafter and of a refiner, mean · L over all layers: the rule behind the released numbers.

    A drafter gets the most tokens, up to `limit`, for which the rest divides evenly among the refiners and leaves each
    at least `floor`.

    Args:
        mean: tokens per layer.
        num_layers: L.
        drafters: how many layers are drafters.
        limit: the tokens that every drafter has, at least `mean`. With the same drafters at each scale these are the
            drafters' tokens at the scale before and that scale's own.
        floor: the least a refiner gets, at most `mean`.
    """
    refiners = num_layers - drafters
    if not drafters or not refiners:
        return mean, mean
    most = min(limit, (mean * num_layers - floor * refiners) // drafters)
    large = next(size for size in range(most, 0, -1) if (mean * num_layers - drafters * size) % refiners == 0)
    return large, (mean * num_layers - drafters * large) // refiners


@dataclass(frozen=True)
class ScaleKV(TokenPolicy):
    """ScaleKV (arXiv 2505.19602): drafter layers hold many tokens, refiners few; chosen by a grid of observers.

    Two modes, because what was released, and made the published images, differs from the paper. "released": summed
    logits of the raw query projection, max-pooled; a refiner's budget follows from the drafters'. "paper": softmax
    attention of the true queries, mean-pooled; a refiner's budget falls by δ with each scale.

    Args:
        budget: see `budget_tokens`; 0.10 on Infinity-1M is the published 650 tokens.
        mode: "released" or "paper".
        drafters: what was measured (`Drafters`), for the model measured alone; or drafter layers of the last scales,
            oldest first, of which the first entry also serves all earlier scales. By default those released for
            Infinity-2B and 8B where the depth is theirs (32, 40), else layer 0.
        floor: least tokens of a refiner; by default 200 where the mean is 650, and in proportion.
        refiner: B_r(0) and δ of mode "paper"; by default 600 and 70 where the mean is 650, and in proportion.

    Raises:
        ValueError: an unknown mode, or a bad number; when it is planned, a B_r(0) above the mean, or another model than
            the one whose drafters were measured.
    """

    budget: Budget = 0.10
    mode: Literal["released", "paper"] = "released"
    drafters: tuple[Layers, ...] | Drafters | None = None
    floor: int | None = None
    refiner: tuple[int, int] | None = None
    made_for: MadeFor | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        check_budget(self.budget)
        if not isinstance(self.mode, str) or self.mode not in ("released", "paper"):
            raise ValueError(f"mode is {shown(self.mode)}; it must be 'released' or 'paper'")
        if isinstance(self.drafters, Drafters):
            measured = MadeFor(ScaleSchedule(self.drafters.schedule), len(self.drafters.selectivity))
            set_fields(self, drafters=self.drafters.layers, made_for=measured)
        elif self.drafters is not None:
            if not isinstance(self.drafters, Iterable):
                raise ValueError(f"drafters is {shown(self.drafters)}; it must be a sequence of tuples of layers")
            sets = tuple(layer_set(f"drafters[{i}]", each) for i, each in enumerate(self.drafters))
            if not sets:
                raise ValueError("drafters is empty; give one tuple of layers at least")
            set_fields(self, drafters=sets)
        if self.floor is not None:
            whole_number("floor", self.floor, 1)
        if self.refiner is not None:
            pair = tuple(self.refiner) if isinstance(self.refiner, Iterable) else ()
            if len(pair) != 2:
                raise ValueError(f"refiner is {shown(self.refiner)}; it must be two numbers, B_r(0) and δ")
            start, fall = whole_number("refiner[0]", pair[0], 1), whole_number("refiner[1]", pair[1], 0)
            set_fields(self, refiner=(start, fall))

    @property
    def selection(self) -> Selection:
        if self.mode == "paper":
            return Selection("grid", pool="mean")
        return Selection("grid", score="sum_logits", raw_queries=True, pool="max")

    def check_layers(self, num_layers: int) -> None:
        if self.made_for is not None:
            self.made_for.check_layers(num_layers)
        for each in self._drafters:
            check_layers_exist("drafters", each, num_layers)

    def check_fits(self, schedule: ScaleSchedule, num_layers: int) -> None:
        self.check_layers(num_layers)
        if self.made_for is not None:
            self.made_for.check(schedule, num_layers)

    @property
    def _drafters(self) -> tuple[Layers, ...]:
        """Those given, if any: from a measurement its layers."""
        return () if self.drafters is None or isinstance(self.drafters, Drafters) else self.drafters

    def drafters_at(self, schedule: ScaleSchedule, num_layers: int, step: int) -> Layers:
        """The drafter layers of a step."""
        known = self._drafters or released_drafters(num_layers) or ((0,),)
        return known[max(0, step - len(schedule) + len(known))]

    def held(self, schedule: ScaleSchedule, num_layers: int) -> tuple[tuple[int, ...], ...]:
        mean = budget_tokens(self.budget, schedule)
        rows, compressed = [(0,) * num_layers], 0
        for step in range(1, len(schedule)):
            before = schedule.tokens[step - 1]
            available = tuple(tokens + before for tokens in rows[-1])
            if schedule.offsets[step] > mean:
                drafters = self.drafters_at(schedule, num_layers, step)
                limit = max(mean, min((available[layer] for layer in drafters), default=mean))
                large, small = self._budgets(mean, num_layers, len(drafters), limit, compressed)
                compressed += 1
                available = tuple(
                    min(tokens, large if layer in drafters else small) for layer, tokens in enumerate(available)
                )
            rows.append(available)
        return tuple(rows)

    def _budgets(self, mean: int, num_layers: int, drafters: int, limit: int, compressed: int) -> tuple[int, int]:
        """Tokens of a drafter and of a refiner at the compressed-th step that drops tokens."""
        window = self.selection.window
        if mean < window:
            raise ValueError(f"budget is {mean} tokens per head; it must hold the observation window of {window}")
        if self.mode == "released":
            floor = max(window, round(FLOOR * mean)) if self.floor is None else max(window, min(self.floor, mean))
            return scalekv_budgets(mean, num_layers, drafters, limit, floor)
        start, fall = self.refiner or (round(share * mean) for share in PAPER_REFINER)
        if start > mean:
            raise ValueError(f"refiner starts at {shown(start)} tokens; it must be at most the mean, which is {mean}")
        small = max(window, start - fall * compressed)
        if not 0 < drafters < num_layers:
            return mean, mean
        return min(limit, (mean * num_layers - small * (num_layers - drafters)) // drafters), small


@dataclass(frozen=True)
class SnapKV(TokenPolicy):
    """SnapKV (arXiv 2404.14469): the last 16 queries vote, mean-pooled; the same budget in every layer."""

    budget: Budget = 0.10
    window: int = 16

    def __post_init__(self) -> None:
        check_budget(self.budget)
        whole_number("window", self.window, 1)

    @property
    def selection(self) -> Selection:
        return Selection("last", self.window, pool="mean")

    def held(self, schedule: ScaleSchedule, num_layers: int) -> tuple[tuple[int, ...], ...]:
        return uniform(schedule, num_layers, self.budget, self.window)


@dataclass(frozen=True)
class PyramidKV(TokenPolicy):
    """PyramidKV (arXiv 2406.02069): SnapKV with budgets that fall linearly from the first layer to the last.

    The mean is the budget; the last layer gets 1/`beta` of it above the window, more where the first layer does not
    have the tokens that it would get.
    """

    budget: Budget = 0.10
    window: int = 16
    beta: int = 20

    def __post_init__(self) -> None:
        check_budget(self.budget)
        whole_number("window", self.window, 1)
        whole_number("beta", self.beta, 1)

    @property
    def selection(self) -> Selection:
        return Selection("last", self.window, pool="mean")

    def held(self, schedule: ScaleSchedule, num_layers: int) -> tuple[tuple[int, ...], ...]:
        mean = _mean(self.budget, schedule, self.window)
        rows = [(0,) * num_layers]
        for step in range(1, len(schedule)):
            available = tuple(tokens + schedule.tokens[step - 1] for tokens in rows[-1])
            if schedule.offsets[step] > mean:
                share = mean - self.window
                most = min(2 * share - share // self.beta, available[0] - self.window)
                drop = 2 * (most - share)  # from the first layer to the last
                caps = (
                    self.window + most - -(-layer * drop // max(1, num_layers - 1)) for layer in range(num_layers)
                )  # fmt: skip
                available = tuple(min(pair) for pair in zip(available, caps, strict=True))
            rows.append(available)
        return tuple(rows)


@dataclass(frozen=True)
class H2O(TokenPolicy):
    """H2O (arXiv 2306.14048): the tokens of most attention added up over all queries so far, and the most recent.

    Args:
        budget: see `budget_tokens`.
        recent: share of the budget for the most recent tokens.
    """

    budget: Budget = 0.10
    recent: float = 0.5

    def __post_init__(self) -> None:
        check_budget(self.budget)
        if not 0 <= real_number("recent", self.recent) <= 1:
            raise ValueError(f"recent is {shown(self.recent)}; it must be within 0 … 1")

    @property
    def selection(self) -> Selection:
        return Selection("all", accumulate=True, recent=self.recent)

    def held(self, schedule: ScaleSchedule, num_layers: int) -> tuple[tuple[int, ...], ...]:
        return uniform(schedule, num_layers, self.budget, 1)


@dataclass(frozen=True)
class Recent(TokenPolicy):
    """A sliding window of tokens, and with `first` attention sinks too (StreamingLLM, arXiv 2309.17453).

    Unlike the whole scales of `SlidingWindow` and `Sink` it meets any budget exactly.
    """

    budget: Budget = 0.10
    first: int = 0

    def __post_init__(self) -> None:
        check_budget(self.budget)
        whole_number("first", self.first, 0)

    @property
    def selection(self) -> Selection:
        return Selection("none", first=self.first)

    def held(self, schedule: ScaleSchedule, num_layers: int) -> tuple[tuple[int, ...], ...]:
        return uniform(schedule, num_layers, self.budget, self.first + 1)


def uniform(schedule: ScaleSchedule, num_layers: int, budget: Budget, least: int) -> tuple[tuple[int, ...], ...]:
    """(K, L) tokens held under one cap for all layers and steps.

    Raises:
        ValueError: the budget is below `least`, the tokens that are always kept.
    """
    mean = _mean(budget, schedule, least)
    return tuple((min(offset, mean),) * num_layers for offset in schedule.offsets)


def _mean(budget: Budget, schedule: ScaleSchedule, least: int) -> int:
    mean = budget_tokens(budget, schedule)
    if mean < least:
        raise ValueError(f"budget is {mean} tokens per head; it must hold the {least} that are always kept")
    return mean
