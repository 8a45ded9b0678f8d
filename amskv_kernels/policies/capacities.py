"""AMS-KV's settings, which its paper leaves open: condensed scales, two capacities, the layers that get the larger one.

All pairs of capacities are tried that differ in what a layer holds, each with as many demanding layers as the budget
allows. With measured losses the pair of least loss is taken of those that spend nearly all of the budget, over every
number of condensed scales. Without, no layer has much less than the mean, and the pair is taken that wastes least:
budget that is not spent, and room that is needed during a step alone, before layers have dropped what they drop.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from amskv_kernels.policies.losses import Losses
from amskv_kernels.policies.whole_scale import CONDENSED, AMSKVCapacity
from amskv_kernels.schedule import ScaleSchedule

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
History = tuple[tuple[int, ...], ...]

UNSPENT = 0.03  # of the budget, at most, where losses choose; more where every setting leaves more
# Where none are measured. Of the mean, what each layer has at least; of the budget, what may be wasted in either way
# before it is the only thing that counts to spend all.
LEAST, LEFT, PASSING = 0.85, 0.01, 0.025


class Setting(NamedTuple):
    """Capacities in tokens, scales never dropped, and the layers that have the larger capacity."""

    c_min: int
    c_max: int
    condensed: int
    demanding: tuple[int, ...]


class _Tried(NamedTuple):
    """All settings with one number of condensed scales: pairs of what a layer may hold, and how many layers follow."""

    condensed: int
    histories: dict[int, History]  # by capacity
    held: Floats  # (capacities, K) tokens
    small: Ints  # (N,) of capacities
    large: Ints  # (N,)
    demanding: Ints  # (N,) layers
    unspent: Floats  # (N,) share of the budget

    def setting(self, which: int, ranking: Sequence[int]) -> Setting:
        """One of the pairs, with the first layers of a ranking demanding."""
        sizes, demanding = list(self.histories), ranking[: self.demanding[which]]
        return Setting(sizes[self.small[which]], sizes[self.large[which]], self.condensed, tuple(sorted(demanding)))


def find_setting(
    schedule: ScaleSchedule, num_layers: int, mean: float, condensed: int | None, ranking: Sequence[int],
    losses: Losses | None,
) -> Setting:  # fmt: skip
    """The setting within `mean` tokens a layer.

    Args:
        schedule: the model's.
        num_layers: L.
        mean: tokens per layer; holds the condensed scales.
        condensed: scales never dropped; None: to be found, with losses from the first one up.
        ranking: all layers, most demanding first.
        losses: of this model, or None.
    """
    if losses is None:
        count, least = _unmeasured(schedule, mean, condensed)
        return _least_waste(schedule, num_layers, mean, _tried(schedule, num_layers, mean, count), ranking, least)
    counts = range(1, len(schedule) - 1) if condensed is None else (condensed,)
    found = [_tried(schedule, num_layers, mean, count) for count in counts if sum(schedule.tokens[:count]) <= mean]
    allowed = max(UNSPENT, min(float(tried.unspent.min()) for tried in found))
    # A step counts by the loss of one query, over its map's tokens: what goes wrong early is in all later maps.
    tables = [table / n**2 for table, n in zip(losses.of_sets("layer", 0), schedule.tokens, strict=True)]
    best = []
    for tried in found:
        loss = np.where(tried.unspent <= allowed, _losses(tried, ranking, tables), np.inf)
        best.append((float(loss.min()), tried.setting(int(loss.argmin()), ranking)))
    return min(best)[1]


def _unmeasured(schedule: ScaleSchedule, mean: float, condensed: int | None) -> tuple[int, float]:
    """How many scales are condensed, and the least that every layer holds at its widest.

    The paper's two. But where nothing has to go before the last step, all local scales are at hand until then, and as
    many are condensed as fit beside the largest, which every layer keeps: a coarse scale is attended to like a fine
    one, at a fraction of the tokens.
    """
    read = schedule.tokens[:-1]
    fitting = [count for count in range(CONDENSED, len(read)) if sum(read[:count]) + max(read) <= mean]
    if condensed is None and fitting and sum(read[:-1]) <= mean < sum(read):
        return fitting[-1], float(sum(read[: fitting[-1]]) + max(read))
    return CONDENSED if condensed is None else condensed, LEAST * mean


def _tried(schedule: ScaleSchedule, num_layers: int, mean: float, condensed: int) -> _Tried:
    """Every pair of capacities within the mean, with as many demanding layers as it allows."""
    histories = _histories(schedule, condensed, mean * num_layers)
    held = np.array([[float(sum(schedule.tokens[s] for s in seen)) for seen in each] for each in histories.values()])
    small, large = np.triu_indices(len(held))
    room, more = num_layers * (mean - held[small]), held[large] - held[small]
    with np.errstate(divide="ignore", invalid="ignore"):
        most = np.floor(np.where(more > 0, room / more, num_layers) + 1e-9).min(1).clip(max=num_layers)
    total = num_layers * held[small] + most[:, None] * more
    fits = (most >= 0) & (total <= num_layers * mean + 1e-6).all(1)
    small, large, demanding = small[fits], large[fits], most[fits].astype(np.int64)
    return _Tried(condensed, histories, held, small, large, demanding, 1 - total[fits].max(1) / (num_layers * mean))


def _least_waste(
    schedule: ScaleSchedule, num_layers: int, mean: float, tried: _Tried, ranking: Sequence[int], least: float
) -> Setting:  # fmt: skip
    """The setting that wastes least, see `LEFT` and `PASSING`, of those that give every layer `least` tokens."""
    widest = tried.held.max(1)
    ample = (widest >= min(least, widest[widest <= mean].max())) & (widest <= mean)
    wasted = []
    for i in np.flatnonzero(ample[tried.small]):
        setting = tried.setting(int(i), ranking)
        passing = _passing(schedule, tried.histories, num_layers, mean, setting)
        wasted.append((float(tried.unspent[i]), passing, setting))
    little = [each for each in wasted if each[0] <= LEFT and each[1] <= PASSING]
    if little:
        return min(little, key=lambda each: each[0] + each[1])[2]
    return min(wasted, key=lambda each: (round(each[0], 4), each[1]))[2]


def _histories(schedule: ScaleSchedule, condensed: int, most: float) -> dict[int, History]:
    """What a layer holds at each step, by the least capacity for each different course."""
    tokens = schedule.tokens[:-1]
    locked = sum(tokens[:condensed])
    ends = range(condensed, len(tokens) + 1)
    sums = {locked + sum(tokens[i:j]) for i in ends for j in ends if j >= i}
    found: dict[History, int] = {}
    for size in sorted(size for size in sums if 0 < size <= most):
        found.setdefault(AMSKVCapacity(size, size, condensed=condensed).history(schedule, size, None), size)
    return {size: history for history, size in found.items()}


def _passing(
    schedule: ScaleSchedule, histories: dict[int, History], num_layers: int, mean: float, setting: Setting
) -> float:  # fmt: skip
    """What a setting takes during its widest call beyond what it holds between steps, as a share of the budget."""
    tokens, steps = schedule.tokens, len(schedule)
    own = [histories[setting.c_max if layer in setting.demanding else setting.c_min] for layer in range(num_layers)]
    held = np.array([[sum(tokens[s] for s in seen) for seen in (*each, ())] for each in own], dtype=np.float64)
    written = [[tokens[step] * (step + 1 < steps and step in each[step + 1]) for step in range(steps)] for each in own]
    before, after = held[:, :-1], held[:, 1:]
    # Layers before the call's have dropped what they drop, the others not yet.
    live = after.cumsum(0) - after + before[::-1].cumsum(0)[::-1] + np.array(written)
    return float(live.max() - held.sum(0).max()) / (mean * num_layers)


def _losses(tried: _Tried, ranking: Sequence[int], tables: Sequence[npt.NDArray[np.floating]]) -> Floats:
    """(N,) expected loss of every pair, from `Losses.of_sets` of each step."""
    cost = np.array(
        [
            sum(tables[step][sum(1 << s for s in seen)] for step, seen in enumerate(each))
            for each in tried.histories.values()
        ]
    )  # (capacities, L)
    upto = np.pad(cost[:, list(ranking)].cumsum(1), ((0, 0), (1, 0)))  # over the most demanding layers
    small, large, count = tried.small, tried.large, tried.demanding
    return upto[large, count] + upto[small, -1] - upto[small, count]
