"""The integer program behind LeastLoss: against every allocation there is, and within its own bound."""

import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from amskv_kernels import CachePlan, ScaleSchedule
from amskv_kernels.policies import LeastLoss, Lifetimes, Losses
from amskv_kernels.policies.allocation import allocate
from amskv_kernels.policies.courses import Problem


def random_losses(schedule, layers, heads, seed):
    """Losses of attention that never was, by the definition of `Losses`: two queries' masses and moves."""
    rng = np.random.default_rng(seed)
    steps = len(schedule)
    mass, gram = np.zeros((layers, heads, steps, steps)), np.zeros((layers, heads, steps, steps, steps))
    for step in range(steps):
        mass[:, :, step, : step + 1] = rng.dirichlet(np.ones(step + 1), size=(layers, heads))
        moves = rng.standard_normal((layers, heads, step, 2)) * mass[:, :, step, :step, None]
        moves *= np.exp(rng.standard_normal((layers, heads, 1, 1)))
        gram[:, :, step, :step, :step] = moves @ moves.swapaxes(-1, -2)
    return Losses(schedule.sizes, mass, gram, ((0.0,) * steps,) * layers, 1)


def courses_of(problem):
    """Every course of one row: last reads (K,) with the protected scales read to the end."""
    steps = len(problem.tokens)
    choices = [
        [steps - 1] if scale < problem.protected else [-1, *range(scale + 1, steps)] for scale in range(steps - 1)
    ]
    return [np.array([*course, -1]) for course in itertools.product(*choices)]


def loss_of(problem, row, course):
    total = 0.0
    for step, table in enumerate(problem.tables):
        kept = sum(1 << (s - problem.protected) for s in range(problem.protected, step) if course[s] >= step)
        total += table[kept, row]
    return total


def uses_of(problem, layer_of, courses):
    """Tokens at everything the cap is on, from its words: between steps, or at each (step, layer)."""
    tokens, steps = problem.tokens, len(problem.tokens)
    if not problem.peak:
        return [sum(n for c in courses for s, n in enumerate(tokens) if s < t <= c[s]) for t in range(1, steps)]
    found, heads = [], problem.rows // problem.layers
    for step in range(steps):
        for layer in range(problem.layers):
            live = heads * tokens[step]
            for row, course in enumerate(courses):
                done = layer_of(row) < layer
                for scale in range(step + 1):
                    held = course[scale] > step if done else scale < step <= course[scale]
                    written = layer_of(row) == layer and scale == step and course[scale] > step
                    live += tokens[scale] * (held or written)
            found.append(live)
    return found


