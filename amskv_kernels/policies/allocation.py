"""Which scales every row keeps at every step, so that the expected loss is least under a cap: an integer program.

A row is a layer, or a head of one. Given a price per token and call the rows do not touch each other, and each has a
best course of its own. The prices come from a linear program over the courses found so far (column generation; HiGHS
solves it), and every pricing bounds from below what any allocation can lose. At the end few rows are torn between
courses: a small integer program decides those, and then whichever row gains most from the exact room that the others
leave it is given its best course, until none gains.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from amskv_kernels.policies.courses import (
    Floats,
    Ints,
    Problem,
    cheapest,
    in_flight,
    last_read,
    losses_of,
    rooms,
    spread,
    uses_of,
)

ROUNDS = 200  # of pricing at most; 10 … 50 are usual
CLOSE = 1e-3  # distance of bound and linear program, relative, at which pricing ends
AROUND = (0.95, 1.05, 1.2, 1.5)  # times the right prices: what rows would do with a little more or less room
PART = 160  # rows are many where there are more; the prices of so many are the start then
GROUPS = 32  # of rows, each with a mix of its own
SINGLE = 4e-6  # relative, what sums over a course are off by in float32
NODES = 2000  # of the integer program's search at most; the same everywhere, as a time limit is not
MOVES = 100  # of single rows at most, after rounding
ROUNDING = 1e-6  # of a token, or of a loss relative to all


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


def allocate(problem: Problem) -> Allocation:
    """The allocation of least loss found, and the bound.

    Raises:
        ValueError: the cap does not hold what is protected.
        RuntimeError: scipy is missing.
    """
    nothing = np.zeros((problem.rows, len(problem.tokens)), dtype=np.int64)
    least = uses_of(problem, nothing).sum(0) + in_flight(problem)
    if least.max() > problem.cap + ROUNDING:
        raise ValueError(
            f"the budget is {problem.cap / problem.rows:.4g} tokens; the {problem.protected} protected scales, with "
            f"what is in flight where the peak is capped, take {least.max() / problem.rows:.4g}"
        )
    everything = nothing + np.array([len(table) - 1 for table in problem.tables])
    if (uses_of(problem, everything).sum(0) + in_flight(problem)).max() <= problem.cap + ROUNDING:
        return Allocation(last_read(problem, everything), 0.0, 0.0)
    courses, mixed, bound, _ = _priced(problem, [nothing, everything], _first_prices(problem, nothing, everything))
    chosen = _improved(problem, _settled(problem, courses, mixed, nothing), bound)
    loss = float(losses_of(problem, chosen).sum())
    return Allocation(last_read(problem, chosen), loss, min(bound, loss))


def _first_prices(problem: Problem, nothing: Ints, everything: Ints) -> Floats:
    """Prices to start from: 0, or where there are very many rows what an even part of them comes to."""
    every = -(-problem.rows // PART)
    if every == 1 or problem.peak:
        return np.zeros_like(in_flight(problem))
    order = np.argsort(sum(table[0].astype(np.float64) for table in problem.tables))[every // 2 :: every]
    tables = [table[:, order] for table in problem.tables]
    part = problem._replace(tables=tables, cap=problem.cap * tables[0].shape[1] / problem.rows)
    return _priced(part, [nothing[order], everything[order]], np.zeros_like(in_flight(problem)))[-1]


def _priced(
    problem: Problem, courses: list[Ints], prices: Floats
) -> tuple[list[Ints], list[Ints], float, Floats]:  # fmt: skip
    """All courses (rows, K) found, those that the linear program mixes in the end, the bound, and the prices.

    The program mixes them group of rows by group: fewer have to be found than if all rows mixed alike.
    """
    groups = np.unique(np.arange(GROUPS) * problem.rows // GROUPS)  # where each begins
    known = bool(prices.any())
    courses = [*courses, *(_around(problem, prices) if known else ())]
    room, bound, best, new = problem.cap - in_flight(problem), 0.0, prices, prices
    losses = [np.add.reduceat(losses_of(problem, course), groups) for course in courses]
    uses = [np.add.reduceat(uses_of(problem, course), groups) for course in courses]
    mix: Floats = np.ones(0)
    for turn in range(ROUNDS):
        whose = np.tile(np.arange(len(groups)), len(courses))
        mix, value, new = _program(np.concatenate(losses), np.concatenate(uses).T, room, whose)
        if value - bound <= CLOSE * value:
            break
        # Half-way from those of the best bound every other turn: the prices of a few courses jump about.
        tried = new if turn % 2 else (new + best) / 2
        if known and turn == 0:
            tried = prices
        course = cheapest(problem, spread(problem, tried))[0]
        loss, use = losses_of(problem, course), uses_of(problem, course)
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
    return [cheapest(problem, spread(problem, factor * prices))[0] for factor in AROUND]


def _program(
    losses: Floats, uses: Floats, most: Floats, rows: Ints, whole: bool = False
) -> tuple[Floats, float, Floats]:
    """The cheapest mix of options where every row mixes its own to 1, `uses` · mix ≤ `most`.

    Args:
        losses: (N,) of each option.
        uses: (calls, N).
        most: (calls,).
        rows: (N,) whose option it is.
        whole: each row takes one option, or in the end none at all; else options may be mixed.

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
    if found.x is None and whole:  # none was met in so many nodes
        return np.zeros_like(losses), math.inf, prices
    if found.x is None:
        raise RuntimeError(f"HiGHS found no mix: {found.message}")
    return found.x, float(found.fun), prices


