"""AMS-KV's settings, which its paper leaves open: two capacities, and the layers that get the larger one.

All pairs of capacities are tried that differ in what a layer holds, each with as many demanding layers as the budget
allows. With measured losses the pair of least loss is taken of those that spend nearly all of the budget. Without, no
layer has much less than the mean, and the pair is taken that wastes least: budget that is not spent, and room that is
needed during a step alone, before layers have dropped what they drop.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from amskv_kernels.policies.losses import Losses
from amskv_kernels.policies.whole_scale import AMSKVCapacity
from amskv_kernels.schedule import ScaleSchedule

Floats = npt.NDArray[np.float64]
History = tuple[tuple[int, ...], ...]

UNSPENT = 0.03  # of the budget, at most, where losses choose; more where every setting leaves more
# Where none are measured. Of the mean, what each layer has at least; of the budget, what may be wasted in either way
# before it is the only thing that counts to spend all.
LEAST, LEFT, PASSING = 0.85, 0.01, 0.025


class Setting(NamedTuple):
    """Capacities in tokens, and the layers that have the larger one."""

    c_min: int
    c_max: int
    demanding: tuple[int, ...]


def find_setting(
    schedule: ScaleSchedule, num_layers: int, mean: float, condensed: int, ranking: Sequence[int], losses: Losses | None
) -> Setting:  # fmt: skip
    """The setting within `mean` tokens a layer.

    Args:
        schedule: the model's.
        num_layers: L.
        mean: tokens per layer; holds the condensed scales.
        condensed: scales never dropped.
        ranking: all layers, most demanding first.
        losses: of this model, or None.
    """
    histories = _histories(schedule, condensed, mean * num_layers)
    sizes = list(histories)
    held = np.array([[float(sum(schedule.tokens[s] for s in seen)) for seen in each] for each in histories.values()])
    cost = None if losses is None else _costs(schedule, list(histories.values()), losses)  # (capacities, L)
    widest = held.max(1)
    ample = np.flatnonzero((widest >= min(LEAST * mean, widest[widest <= mean].max())) & (widest <= mean))
    found: list[tuple[float, float, Setting]] = []  # unspent share, loss
    for i in ample if cost is None else range(len(sizes)):
        for j in range(i, len(sizes)):
            count = _most_demanding(held[i], held[j], num_layers, mean)
            if count is None:
                continue
            demanding = list(ranking[:count])
            total = float(((num_layers - count) * held[i] + count * held[j]).max()) / num_layers
            loss = 0.0 if cost is None else float(cost[i].sum() - (cost[i] - cost[j])[demanding].sum())
            found.append((1 - total / mean, loss, Setting(sizes[i], sizes[j], tuple(sorted(demanding)))))
    if cost is None:
        return _least_waste(found, [_passing(schedule, histories, num_layers, mean, each[2]) for each in found])
    allowed = max(UNSPENT, min(unspent for unspent, _, _ in found))
    return min((each for each in found if each[0] <= allowed), key=lambda each: each[1])[2]


def _least_waste(found: list[tuple[float, float, Setting]], passing: list[float]) -> Setting:
    """Of settings with what they leave unspent, the one that wastes least, see `LEFT` and `PASSING`."""
    wasted = [(unspent, passed, setting) for (unspent, _, setting), passed in zip(found, passing, strict=True)]
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


def _most_demanding(small: Floats, large: Floats, num_layers: int, mean: float) -> int | None:
    """How many layers may follow `large` where all others follow `small`; None where not even that fits."""
    room, more = num_layers * (mean - small), large - small
    with np.errstate(divide="ignore", invalid="ignore"):
        most = np.floor(np.where(more > 0, room / more, num_layers) + 1e-9).min()
    count = int(min(most, num_layers))
    return count if count >= 0 and (room - count * more >= -1e-6).all() else None


def _costs(schedule: ScaleSchedule, histories: list[History], losses: Losses) -> Floats:
    """(capacities, L) loss of each layer under each course.

    A step counts by the loss of one query, over its map's tokens: what goes wrong in an early map is in all later ones.
    """
    tables = [table / n**2 for table, n in zip(losses.of_sets("layer", 0), schedule.tokens, strict=True)]
    return np.array(
        [sum(tables[step][sum(1 << s for s in seen)] for step, seen in enumerate(each)) for each in histories]
    )
