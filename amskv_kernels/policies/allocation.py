"""Which scales every row keeps at every step, so that the expected loss is least under a cap: an integer program.

A row is a layer, or a head of one. Its state at a step is the set of scales it keeps; what may follow are the set's
subsets, with or without the scale just drawn. Given a price per token and call the rows do not touch each other, and
the best course of a row is a shortest path through its states. The prices come from a linear program over the courses
found so far (column generation; HiGHS solves it), and every pricing bounds from below what any allocation can lose. At
the end few rows are torn between courses: a small integer program decides those, and then whichever row gains most from
the exact room that the others leave it is given its best course, until none gains.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.floating[Any]]
Ints = npt.NDArray[np.int64]

ROUNDS = 200  # of pricing at most; 10 … 50 are usual
CLOSE = 8e-3  # distance of bound and linear program, relative, at which pricing ends
AROUND = (0.95, 1.05, 1.2, 1.5)  # times the right prices: what rows would do with a little more or less room
PART = 160  # rows whose prices serve as a start where there are more
GROUPS = 32  # of rows, each with a mix of its own
BLOCK = 128  # rows at a time, whose states stay in a core's cache
SINGLE = 4e-6  # relative, what sums over a course are off by in float32
NODES = 2000  # of the integer program's search at most; the same everywhere, as a time limit is not
MOVES = 100  # of single rows at most, after rounding
ROUNDING = 1e-6  # of a token, or of a loss relative to all


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


class Allocation(NamedTuple):
    """What came of a problem.

    Attributes:
        last_read: (rows, K) the last step at which a row reads each scale; −1: never.
        loss: expected, summed over rows, steps and queries.
        bound: no allocation's loss can lie below.
    """

    last_read: Ints
    loss: float
    bound: float

    @property
    def gap(self) -> float:
        """How far above the least possible the loss may lie, relative to that."""
        return 0.0 if self.loss <= self.bound else (self.loss - self.bound) / max(self.bound, 1e-12)


class _Prices(NamedTuple):
    """Of a token held at a step (rows, K), and of the scale drawn before a step, while its call writes it (rows, K)."""

    held: Floats
    fresh: Floats


def allocate(problem: Problem) -> Allocation:
    """The allocation of least loss found, and the bound.

    Raises:
        ValueError: the cap does not hold what is protected.
        RuntimeError: scipy is missing.
    """
    nothing = np.zeros((problem.rows, len(problem.tokens)), dtype=np.int64)
    least = _uses(problem, nothing).sum(0) + _in_flight(problem)
    if least.max() > problem.cap + ROUNDING:
        raise ValueError(
            f"the budget is {problem.cap / problem.rows:.4g} tokens; the {problem.protected} protected scales, with "
            f"what is in flight where the peak is capped, take {least.max() / problem.rows:.4g}"
        )
    everything = nothing + np.array([len(table) - 1 for table in problem.tables])
    if (_uses(problem, everything).sum(0) + _in_flight(problem)).max() <= problem.cap + ROUNDING:
        return Allocation(_last_read(problem, everything), 0.0, 0.0)
    courses, mixed, bound, _ = _priced(problem, [nothing, everything], _first_prices(problem, nothing, everything))
    chosen = _improved(problem, _settled(problem, courses, mixed, nothing), bound)
    loss = float(_losses(problem, chosen).sum())
    return Allocation(_last_read(problem, chosen), loss, min(bound, loss))


def _first_prices(problem: Problem, nothing: Ints, everything: Ints) -> Floats:
    """Prices to start from: 0, or where there are very many rows what an even part of them comes to."""
    every = -(-problem.rows // PART)
    if every == 1 or problem.peak:
        return np.zeros_like(_in_flight(problem))
    order = np.argsort(sum(table[0].astype(np.float64) for table in problem.tables))[every // 2 :: every]
    tables = [table[:, order] for table in problem.tables]
    part = problem._replace(tables=tables, cap=problem.cap * tables[0].shape[1] / problem.rows)
    return _priced(part, [nothing[order], everything[order]], np.zeros_like(_in_flight(problem)))[-1]


def _priced(
    problem: Problem, courses: list[Ints], prices: Floats
) -> tuple[list[Ints], list[Ints], float, Floats]:  # fmt: skip
    """All courses (rows, K) found, those that the linear program mixes in the end, the bound, and the prices.

    The program mixes them group of rows by group: fewer have to be found than if all rows mixed alike.
    """
    groups = np.unique(np.arange(GROUPS) * problem.rows // GROUPS)  # where each begins
    known = bool(prices.any())
    courses = [*courses, *(_around(problem, prices) if known else ())]
    room, bound, best, new = problem.cap - _in_flight(problem), 0.0, prices, prices
    losses = [np.add.reduceat(_losses(problem, course), groups) for course in courses]
    uses = [np.add.reduceat(_uses(problem, course), groups) for course in courses]
    mix: Floats = np.ones(0)
    for turn in range(ROUNDS):
        whose = np.tile(np.arange(len(groups)), len(courses))
        mix, value, new = _program(np.concatenate(losses), np.concatenate(uses).T, room, whose)
        if value - bound <= CLOSE * value:
            break
        # Half-way from those of the best bound every other turn: the prices of a few courses jump about.
        tried = (best if turn == 0 else new) if (turn % 2 or turn == 0 and known) else (new + best) / 2
        course = _cheapest(problem, _spread(problem, tried))[0]
        loss, use = _losses(problem, course), _uses(problem, course)
        below = (1 - SINGLE) * float(loss.sum() + use.sum(0) @ tried) - float(tried @ room)
        if below > bound or turn == 0:
            bound, best = max(bound, below), tried
        losses, uses = [*losses, np.add.reduceat(loss, groups)], [*uses, np.add.reduceat(use, groups)]
        courses = [*courses, course]
    weights = mix.reshape(-1, len(groups)).max(1)
    mixed = [course for course, weight in zip(courses, weights, strict=False) if weight > ROUNDING]
    return [*courses, *(() if known else _around(problem, new))], mixed, bound, new


def _around(problem: Problem, prices: Floats) -> list[Ints]:
    """What rows do at prices that are somewhat off."""
    return [_cheapest(problem, _spread(problem, factor * prices))[0] for factor in AROUND]


def _program(
    losses: Floats, uses: Floats, most: Floats, rows: Ints, whole: bool = False
) -> tuple[Floats, float, Floats]:
    """The cheapest mix of options where every row mixes its own to 1, `uses` · mix ≤ `most`.

    Args:
        losses: (N,) of each option.
        uses: (calls, N).
        most: (calls,).
        rows: (N,) whose option it is.
        whole: each row takes one option; else options may be mixed.

    Returns:
        the mix (N,), its loss, and what a token more would gain at each call (0 where `whole`).

    Raises:
        RuntimeError: scipy is missing.
    """
    try:
        from scipy.optimize import Bounds, LinearConstraint, linprog, milp
        from scipy.sparse import csr_matrix
    except ImportError as error:
        raise RuntimeError("fitting a policy needs scipy: pip install 'amskv_kernels[fit]'") from error
    _, row = np.unique(rows, return_inverse=True)
    equal = csr_matrix((np.ones(len(row)), (row, np.arange(len(row)))))
    ones, prices = np.ones(equal.shape[0]), np.zeros(len(most))
    binding = uses.max(1) > 0
    if whole:
        limits = (LinearConstraint(equal, ones, ones), LinearConstraint(uses, ub=most))
        options = {"mip_rel_gap": CLOSE, "node_limit": NODES}
        found = milp(losses, integrality=np.ones_like(losses), bounds=Bounds(0, 1), constraints=limits, options=options)
    else:
        found = linprog(losses, uses[binding], most[binding], equal, ones, method="highs")
        prices[binding] = -found.ineqlin.marginals
    if found.x is None:
        raise RuntimeError(f"HiGHS found no mix: {found.message}")
    return found.x, float(found.fun), prices


def _settled(problem: Problem, courses: list[Ints], mixed: list[Ints], nothing: Ints) -> Ints:
    """One course for each row, within the cap.

    Where the linear program, free to mix row by row, wants a single course, that one. The rest, never many more than
    there are calls, is an integer program over all courses seen, and it is solved as one.
    """
    everyone = np.arange(problem.rows)
    room = problem.cap - _in_flight(problem)
    options, rows = _options(mixed, everyone)
    weights, _, _ = _program(_losses(problem, options, rows), _uses(problem, options, rows).T, room, rows)
    chosen, sure = nothing.copy(), weights > 1 - ROUNDING
    chosen[rows[sure]] = options[sure]
    torn = np.setdiff1d(everyone, rows[sure])
    if not len(torn):
        return chosen
    left = room + ROUNDING - _uses(problem, chosen[rows[sure]], rows[sure]).sum(0)
    options, rows = _options(courses, torn)
    weights, _, _ = _program(_losses(problem, options, rows), _uses(problem, options, rows).T, left, rows, whole=True)
    taken = weights > 0.5
    chosen[rows[taken]] = options[taken]
    return chosen


def _options(courses: list[Ints], rows: Ints) -> tuple[Ints, Ints]:
    """Every different course (N, K) that the rows have in `courses`, and whose it is (N,)."""
    own = [np.unique(np.stack([course[row] for course in courses]), axis=0) for row in rows]
    return np.concatenate(own), np.repeat(rows, [len(each) for each in own])


def _improved(problem: Problem, chosen: Ints, bound: float) -> Ints:
    """`chosen`, within the cap, after moves of single rows, until none gains or the bound is as good as reached."""
    losses, uses = _losses(problem, chosen), _uses(problem, chosen)
    everyone = np.arange(problem.rows)
    least = ROUNDING * losses.sum()
    for _ in range(MOVES):
        if losses.sum() <= (1 + CLOSE) * bound:
            break
        left = problem.cap + ROUNDING - _in_flight(problem) - (uses.sum(0) - uses)  # (rows, calls)
        courses, values = _cheapest(problem, None, _rooms(problem, left))
        gains = losses - values
        row = int(gains.argmax())
        if gains[row] <= least:
            break
        chosen[row] = courses[row]
        losses[row], uses[row] = values[row], _uses(problem, chosen[row : row + 1], everyone[row : row + 1])[0]
    return chosen


def _cheapest(problem: Problem, prices: _Prices | None, room: _Prices | None = None) -> tuple[Ints, Floats]:
    """Each row's best course (rows, K), under prices or within room for it alone, and its value."""
    blocks = [slice(first, first + BLOCK) for first in range(0, problem.rows, BLOCK)]
    found = [_cheapest_of(problem, block, prices, room) for block in blocks]
    return np.concatenate([courses for courses, _ in found]), np.concatenate([values for _, values in found])


