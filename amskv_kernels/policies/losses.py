"""The losses file: what forgetting scales costs a model, head by head and step by step, as `LeastLoss` loads it.

While a head attends at step t, let w be the weights of a query, m_s = Σ_{j∈s} w_j the attention it pays to scale s, o
its output and a_s = m_s·o − Σ_{j∈s} w_j v_j. Where a set S of scales is forgotten, the output moves by (Σ_{s∈S} a_s) /
(1 − Σ_{s∈S} m_s): forgetting two scales costs other than the sum of both. So what is kept of a measurement is the mean
of m and the Gram matrix of the a, over queries and images: every set's loss follows from them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from amskv_kernels.arguments import instance_of, shown, whole_number
from amskv_kernels.files import check_fits, finite_table, read_fields, read_json, write_json
from amskv_kernels.policies.calibration import rank_layers
from amskv_kernels.schedule import ScaleSchedule

FORMAT = "amskv-losses-1"
DIGITS = 5  # significant ones in the file; the scatter between images is far larger
BLOCK = 128  # heads at a time, whose sets stay in a core's cache
LEAST_REST = 1e-3  # of the attention: what remains where all else is forgotten, when rounding leaves nothing
MOST_SCALES = 14  # that may be forgotten: 2^14 sets of them

Array = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)  # holds arrays
class Losses:
    """What one model loses when it forgets scales.

    Args:
        schedule: the (h, w) sizes the model was measured on.
        mass: (L, Hkv, K, K) mean attention that the queries of step t pay to scale s ≤ t, at […, t, s]; 0 above.
        gram: (L, Hkv, K, K, K) mean products a_s · a_s', at […, t, s, s'], s and s' below t; summed over the query
            heads that share a KV head.
        similarity: (L, K) key similarity, see `Calibration`.
        images: how many images were measured.
        model: a name for people.

    Raises:
        ValueError: a table of another shape, a number that is not finite, a mass outside 0 … 1; names the field and
            where.
    """

    schedule: tuple[tuple[int, int], ...]
    mass: Array
    gram: Array
    similarity: tuple[tuple[float, ...], ...]
    images: int
    model: str = "unnamed"

    def __post_init__(self) -> None:
        steps = len(ScaleSchedule(self.schedule))
        for name in ("mass", "gram"):
            value = np.asarray(getattr(self, name), dtype=np.float64)
            wanted = 4 if name == "mass" else 5
            if value.ndim != wanted or 0 in value.shape[:2] or set(value.shape[2:]) != {steps}:
                raise ValueError(f"{name} has shape {value.shape}; it must be (L, Hkv{f', {steps}' * (wanted - 2)})")
            if not np.isfinite(value).all():
                layer, head, step = np.argwhere(~np.isfinite(value))[0, :3]
                raise ValueError(
                    f"{name} holds a number that is not finite: head {head} of layer {layer} at step {step}"
                )
            object.__setattr__(self, name, value)
        if self.gram.shape[:2] != self.mass.shape[:2] or len(self.similarity) != self.num_layers:
            raise ValueError("mass, gram and similarity are of different models: their layers or heads differ")
        if self.mass.min() < 0 or self.mass.sum(-1).max() > 1 + 1e-3:  # written with DIGITS digits
            raise ValueError("mass holds shares of attention outside 0 … 1")
        if np.einsum("lhtss->lhts", self.gram).min() < 0:
            raise ValueError("gram has a negative square on its diagonal")

    @property
    def num_layers(self) -> int:
        """L of the measured model."""
        return len(self.mass)

    @property
    def kv_heads(self) -> int:
        """Hkv of the measured model."""
        return self.mass.shape[1]

    @property
    def ranking(self) -> tuple[int, ...]:
        """All layers, most cache-demanding first, by key similarity as AMS-KV ranks them."""
        return rank_layers(self.similarity)

    def alone(self) -> Array:
        """(L, Hkv, K, K) loss of a query of step t where scale s alone is forgotten, at […, t, s]; 0 for s ≥ t."""
        squares: Array = np.einsum("lhtss->lhts", self.gram)
        return squares / (1 - self.mass).clip(LEAST_REST) ** 2

    def of_sets(self, by: str, protected: int) -> list[npt.NDArray[np.float32]]:
        """For each step, the loss of every row where each set of scales is kept and all others are forgotten.

        Args:
            by: "layer": a row is a layer, its heads forget alike; "head": a row is a head of a layer.
            protected: the first scales, which are never forgotten.

        Returns:
            per step t (2^max(0, t − protected), rows), bit i of the first index saying whether scale protected + i is
            kept; summed over the step's queries.

        Raises:
            ValueError: more than `MOST_SCALES` scales may be forgotten.
        """
        steps, tokens = len(self.schedule), ScaleSchedule(self.schedule).tokens
        if steps - 1 - protected > MOST_SCALES:
            raise ValueError(
                f"protected is {protected}; of {steps - 1} scales that are read later at most {MOST_SCALES} may be "
                f"forgotten, so it must be at least {steps - 1 - MOST_SCALES}"
            )
        own = self.num_layers * (1 if by == "layer" else self.kv_heads)
        tables = [np.empty((1 << max(0, step - protected), own), dtype=np.float32) for step in range(steps)]
        block = max(1, BLOCK // self.kv_heads)
        for first in range(0, self.num_layers, block):
            for step, table in enumerate(tables):
                free, layers = slice(protected, max(step, protected)), slice(first, first + block)
                squares = _sums_of_sets(_rows_last(self.gram[layers, :, step, free, free]))
                rest = (1 - _sums_of_sets(_rows_last(self.mass[layers, :, step, free]))).clip(LEAST_REST)
                loss = tokens[step] * squares.clip(0) / (rest * rest)
                # Indexed by what is forgotten so far; what is kept is the complement.
                here = loss[::-1] if by == "head" else loss[::-1].reshape(len(loss), -1, self.kv_heads).sum(-1)
                table[:, first * own // self.num_layers :][:, : here.shape[1]] = here
        return tables

    def check_fits(self, schedule: ScaleSchedule, num_layers: int, kv_heads: int | None = None) -> None:
        """Raise ValueError when the losses were measured on another depth, schedule or number of KV heads."""
        check_fits("the losses file", self.schedule, self.num_layers, schedule, num_layers)
        if kv_heads not in (None, self.kv_heads):
            raise ValueError(f"the losses file was made for {self.kv_heads} KV heads; this model has {kv_heads}")

    def save(self, path: str | Path) -> None:
        """Write as JSON."""
        steps = len(self.schedule)
        rows, columns = np.tril_indices(steps)
        mass = [[_rounded(head[rows, columns]) for head in layer] for layer in self.mass]
        gram = [[_rounded(head[_triangles(steps)]) for head in layer] for layer in self.gram]
        fields = {
            "format": FORMAT, "schedule": self.schedule, "images": self.images, "model": self.model,
            "similarity": self.similarity, "mass": mass, "gram": gram,
        }  # fmt: skip
        write_json(path, fields, indent=None, separators=(",", ":"))

    @classmethod
    def load(cls, path: str | Path) -> Losses:
        """Read what `save` wrote.

        Raises:
            ValueError: the file is missing, is not JSON, or a field is missing or out of range; names file and field.
        """
        return read_fields(path, "losses file", FORMAT, cls._parse)

    @classmethod
    def _parse(cls, raw: dict[str, Any]) -> Losses:
        sizes = ScaleSchedule(raw["schedule"]).sizes
        steps = len(sizes)
        similarity = finite_table("similarity", raw["similarity"], steps)
        layers, heads = len(similarity), len(raw["mass"][0])
        rows, columns = np.tril_indices(steps)
        mass, gram = np.zeros((layers, heads, steps, steps)), np.zeros((layers, heads, steps, steps, steps))
        at, first, second = _triangles(steps)
        mass[..., rows, columns] = _numbers("mass", raw["mass"], layers, heads, len(rows))
        gram[..., at, first, second] = _numbers("gram", raw["gram"], layers, heads, len(at))
        gram[..., at, second, first] = gram[..., at, first, second]
        instance_of("model", raw["model"], str)
        return cls(sizes, mass, gram, similarity, whole_number("images", raw["images"], 0), raw["model"])


def _numbers(name: str, raw: Any, layers: int, heads: int, count: int) -> Array:
    """(layers, heads, count) of a field, or a ValueError naming what it has."""
    flat = [head for layer in raw for head in layer]
    if {len(layer) for layer in raw} != {heads} or len(raw) != layers or {len(head) for head in flat} != {count}:
        raise ValueError(f"{name} has another size than {layers} layers × {heads} heads × {count} numbers")
    if any(type(x) not in (int, float) for head in flat for x in head):
        raise TypeError(f"{name} holds something that is no number")
    return np.asarray(flat, dtype=np.float64).reshape(layers, heads, count)


def is_losses(path: str | Path) -> bool:
    """Whether a file says that it holds losses, of whatever version.

    Raises:
        ValueError: it cannot be read, or is not JSON.
    """
    raw = read_json(path, "calibration")
    return isinstance(raw, dict) and str(raw.get("format")).startswith("amskv-losses")


def check_by(by: object) -> None:
    """Raise ValueError where `by` is neither "layer" nor "head"."""
    if by not in ("layer", "head"):
        raise ValueError(f"by is {shown(by)}; it must be 'layer' or 'head'")


def _rows_last(values: Array) -> Array:
    """(L, Hkv, …) as (…, L·Hkv)."""
    layers, heads, *rest = values.shape
    return np.ascontiguousarray(np.moveaxis(values.reshape(layers * heads, *rest), 0, -1))


def _sums_of_sets(values: Array) -> Array:
    """(2^n, rows) Σ over each set, bit i standing for member i, of (n, rows), or of symmetric (n, n, rows)."""
    count, rows = len(values), values.shape[-1]
    sums = np.zeros((1 << count, rows))
    for i in range(count):
        own = values[i] if values.ndim == 2 else values[i, i] + 2 * _sums_of_sets(values[i, :i])
        np.add(sums[: 1 << i], own, out=sums[1 << i : 2 << i])
    return sums


def _triangles(steps: int) -> tuple[npt.NDArray[np.int64], ...]:
    """(step, s, s') of the Gram matrices' upper triangles, s ≤ s' < step."""
    places = [(step, s, other) for step in range(steps) for s in range(step) for other in range(s, step)]
    return tuple(np.array(places, dtype=np.int64).reshape(-1, 3).T)


def _rounded(values: Array) -> list[float]:
    return [float(f"{x:.{DIGITS}g}") for x in values.tolist()]
