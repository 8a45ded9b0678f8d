"""Policies fitted to a model: what is forgotten is what it loses least by."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from amskv_kernels.arguments import instance_of, shown, whole_number
from amskv_kernels.files import check_fits, read_fields, write_json
from amskv_kernels.policies.allocation import Allocation, allocate
from amskv_kernels.policies.base import HeadPolicy
from amskv_kernels.policies.budgets import Budget, budget_mean, check_budget
from amskv_kernels.policies.courses import Problem
from amskv_kernels.policies.losses import Losses, check_by
from amskv_kernels.schedule import ScaleSchedule

FORMAT = "amskv-lifetimes-1"


class _Lifetimes(HeadPolicy):
    """Reads a table of last reads."""

    @property
    def last_read(self) -> npt.NDArray[np.int64]:
        """(L, 1 or Hkv, K) the last step at which each scale is read; −1: never."""
        raise NotImplementedError

    @property
    def alike(self) -> bool:
        return self.last_read.shape[1] == 1

    def visible_to(self, schedule: ScaleSchedule, layer: int, head: int, step: int) -> tuple[int, ...]:
        reads = self.last_read[layer, 0 if self.alike else head, :step]
        return tuple(np.flatnonzero(reads >= step).tolist())

    def visible(self, schedule: ScaleSchedule, layer: int, step: int) -> tuple[int, ...]:
        return tuple(np.flatnonzero(self.last_read[layer, :, :step].max(0) >= step).tolist())


@dataclass(frozen=True, eq=False)  # holds arrays
class LeastLoss(_Lifetimes):
    """Keeps, over all layers together, the scales that a model would miss most: least expected loss under a cap.

    The lifetimes of all layers' scales are chosen at once, see `allocation`; `fit` tells the expected loss, and how far
    below it any choice could come.

    Args:
        budget: mean tokens per head and layer, see `amskv_kernels.policies.budgets`.
        losses: measured on the model, see `Losses`.
        by: "layer": a layer's heads keep the same scales; "head": each its own.
        protected: the first scales, which are never dropped, such as a text prefix.
        limit: what the budget caps, at every step: "retained", what is held between steps, or "peak", what any call
            sees, its own scale's keys and values included.

    Raises:
        TypeError: a budget that is none, or losses of another type.
        ValueError: an argument out of range; later, losses of another model, or a budget below what is protected.
    """

    budget: Budget
    losses: Losses
    by: Literal["layer", "head"] = "layer"
    protected: int = 0
    limit: Literal["retained", "peak"] = "retained"

    def __post_init__(self) -> None:
        check_budget(self.budget)
        instance_of("losses", self.losses, Losses)
        check_by(self.by)
        most = len(self.losses.schedule) - 1
        if whole_number("protected", self.protected, 0) > most:
            raise ValueError(
                f"protected is {self.protected}; it must be at most {most}, the scales that are read later"
            )
        if self.limit not in ("retained", "peak"):
            raise ValueError(f"limit is {shown(self.limit)}; it must be 'retained' or 'peak'")

    def __repr__(self) -> str:
        return (
            f"LeastLoss(budget={self.budget!r}, losses of {self.losses.model}, by={self.by!r}, "
            f"protected={self.protected}, limit={self.limit!r})"
        )

    @cached_property
    def fit(self) -> Allocation:
        """The allocation: lifetimes, expected loss, and the bound below it.

        Raises:
            ValueError: a budget below what is protected.
            RuntimeError: scipy is missing.
        """
        schedule = ScaleSchedule(self.losses.schedule)
        tables = self.losses.of_sets(self.by, self.protected)
        cap = budget_mean(self.budget, schedule) * tables[0].shape[1]
        layers = self.losses.num_layers
        return allocate(Problem(tables, schedule.tokens, self.protected, cap, layers, self.limit == "peak"))

    @cached_property
    def last_read(self) -> npt.NDArray[np.int64]:
        return self.fit.last_read.reshape(self.losses.num_layers, -1, len(self.losses.schedule))

    @property
    def alike(self) -> bool:
        return self.by == "layer"

    def check_fits(self, schedule: ScaleSchedule, num_layers: int) -> None:
        self.losses.check_fits(schedule, num_layers)

    def check_layers(self, num_layers: int) -> None:
        self.losses.check_fits(ScaleSchedule(self.losses.schedule), num_layers)

    def check_heads(self, schedule: ScaleSchedule, num_layers: int, kv_heads: int) -> None:
        self.losses.check_fits(schedule, num_layers, kv_heads)

    def lifetimes(self) -> Lifetimes:
        """What was fitted, on its own: it needs neither losses nor scipy any more."""
        reads = tuple(tuple(tuple(head) for head in layer) for layer in self.last_read.tolist())
        return Lifetimes(self.losses.schedule, reads, self.losses.model)


@dataclass(frozen=True)
class Lifetimes(_Lifetimes):
    """Lifetimes as they were fitted: a policy file's content.

    Args:
        schedule: the (h, w) sizes it is for.
        reads: (L, 1 or Hkv, K) the last step at which each scale is read, −1 for never; one entry a layer where its
            heads are alike.
        model: a name for people.

    Raises:
        ValueError: a table of another shape, or a last read that is neither −1 nor after the scale itself.
    """

    schedule: tuple[tuple[int, int], ...]
    reads: tuple[tuple[tuple[int, ...], ...], ...]
    model: str = "unnamed"

    def __post_init__(self) -> None:
        steps = len(ScaleSchedule(self.schedule))
        heads = {len(layer) for layer in self.reads}
        if len(heads) != 1 or 0 in heads or {len(head) for layer in self.reads for head in layer} != {steps}:
            raise ValueError(f"reads must be a table (L, heads, {steps})")
        for scale, each in enumerate(zip(*(head for layer in self.reads for head in layer), strict=True)):
            for read in each:
                if whole_number("each of reads", read, -1) in range(scale + 1) or read >= steps:
                    later = f"{scale + 1} … {steps - 1}"
                    raise ValueError(f"reads has {read} for scale {scale}; it must be −1, never, or within {later}")

    def __repr__(self) -> str:
        return f"Lifetimes(of {self.model}, {len(self.reads)} layers × {len(self.reads[0])} heads)"

    @cached_property
    def last_read(self) -> npt.NDArray[np.int64]:
        return np.asarray(self.reads, dtype=np.int64)

    def check_fits(self, schedule: ScaleSchedule, num_layers: int) -> None:
        check_fits("the policy file", self.schedule, len(self.reads), schedule, num_layers)

    def check_layers(self, num_layers: int) -> None:
        self.check_fits(ScaleSchedule(self.schedule), num_layers)

    def check_heads(self, schedule: ScaleSchedule, num_layers: int, kv_heads: int) -> None:
        self.check_fits(schedule, num_layers)
        if len(self.reads[0]) not in (1, kv_heads):
            raise ValueError(f"the policy file was made for {len(self.reads[0])} KV heads; this model has {kv_heads}")

    def save(self, path: str | Path) -> None:
        """Write as JSON."""
        fields = {"format": FORMAT, "schedule": self.schedule, "model": self.model, "reads": self.reads}
        write_json(path, fields, indent=None)

    @classmethod
    def load(cls, path: str | Path) -> Lifetimes:
        """Read what `save` wrote.

        Raises:
            ValueError: the file is missing, is not JSON, or a field is missing or out of range; names file and field.
        """
        return read_fields(path, "policy file", FORMAT, cls._parse)

    @classmethod
    def _parse(cls, raw: dict[str, Any]) -> Lifetimes:
        sizes = ScaleSchedule(raw["schedule"]).sizes
        instance_of("model", raw["model"], str)
        return cls(sizes, tuple(tuple(tuple(head) for head in layer) for layer in raw["reads"]), raw["model"])
