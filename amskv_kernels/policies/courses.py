"""What a row may do with its scales from step to step: its courses, what they lose and hold, and the best of them.

A course is the set of scales kept at each step (bit i: the i-th unprotected scale). What may follow a set are its
subsets, with or without the scale just drawn, so that the best course, under prices or within some room, is a shortest
path: forward the least loss up to each set, backward the sets that it came from. Rows do not touch each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.floating[Any]]
Ints = npt.NDArray[np.int64]

BLOCK = 128  # rows at a time, whose states stay in a core's cache


class Problem(NamedTuple):
    """What is to be kept, and within what.

    Attributes:
        tables: per step (2^m, rows) loss of keeping each set of the unprotected scales drawn before it.
        tokens: (K,) of each scale.
        protected: the first scales, always kept.
        cap: tokens that all rows together may hold.
        layers: how many layers the rows belong to, in order.
        peak: whether the cap is on what each call sees, its own scale in flight, or on what is held between steps.
    """

    tables: Sequence[Floats]
    tokens: tuple[int, ...]
    protected: int
    cap: float
    layers: int
    peak: bool = False

    @property
    def rows(self) -> int:
        """How many rows there are."""
        return self.tables[0].shape[1]

    def sizes(self, step: int) -> Floats:
        """(2^m) tokens of each set at a step, protected scales included."""
        first = min(step, self.protected)
        sizes = np.array([float(sum(self.tokens[:first]))])
        for count in self.tokens[first:step]:
            sizes = np.concatenate([sizes, sizes + count])
        return sizes


class Prices(NamedTuple):
    """Of a token held at a step (rows, K), and of the scale drawn before a step, while its call writes it (rows, K)."""

    held: Floats
    fresh: Floats


def cheapest(problem: Problem, prices: Prices | None, room: Prices | None = None) -> tuple[Ints, Floats]:
    """Each row's best course (rows, K), under prices or within room for it alone, and its value."""
    blocks = [slice(first, first + BLOCK) for first in range(0, problem.rows, BLOCK)]
    found = [_cheapest_of(problem, block, prices, room) for block in blocks]
    return np.concatenate([courses for courses, _ in found]), np.concatenate([values for _, values in found])


def _cheapest_of(problem: Problem, rows: slice, prices: Prices | None, room: Prices | None) -> tuple[Ints, Floats]:
    """`cheapest` of some rows: forward the least loss up to each state, backward the states that it came from."""
    steps, value = len(problem.tokens), problem.tables[0][:, rows]
    dropped: list[Floats] = []  # per step, the least up to it where each set is kept and the scale just drawn is not,
    kept: list[Floats] = []  # and where it is: the same, but where the peak is capped
    for step in range(1, steps):
        sizes = problem.sizes(step)[:, None]
        dropped.append(_of_supersets(value))
        fitting = _fitting(problem, value, step, rows, room)
        kept.append(dropped[-1] if fitting is value else _of_supersets(fitting))
        own = problem.tables[step][:, rows]
        value = own[-len(kept[-1]) :] + kept[-1]
        if step > problem.protected:
            value = np.concatenate([own[: len(dropped[-1])] + dropped[-1], value])
        if prices is not None:
            value += sizes.astype(value.dtype) * prices.held[rows, step].astype(value.dtype)
            if problem.peak:
                value[-len(kept[-1]) :] += problem.tokens[step - 1] * prices.fresh[rows, step].astype(value.dtype)
        if room is not None:
            value[sizes > room.held[rows, step]] = np.inf
    courses = np.zeros((value.shape[1], steps), dtype=np.int64)
    courses[:, -1] = _best(value)
    for step in range(steps - 1, 0, -1):
        now, with_it, without = courses[:, step], kept[step - 1], dropped[step - 1]
        fresh = (now >= len(without)) | (step <= problem.protected)
        best = _best_superset(without, now % len(without))
        courses[:, step - 1] = (
            best if with_it is without else np.where(fresh, _best_superset(with_it, now % len(without)), best)
        )
    return courses, value[courses[:, -1], np.arange(value.shape[1])].astype(np.float64)


def _fitting(problem: Problem, value: Floats, step: int, rows: slice, room: Prices | None) -> Floats:
    """The states before `step` that leave room to write the scale just drawn."""
    if room is None or not problem.peak:
        return value
    return np.where(problem.sizes(step - 1)[:, None] > room.fresh[rows, step], np.inf, value)


def _of_supersets(values: Floats) -> Floats:
    """(2^m, rows) least value over every set's supersets."""
    sets, rows = values.shape
    least, half = values.copy(), 1
    while half < sets:
        pairs = least.reshape(-1, 2, half, rows)
        np.minimum(pairs[:, 0], pairs[:, 1], out=pairs[:, 0])
        half *= 2
    return least


def _best(values: Floats) -> Ints:
    """(rows,) the set of the least value: `values.argmin(0)`, several times as fast."""
    part = 1 << len(values).bit_length() // 2
    parts = values.reshape(-1, min(part, len(values)), values.shape[1])
    which = parts.min(1).argmin(0)
    found: Ints = which * parts.shape[1] + parts[which, :, np.arange(values.shape[1])].argmin(1)
    return found