def _settled(problem: Problem, courses: list[Ints], mixed: list[Ints], nothing: Ints) -> Ints:
    """One course for each row, within the cap.

    Few rows are an integer program over all courses seen. Of many, those for which the linear program, free to mix row
    by row, wants a single course get that one; the rest, never many more than there are calls, is the integer program.
    """
    torn, chosen, left = np.arange(problem.rows), nothing.copy(), problem.cap - in_flight(problem) + ROUNDING
    if problem.rows > PART:
        options, rows = _options([nothing, *mixed], torn)
        weights, _, _ = _program(losses_of(problem, options, rows), uses_of(problem, options, rows).T, left, rows)
        sure = weights > 1 - ROUNDING
        chosen[rows[sure]] = options[sure]
        torn = np.setdiff1d(torn, rows[sure])
        left = left - uses_of(problem, options[sure], rows[sure]).sum(0)
    if not len(torn):
        return chosen
    options, rows = _options(courses, torn)
    weights, _, _ = _program(
        losses_of(problem, options, rows), uses_of(problem, options, rows).T, left, rows, whole=True
    )
    taken = weights > 0.5
    chosen[rows[taken]] = options[taken]
    return chosen


def _options(courses: list[Ints], rows: Ints) -> tuple[Ints, Ints]:
    """Every different course (N, K) that the rows have in `courses`, and whose it is (N,)."""
    own = [np.unique(np.stack([course[row] for course in courses]), axis=0) for row in rows]
    return np.concatenate(own), np.repeat(rows, [len(each) for each in own])


def _improved(problem: Problem, chosen: Ints, bound: float) -> Ints:
    """`chosen`, within the cap, after moves of single rows, until none gains or the bound is as good as reached."""
    losses, uses = losses_of(problem, chosen), uses_of(problem, chosen)
    everyone = np.arange(problem.rows)
    least = ROUNDING * losses.sum()
    for _ in range(MOVES):
        if losses.sum() <= (1 + CLOSE) * bound:
            break
        left = problem.cap + ROUNDING - in_flight(problem) - (uses.sum(0) - uses)  # (rows, calls)
        courses, values = cheapest(problem, None, rooms(problem, left))
        gains = losses - values
        row = int(gains.argmax())
        if gains[row] <= least:
            break
        chosen[row] = courses[row]
        losses[row], uses[row] = values[row], uses_of(problem, chosen[row : row + 1], everyone[row : row + 1])[0]
    return chosen
