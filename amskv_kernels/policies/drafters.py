"""ScaleKV's drafters: the layers whose attention is dispersed, as released, as measured, and how they are chosen."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from amskv_kernels.arguments import instance_of, shown, whole_number
from amskv_kernels.files import check_fits, finite_table, read_fields, write_json
from amskv_kernels.policies.base import Layers, check_layers_exist, layer_set, set_fields
from amskv_kernels.schedule import ScaleSchedule


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

    Raises:
        TypeError: a field of another type.
        ValueError: a field out of range, or a selectivity that is not finite; names the field.
    """

    FORMAT = "amskv-asi-1"

    schedule: tuple[tuple[int, int], ...]
    selectivity: tuple[tuple[float, ...], ...]
    layers: tuple[Layers, ...]
    top: int
    images: int
    model: str = "unnamed"

    def __post_init__(self) -> None:
        schedule = ScaleSchedule(self.schedule)
        table = finite_table("selectivity", self.selectivity, len(schedule))
        if not isinstance(self.layers, Iterable):
            raise TypeError(f"layers is {shown(self.layers)}; it must be a sequence of layers for each scale")
        layers = tuple(layer_set("layers", each) for each in self.layers)
        if len(layers) != len(schedule):
            raise ValueError(f"layers has {len(layers)} entries; it must have {len(schedule)}, one per scale")
        for each in layers:
            check_layers_exist("layers", each, len(table))
        top, images = check_top(self.top, schedule), whole_number("images", self.images, 0)
        instance_of("model", self.model, str)
        set_fields(self, schedule=schedule.sizes, selectivity=table, layers=layers, top=top, images=images)

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
        return cls(*(raw[field] for field in ("schedule", "selectivity", "layers", "top", "images", "model")))

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


def check_top(top: int, schedule: ScaleSchedule) -> int:
    """K′, how many of the strongest history keys count as selective, where it can tell layers apart.

    Raises:
        ValueError: no whole number ≥ 1, or no scale has a longer history: every key would count as selective.
    """
    if whole_number("top", top, 1) >= schedule.prefix:
        raise ValueError(
            f"top is {shown(top)}; it must be below {schedule.prefix}, the longest history of schedule "
            f"{schedule.name}, or every key counts as selective"
        )
    return int(top)


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
        TypeError: no table of numbers.
        ValueError: a selectivity that is not finite, or a count outside 0 … L · (K − first).
    """
    table = finite_table("selectivity", selectivity)
    layers, scales = len(table), len(table[0])
    whole_number("first", first, 0)
    pairs = layers * max(0, scales - first)
    wanted = max(scales - first, round(pairs / 16)) if count is None else whole_number("count", count, 0)
    if wanted > pairs:
        raise ValueError(
            f"count is {shown(wanted)}; there are {pairs} pairs of a layer and a scale from scale {first} on"
        )
    standing = []
    for scale in range(first, scales):
        column = [row[scale] for row in table]
        mean = sum(column) / layers
        spread = (sum((x - mean) ** 2 for x in column) / layers) ** 0.5
        standing += [((x - mean) / (spread + 1e-12), layer, scale) for layer, x in enumerate(column)]
    chosen = sorted(standing)[:wanted]
    return tuple(tuple(sorted(layer for _, layer, at in chosen if at == scale)) for scale in range(scales))