def _best_superset(least: Floats, sets: Ints) -> Ints:
    """(rows,) the superset of each row's set whose own value is the least that `_of_supersets` found for the set."""
    row, wanted, bit = np.arange(len(sets)), least[sets, np.arange(len(sets))], 1
    while bit < len(least):
        # Where a larger set's supersets reach it too, on from there: in the end none does but the set itself.
        sets = np.where(least[sets | bit, row] <= wanted, sets | bit, sets)
        bit *= 2
    return sets


def losses_of(problem: Problem, courses: Ints, rows: Ints | None = None) -> Floats:
    """(N,) losses of courses (N, K), of all rows or of those named."""
    rows = np.arange(problem.rows) if rows is None else rows
    each = [table[courses[:, step], rows] for step, table in enumerate(problem.tables)]
    return np.sum(each, axis=0, dtype=np.float64)


def _held(problem: Problem, courses: Ints) -> tuple[Floats, Floats]:
    """(N, K + 1) tokens held at each step, none after the last, and (N, K) those of them drawn just before the next."""
    steps = len(problem.tokens)
    held, fresh = np.zeros((len(courses), steps + 1)), np.zeros((len(courses), steps))
    for step in range(1, steps):
        held[:, step] = problem.sizes(step)[courses[:, step]]
        kept = step <= problem.protected or (courses[:, step] >> (step - 1 - problem.protected)) & 1 == 1
        fresh[:, step - 1] = np.where(kept, problem.tokens[step - 1], 0)
    return held, fresh


def uses_of(problem: Problem, courses: Ints, rows: Ints | None = None) -> Floats:
    """(N, calls) tokens that each course takes of every capped quantity: between steps, or at each (step, layer)."""
    held, fresh = _held(problem, courses)
    if not problem.peak:
        return held[:, 1:-1]
    layer = _layers(problem, rows)[:, None, None]
    calls = np.arange(problem.layers)
    # A layer has dropped and stored what it does once its own call is over.
    use = np.where(calls > layer, held[:, 1:, None], held[:, :-1, None]) + np.where(calls == layer, fresh[..., None], 0)
    return use.reshape(len(courses), len(problem.tokens) * problem.layers)


def in_flight(problem: Problem) -> Floats:
    """(calls,) tokens that every allocation takes: K and V of the scale being drawn, where the peak is capped."""
    if not problem.peak:
        return np.zeros(len(problem.tokens) - 1)
    return np.repeat(np.asarray(problem.tokens, dtype=np.float64), problem.layers) * problem.rows / problem.layers


def _layers(problem: Problem, rows: Ints | None = None) -> Ints:
    """The layer of each row."""
    rows = np.arange(problem.rows) if rows is None else rows
    return rows // (problem.rows // problem.layers)


def spread(problem: Problem, prices: Floats) -> Prices:
    """What a price (calls,) of every capped quantity means for each row: the transpose of `uses_of`."""
    steps, layers = len(problem.tokens), problem.layers
    held, fresh = np.zeros((2, problem.rows, steps))
    if not problem.peak:
        held[:, 1:] = prices
        return Prices(held, fresh)
    table, layer = prices.reshape(steps, layers), _layers(problem)
    upto = np.concatenate([np.zeros((steps, 1)), table.cumsum(1)], axis=1)  # over the layers before each
    held += upto[:, layer + 1].T
    held[:, 1:] += (upto[:-1, -1:] - upto[:-1, layer + 1]).T
    fresh[:, 1:] = table[:-1, layer].T
    return Prices(held, fresh)


def rooms(problem: Problem, left: Floats) -> Prices:
    """The most that each row may hold at each step, where the others leave it (rows, calls)."""
    steps, layers, rows = len(problem.tokens), problem.layers, np.arange(problem.rows)
    held, fresh = np.full((2, problem.rows, steps), np.inf)
    if not problem.peak:
        held[:, 1:] = left
        return Prices(held, fresh)
    table, layer = left.reshape(problem.rows, steps, layers), _layers(problem)
    calls = np.arange(layers)
    before = np.where(calls > layer[:, None, None], np.inf, table).min(2)
    after = np.where(calls > layer[:, None, None], table, np.inf).min(2)
    held = before
    held[:, 1:] = np.minimum(held[:, 1:], after[:, :-1])
    fresh[:, 1:] = table[rows, :-1, layer] - np.asarray(problem.tokens[:-1])
    return Prices(held, fresh)


def last_read(problem: Problem, courses: Ints) -> Ints:
    """(rows, K) from courses."""
    steps = len(problem.tokens)
    reads = np.full((len(courses), steps), -1, dtype=np.int64)
    for step in range(1, steps):
        reads[:, : min(step, problem.protected)] = step
        for scale in range(problem.protected, step):
            kept = (courses[:, step] >> (scale - problem.protected)) & 1 == 1
            reads[kept, scale] = step
    return reads
