"""Policies that keep chosen tokens: ScaleKV, and SnapKV, PyramidKV, H2O and recency at equal budgets.

How many tokens a layer holds at each step is known before the first one; which ones is decided on the device, for every
sequence and head (`Selection`). A budget is the mean number of tokens per head and layer: an int, or a float in (0, 1],
the share of the tokens of all scales but the last, as ScaleKV counts.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from amskv_kernels.arguments import real_number, whole_number
from amskv_kernels.files import check_fits, finite_table, read_fields, write_json
from amskv_kernels.policies.base import Selection, TokenPolicy, check_layers_exist, layer_set
from amskv_kernels.schedule import ScaleSchedule

Budget = float | int
Layers = tuple[int, ...]

# What ScaleKV means by its percentages on Infinity's square 1M schedule, 6,425 tokens before the last scale.
PUBLISHED_MEANS = {0.2: 1300, 0.1: 650, 0.04: 265}
# The least refiner budget released, as a share of the mean.
FLOOR = 200 / 650
# B_r(0) and δ of the paper, which gives them for a mean of 650.
PAPER_REFINER = (600 / 650, 70 / 650)


def check_budget(budget: Budget) -> None:
    """Raise ValueError where the budget is neither a whole number ≥ 1 nor a share in (0, 1]."""
    if not isinstance(budget, float):
        whole_number("budget", budget, 1)
    elif not 0 < budget <= 1:
        raise ValueError(f"budget is {budget!r}; as a share of the tokens it must be above 0 and at most 1")


def budget_tokens(budget: Budget, schedule: ScaleSchedule) -> int:
    """The mean tokens per head and layer that a budget means on `schedule`.

    Raises:
        ValueError: the budget is neither a whole number ≥ 1 nor a share in (0, 1].
    """
    check_budget(budget)
    if isinstance(budget, float):
        published = PUBLISHED_MEANS.get(budget) if schedule == ScaleSchedule.named("infinity-1m-1.000") else None
        return max(1, round(budget * schedule.prefix)) if published is None else published
    return whole_number("budget", budget, 1)


@dataclass(frozen=True)
class Drafters:
    """ScaleKV's attention selectivity index of one model, and the layers that it makes drafters at each scale.

    Args:
        schedule: the (h, w) sizes the model was measured on.
        selectivity: (L, K) ASI; 0 for scale 0, which has no history.
        layers: (K) drafters of each scale: the layers whose attention is dispersed and needs a large cache. None where
            the history is no longer than `top`: every key of it would count as selective.
        top: how many of the strongest history keys count as selective (the paper's K′).
        images: how many images were measured.
        model: a name for people.
    """

    FORMAT = "amskv-asi-1"

    schedule: tuple[tuple[int, int], ...]
    selectivity: tuple[tuple[float, ...], ...]
    layers: tuple[Layers, ...]
    top: int
    images: int
    model: str = "unnamed"

    def save(self, path: str | Path) -> None:
        """Write as JSON."""
        write_json(path, {"format": self.FORMAT, **asdict(self)})

    @classmethod
    def load(cls, path: str | Path) -> Drafters:
        """Read what `save` wrote.

        Raises:
            ValueError: the file is missing, is not JSON, or a field is missing or out of range; names file and field.
        """
        return read_fields(path, "ASI calibration", cls.FORMAT, cls._parse)

    @classmethod
    def _parse(cls, raw: dict[str, Any]) -> Drafters:
        sizes = ScaleSchedule(raw["schedule"]).sizes
        table = finite_table("selectivity", raw["selectivity"], len(sizes))
        layers = tuple(layer_set("layers", each) for each in raw["layers"])
        if len(layers) != len(sizes):
            raise ValueError(f"layers has {len(layers)} entries; it must have {len(sizes)}, one per scale")
        for each in layers:
            check_layers_exist("layers", each, len(table))
        top, images = whole_number("top", raw["top"], 1), whole_number("images", raw["images"], 0)
        return cls(sizes, table, layers, top, images, str(raw["model"]))

    def check_fits(self, schedule: ScaleSchedule, num_layers: int) -> None:
        """Raise ValueError when the measurement was made for another depth or schedule."""
        check_fits("the ASI calibration", self.schedule, len(self.selectivity), schedule, num_layers)


@cache
def released_drafters(num_layers: int) -> tuple[Layers, ...] | None:
    """The drafters released for the Infinity model of this depth, for its last scales; None for another depth."""
    text = resources.files("amskv_kernels").joinpath("data/scalekv_budgets.json").read_text(encoding="utf-8")
    for entry in json.loads(text)["budgets"].values():
        if entry["layers"] == num_layers:
            return tuple(tuple(row["drafter_layers"]) for row in entry["rows"])
    return None


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
        drafters: drafter layers of the last scales, oldest first; the first entry also serves all earlier scales. By
            default those released for Infinity-2B and 8B where the depth is theirs (32, 40), else layer 0.
        floor: least tokens of a refiner; by default 200 where the mean is 650, and in proportion.
        refiner: B_r(0) and δ of mode "paper"; by default 600 and 70 where the mean is 650, and in proportion.

    Raises:
        ValueError: an unknown mode, or a bad number.
    """

    budget: Budget = 0.10
    mode: Literal["released", "paper"] = "released"
    drafters: tuple[Layers, ...] | None = None
    floor: int | None = None
    refiner: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        check_budget(self.budget)
        if self.mode not in ("released", "paper"):
            raise ValueError(f"mode is {self.mode!r}; it must be 'released' or 'paper'")
        if self.drafters is not None:
            if not isinstance(self.drafters, Iterable):
                raise ValueError(f"drafters is {self.drafters!r}; it must be a sequence of tuples of layers")
            sets = tuple(layer_set(f"drafters[{i}]", each) for i, each in enumerate(self.drafters))
            if not sets:
                raise ValueError("drafters is empty; give one tuple of layers at least")
            object.__setattr__(self, "drafters", sets)
        if self.floor is not None:
            whole_number("floor", self.floor, 1)

    @property
    def selection(self) -> Selection:
        if self.mode == "paper":
            return Selection("grid", pool="mean")
        return Selection("grid", score="sum_logits", raw_queries=True, pool="max")

    def check_layers(self, num_layers: int) -> None:
        for each in self.drafters or ():
            check_layers_exist("drafters", each, num_layers)

    def drafters_at(self, schedule: ScaleSchedule, num_layers: int, step: int) -> Layers:
        """The drafter layers of a step."""
        known = self.drafters or released_drafters(num_layers) or ((0,),)
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
            raise ValueError(f"recent is {self.recent!r}; it must be within 0 … 1")

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


def choose_drafters(
    selectivity: Sequence[Sequence[float]], count: int | None = None, first: int = 1
) -> tuple[Layers, ...]:  # fmt: skip
    """The drafters of each scale: the (layer, scale) pairs of lowest ASI, standardised within each scale.

    Args:
        selectivity: (L, K) ASI.
        count: N_d, how many pairs; by default a sixteenth of all, about as many as the released sets have, and no fewer
            than there are scales.
        first: the scale from which pairs take part.

    Raises:
        ValueError: a count outside 0 … L · (K − first).
    """
    layers, scales = len(selectivity), len(selectivity[0])
    pairs = layers * max(0, scales - first)
    wanted = max(scales - first, round(pairs / 16)) if count is None else whole_number("count", count, 0)
    if wanted > pairs:
        raise ValueError(f"count is {wanted}; there are {pairs} pairs of a layer and a scale from scale {first} on")
    standing = []
    for scale in range(first, scales):
        column = [row[scale] for row in selectivity]
        mean = sum(column) / layers
        spread = (sum((x - mean) ** 2 for x in column) / layers) ** 0.5
        standing += [((x - mean) / (spread + 1e-12), layer, scale) for layer, x in enumerate(column)]
    chosen = sorted(standing)[:wanted]
    return tuple(tuple(sorted(layer for _, layer, at in chosen if at == scale)) for scale in range(scales))
