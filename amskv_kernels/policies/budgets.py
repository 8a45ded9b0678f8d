"""Budgets: how many tokens a head may hold from step to step, on the mean over all layers and heads.

`Tokens` and `Share` mean the same for every policy. The papers' own numbers do not, and are taken as they mean them: an
int is tokens, a float in (0, 1] the share of the tokens of all scales but the last, as ScaleKV and HeatKV count.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from amskv_kernels.arguments import instance_of, real_number, shown, whole_number
from amskv_kernels.schedule import MOST_TOKENS, ScaleSchedule

# What ScaleKV means by its percentages on Infinity's square 1M schedule, 6,425 tokens before the last scale.
PUBLISHED_MEANS = {0.2: 1300, 0.1: 650, 0.04: 265}
ROUNDING = 1e-9  # of a token: 1 − 0.9 is a little below 0.1, and a tenth of 10 tokens is one


@dataclass(frozen=True)
class Tokens:
    """`count` tokens per head and layer.

    Raises:
        ValueError: no whole number ≥ 1.
    """

    count: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "count", whole_number("count", self.count, 1, MOST_TOKENS))


@dataclass(frozen=True)
class Share:
    """The share `kept` of all tokens of the schedule, which is what stock code holds; the rest is saved.

    Raises:
        TypeError: no number.
        ValueError: it is not above 0 and at most 1.
    """

    kept: float

    def __post_init__(self) -> None:
        kept = real_number("kept", self.kept)
        if not 0 < kept <= 1:
            raise ValueError(f"kept is {shown(self.kept)}; it must be above 0 and at most 1, a share of all tokens")
        object.__setattr__(self, "kept", kept)

    @classmethod
    def saving(cls, saved: float) -> Share:
        """The budget that saves the share `saved` of all tokens.

        Raises:
            TypeError: no number.
            ValueError: it is not at least 0 and below 1.
        """
        if not 0 <= real_number("saved", saved) < 1:
            raise ValueError(f"saved is {shown(saved)}; it must be at least 0 and below 1, a share of all tokens")
        return cls(1 - saved)

    @property
    def saved(self) -> float:
        """The share of all tokens that is not kept."""
        return 1 - self.kept


Budget = Tokens | Share | float | int


def check_budget(budget: Budget) -> None:
    """Raise ValueError where the budget is no `Tokens`, no `Share`, no whole number ≥ 1 and no share in (0, 1]."""
    if isinstance(budget, Tokens | Share):
        return
    if not isinstance(budget, float):
        whole_number("budget", budget, 1)
    elif not 0 < budget <= 1:
        raise ValueError(f"budget is {budget!r}; as a share of the tokens it must be above 0 and at most 1")


def budget_mean(budget: Budget, schedule: ScaleSchedule) -> float:
    """Tokens per head and layer that a budget means on `schedule`; never more than are ever read again.

    Raises:
        TypeError: the schedule is something else.
        ValueError: what `check_budget` raises.
    """
    check_budget(budget)
    instance_of("schedule", schedule, ScaleSchedule)
    if isinstance(budget, Share):
        return min(budget.kept * schedule.total, float(schedule.prefix))
    if isinstance(budget, float):
        return budget * schedule.prefix
    return min(budget.count if isinstance(budget, Tokens) else budget, schedule.prefix)


def budget_tokens(budget: Budget, schedule: ScaleSchedule) -> int:
    """The whole tokens per head and layer that a budget means on `schedule`.

    Of a share as ScaleKV counts the nearest number, at least 1, and on Infinity's square 1M schedule the published one;
    of a `Share` no more than it says.

    Raises:
        TypeError: the schedule is something else.
        ValueError: what `check_budget` raises.
    """
    mean = budget_mean(budget, schedule)
    if isinstance(budget, float):
        published = PUBLISHED_MEANS.get(budget) if schedule == ScaleSchedule.named("infinity-1m-1.000") else None
        return max(1, round(mean)) if published is None else published
    return math.floor(mean + ROUNDING)