def _cheapest_of(problem: Problem, rows: slice, prices: _Prices | None, room: _Prices | None) -> tuple[Ints, Floats]:
    """`_cheapest` of some rows: forward the least loss up to each state, backward the states that it came from."""
    steps, value = len(problem.tokens), problem.tables[0][:, rows]
    dropped: list[Floats] = []  # per step, the least up to it where each set is kept and the scale just drawn is not,
    kept: list[Floats] = []  # and where it is: the same, but where the peak is capped
    for step in range(1, steps):
        sizes = problem.sizes(step)[:, None]
        dropped.append(_of_supersets(value))
        fitting = _fitting(problem, value, step, rows, room)
        kept.append(dropped[-1] if fitting is value else _of_supersets(fitting))
        value = problem.tables[step][:, rows].copy()
        value[-len(kept[-1]) :] += kept[-1]
        if step > problem.protected:
            value[: len(dropped[-1])] += dropped[-1]
        if prices is not None:
            value += sizes.astype(value.dtype) * prices.held[rows, step].astype(value.dtype)
            if problem.peak:
                value[-len(kept[-1]) :] += problem.tokens[step - 1] * prices.fresh[rows, step].astype(value.dtype)
        if room is not None:
            value[sizes > room.held[rows, step]] = np.inf
    courses = np.zeros((value.shape[1], steps), dtype=np.int64)
    courses[:, -1] = value.argmin(0)
    for step in range(steps - 1, 0, -1):
        now, with_it, without = courses[:, step], kept[step - 1], dropped[step - 1]
        fresh = (now >= len(without)) | (step <= problem.protected)
        best = _best_superset(without, now % len(without))
        courses[:, step - 1] = (
            best if with_it is without else np.where(fresh, _best_superset(with_it, now % len(without)), best)
        )
    return courses, value.min(0).astype(np.float64)