def brute_force(problem):
    """The least loss of any allocation."""
    heads = problem.rows // problem.layers
    every = courses_of(problem)
    losses = [[loss_of(problem, row, course) for course in every] for row in range(problem.rows)]
    best = math.inf
    for chosen in itertools.product(range(len(every)), repeat=problem.rows):
        loss = sum(losses[row][i] for row, i in enumerate(chosen))
        if loss < best and max(uses_of(problem, lambda row: row // heads, [every[i] for i in chosen])) <= problem.cap:
            best = loss
    return best


@pytest.mark.parametrize("peak", [False, True])
@pytest.mark.parametrize("seed", range(6))
def test_no_allocation_is_better_by_more_than_the_gap(seed, peak):
    schedule = ScaleSchedule([(1, 1), (1, 2), (2, 2), (2, 3)])
    losses = random_losses(schedule, 2, 2 if seed % 2 else 1, seed)
    by, protected = ("head", "layer")[seed % 2], seed % 3 // 2
    tables = losses.of_sets(by, protected)
    rows = tables[0].shape[1]
    problem = Problem(tables, schedule.tokens, protected, rows * (4.5 + 6 * peak - seed / 4), 2, peak)
    found, best = allocate(problem), brute_force(problem)
    heads = rows // 2
    assert max(uses_of(problem, lambda row: row // heads, found.last_read)) <= problem.cap + 1e-6
    assert found.loss == pytest.approx(sum(loss_of(problem, r, c) for r, c in enumerate(found.last_read)))
    assert found.bound <= best * (1 + 1e-9)
    assert best * (1 - 1e-9) <= found.loss <= best * (1 + found.gap + 1e-9)
    assert found.loss <= 1.25 * best


def test_an_integer_program_that_finds_nothing_in_time_is_no_error(monkeypatch):
    schedule = ScaleSchedule([(1, 1), (1, 2), (2, 2), (2, 3)])
    tables = random_losses(schedule, 2, 2, 0).of_sets("head", 0)
    problem = Problem(tables, schedule.tokens, 0, 4 * 4.5, 2, False)
    nothing = SimpleNamespace(x=None, message="node limit")
    monkeypatch.setattr("scipy.optimize.milp", lambda *_, **__: nothing)
    found = allocate(problem)
    assert max(uses_of(problem, lambda row: row // 2, found.last_read)) <= problem.cap + 1e-6
    assert found.bound <= brute_force(problem) <= found.loss * (1 + 1e-9)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_a_plan_keeps_within_its_budget_and_brings_nothing_back(data):
    sides = data.draw(st.lists(st.tuples(st.integers(1, 5), st.integers(1, 5)), min_size=2, max_size=6))
    layers, heads = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))
    schedule = ScaleSchedule(sides)
    losses = random_losses(schedule, layers, heads, data.draw(st.integers(0, 99)))
    by, limit = data.draw(st.sampled_from(["layer", "head"])), data.draw(st.sampled_from(["retained", "peak"]))
    protected = data.draw(st.integers(0, len(schedule) - 1))
    budget = data.draw(st.integers(1, schedule.prefix + max(schedule.tokens)))
    policy = LeastLoss(budget, losses, by, protected, limit)
    try:
        fit = policy.fit
    except ValueError as error:
        assert "protected" in str(error)
        return
    plan = CachePlan.build(schedule, policy, layers, kv_heads=heads)  # refuses what returns
    held = plan.retained_tokens if limit == "retained" else plan.peak_tokens
    assert held <= budget * layers * plan.heads
    assert 0 <= fit.bound <= fit.loss * (1 + 1e-9) + 1e-12
    last = len(schedule) - 1
    for layer in range(layers):
        assert set(range(min(protected, last))) <= set(plan.visible(layer, last))


def test_more_room_never_costs_and_all_of_it_loses_nothing():
    schedule = ScaleSchedule.named("var-256")
    losses = random_losses(schedule, 16, 2, 1)
    budgets = (40, 100, 200, 300, schedule.prefix)
    bounds = [LeastLoss(budget, losses).fit.bound for budget in budgets]
    assert bounds == sorted(bounds, reverse=True) and bounds[-1] == 0
    assert LeastLoss(schedule.prefix, losses).fit.loss == 0
    assert CachePlan.build(schedule, LeastLoss(schedule.prefix, losses), 16, kv_heads=2).lossless
    for budget in budgets[:-1]:
        by_layer, by_head = (LeastLoss(budget, losses, by).fit for by in ("layer", "head"))
        assert by_layer.gap < 0.1 and by_head.gap < 0.1
        assert by_head.bound <= by_layer.bound * (1 + 2e-3)


def test_a_layer_whose_losses_are_larger_keeps_more():
    schedule = ScaleSchedule.named("var-256")
    losses = random_losses(schedule, 4, 2, 3)
    losses.gram[2] *= 1e6
    plan = CachePlan.build(schedule, LeastLoss(120, losses), 4, kv_heads=2)
    rows = [sum(schedule.tokens[s] for s in plan.visible(layer, 9)) for layer in range(4)]
    assert rows[2] == max(rows) > 2 * sorted(rows)[2]


def test_few_layers_come_close_to_the_bound():
    losses = random_losses(ScaleSchedule.named("var-256"), 24, 2, 2)
    assert all(LeastLoss(budget, losses).fit.gap < 0.015 for budget in (60, 100, 250))


def test_many_rows_start_from_the_prices_of_a_part():
    schedule = ScaleSchedule([(1, 1), (2, 2), (3, 3), (4, 4), (6, 6)])
    losses = random_losses(schedule, 24, 8, 5)
    fit = LeastLoss(20, losses, "head").fit
    assert fit.gap < 5e-3


def test_lifetimes_are_written_and_read(tmp_path):
    schedule = ScaleSchedule.named("var-256")
    for by in ("layer", "head"):
        policy = LeastLoss(100, random_losses(schedule, 3, 2, 4), by)
        path = tmp_path / f"{by}.json"
        policy.lifetimes().save(path)
        again = Lifetimes.load(path)
        assert again == policy.lifetimes() and again.alike == (by == "layer")
        one, other = (CachePlan.build(schedule, each, 3, kv_heads=2) for each in (policy, again))
        assert (one.retained == other.retained).all() and one.pages == other.pages
        for message, call in (
            ("made for 3 layers; this model has 4", lambda p=again: CachePlan.build(schedule, p, 4, kv_heads=2)),
            ("was made for maps", lambda p=again: CachePlan.build(ScaleSchedule.named("var-512"), p, 3, kv_heads=2)),
        ):
            with pytest.raises(ValueError, match=message):
                call()
    with pytest.raises(ValueError, match="made for 2 KV heads; this model has 3"):
        CachePlan.build(schedule, again, 3, kv_heads=3)
    (tmp_path / "bad.json").write_text(path.read_text(encoding="utf-8").replace("[[[", "[[[7, "), encoding="utf-8")
    with pytest.raises(ValueError, match=r"policy file .*bad.json is corrupt: reads must be a table \(L, heads, 10\)"):
        Lifetimes.load(tmp_path / "bad.json")
    with pytest.raises(ValueError, match="reads has 1 for scale 1; it must be −1, never, or within 2 … 2"):
        Lifetimes(((1, 1), (2, 2), (3, 3)), (((2, 1, -1),),))


def test_misuse_is_named():
    schedule = ScaleSchedule.named("var-256")
    losses = random_losses(schedule, 3, 2, 0)
    for make, kind, message in (
        (lambda: LeastLoss(0, losses), ValueError, "budget"),
        (lambda: LeastLoss(100, "losses.json"), TypeError, "losses is 'losses.json'; it must be a Losses"),
        (lambda: LeastLoss(100, losses, "row"), ValueError, "by is 'row'; it must be 'layer' or 'head'"),
        (lambda: LeastLoss(100, losses, limit="all"), ValueError, "limit is 'all'; it must be 'retained' or 'peak'"),
        (lambda: LeastLoss(100, losses, protected=10), ValueError, "protected is 10; it must be at most 9"),
        (lambda: LeastLoss(20, losses, protected=4).fit, ValueError, "is 20 tokens; the 4 protected scales.* take 30"),
        (lambda: CachePlan.build(schedule, LeastLoss(99, losses), 4, kv_heads=2), ValueError, "made for 3 layers"),
        (lambda: CachePlan.build(schedule, LeastLoss(99, losses, "head"), 3, kv_heads=4), ValueError, "2 KV heads"),
    ):
        with pytest.raises(kind, match=message):
            make()
    long = ScaleSchedule([(1, 1)] * 17)
    with pytest.raises(ValueError, match="at most 14 may be forgotten, so it must be at least 2"):
        _ = LeastLoss(5, random_losses(long, 1, 1, 0)).fit