def _fitting(problem: Problem, value: Floats, step: int, rows: slice, room: _Prices | None) -> Floats:
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


def _best_superset(least: Floats, sets: Ints) -> Ints:
    """(rows,) the superset of each row's set whose own value is the least that `_of_supersets` found for the set."""
    row, wanted, bit = np.arange(len(sets)), least[sets, np.arange(len(sets))], 1
    while bit < len(least):
        # Where a larger set's supersets reach it too, on from there: in the end none does but the set itself.
        sets = np.where(least[sets | bit, row] <= wanted, sets | bit, sets)
        bit *= 2
    return sets


def _losses(problem: Problem, courses: Ints, rows: Ints | None = None) -> Floats:
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


def _uses(problem: Problem, courses: Ints, rows: Ints | None = None) -> Floats:
    """(N, calls) tokens that each course takes of every capped quantity: between steps, or at each (step, layer)."""
    held, fresh = _held(problem, courses)
    if not problem.peak:
        return held[:, 1:-1]
    layer = _layers(problem, rows)[:, None, None]
    calls = np.arange(problem.layers)
    # A layer has dropped and stored what it does once its own call is over.
    use = np.where(calls > layer, held[:, 1:, None], held[:, :-1, None]) + np.where(calls == layer, fresh[..., None], 0)
    return use.reshape(len(courses), len(problem.tokens) * problem.layers)


def _in_flight(problem: Problem) -> Floats:
    """(calls,) tokens that every allocation takes: K and V of the scale being drawn, where the peak is capped."""
    if not problem.peak:
        return np.zeros(len(problem.tokens) - 1)
    return np.repeat(np.asarray(problem.tokens, dtype=np.float64), problem.layers) * problem.rows / problem.layers


def _layers(problem: Problem, rows: Ints | None = None) -> Ints:
    """The layer of each row."""
    rows = np.arange(problem.rows) if rows is None else rows
    return rows // (problem.rows // problem.layers)


def _spread(problem: Problem, prices: Floats) -> _Prices:
    """What a price (calls,) of every capped quantity means for each row: the transpose of `_uses`."""
    steps, layers = len(problem.tokens), problem.layers
    held, fresh = np.zeros((2, problem.rows, steps))
    if not problem.peak:
        held[:, 1:] = prices
        return _Prices(held, fresh)
    table, layer = prices.reshape(steps, layers), _layers(problem)
    upto = np.concatenate([np.zeros((steps, 1)), table.cumsum(1)], axis=1)  # over the layers before each
    held += upto[:, layer + 1].T
    held[:, 1:] += (upto[:-1, -1:] - upto[:-1, layer + 1]).T
    fresh[:, 1:] = table[:-1, layer].T
    return _Prices(held, fresh)


def _rooms(problem: Problem, left: Floats) -> _Prices:
    """The most that each row may hold at each step, where the others leave it (rows, calls)."""
    steps, layers, rows = len(problem.tokens), problem.layers, np.arange(problem.rows)
    held, fresh = np.full((2, problem.rows, steps), np.inf)
    if not problem.peak:
        held[:, 1:] = left
        return _Prices(held, fresh)
    table, layer = left.reshape(problem.rows, steps, layers), _layers(problem)
    calls = np.arange(layers)
    before = np.where(calls > layer[:, None, None], np.inf, table).min(2)
    after = np.where(calls > layer[:, None, None], table, np.inf).min(2)
    held = before
    held[:, 1:] = np.minimum(held[:, 1:], after[:, :-1])
    fresh[:, 1:] = table[rows, :-1, layer] - np.asarray(problem.tokens[:-1])
    return _Prices(held, fresh)


def _last_read(problem: Problem, courses: Ints) -> Ints:
    """(rows, K) from courses."""
    steps = len(problem.tokens)
    reads = np.full((len(courses), steps), -1, dtype=np.int64)
    for step in range(1, steps):
        reads[:, : min(step, problem.protected)] = step
        for scale in range(problem.protected, step):
            kept = (courses[:, step] >> (scale - problem.protected)) & 1 == 1
            reads[kept, scale] = step
    return reads
