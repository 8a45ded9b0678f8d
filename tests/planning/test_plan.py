"""The planner against a brute-force simulation that knows nothing of runs, heaps or lifetimes."""

import re
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from amskv_kernels import AMSKV, CachePlan, Full, Policy, ScaleSchedule, SlidingWindow
from amskv_kernels.planning.layout import PAGE_SIZES, ROWS_BITS, ROWS_MASK
from amskv_kernels.policies.parse import parse_policy
from amskv_kernels.shapes import ModelShape


@dataclass(frozen=True)
class Table(Policy):
    """Any policy at all: deaths[layer][scale] is the last step that reads the scale."""

    deaths: tuple[tuple[int, ...], ...]

    def visible(self, schedule, layer, step):
        return tuple(scale for scale in range(step) if self.deaths[layer][scale] >= step)


@st.composite
def cases(draw):
    steps, layers = draw(st.integers(1, 8)), draw(st.integers(1, 5))
    sizes = [(draw(st.integers(1, 12)), draw(st.integers(1, 12))) for _ in range(steps)]
    # Few distinct deaths, so that runs form; at or before a scale's own step means never read.
    deaths = tuple(tuple(draw(st.integers(0, steps - 1)) for _ in range(steps)) for _ in range(layers))
    return ScaleSchedule(sizes), Table(deaths), layers, draw(st.sampled_from(PAGE_SIZES))


def rows_of(slots):
    return [(int(s) >> ROWS_BITS, int(s) & ROWS_MASK) for s in slots]


@settings(max_examples=150)
@given(cases())
def test_every_read_finds_exactly_the_tokens_written(case):
    schedule, policy, layers, page_size = case
    plan = CachePlan.build(schedule, policy, layers, page_size)
    pool = np.full((plan.pages, page_size), -1, dtype=np.int64)  # token number · layers + layer
    for step, (offset, n) in enumerate(zip(schedule.offsets, schedule.tokens, strict=True)):
        for layer in range(layers):
            found = [pool[page, :rows] for page, rows in rows_of(plan.read_slots(step, layer))]
            expected = [
                np.arange(schedule.offsets[s], schedule.offsets[s] + schedule.tokens[s]) * layers + layer
                for s in policy.visible(schedule, layer, step)
            ]
            assert sorted(np.concatenate([*found, []])) == sorted(np.concatenate([*expected, []]))
            for scale in policy.visible(schedule, layer, step):
                where = [
                    pool[e.page_offset, e.first_row : e.first_row + e.rows] for e in plan.slots_of(layer, step, scale)
                ]
                assert np.array_equal(
                    np.concatenate(where),
                    (schedule.offsets[scale] + np.arange(schedule.tokens[scale])) * layers + layer,
                )
            written = rows_of(plan.write_slots(step, layer))
            assert bool(written) == any(
                step in policy.visible(schedule, layer, later) for later in range(step + 1, len(schedule))
            )
            read = dict(rows_of(plan.read_slots(step, layer)))
            done = n - sum(rows for _, rows in written)
            for i, (page, rows) in enumerate(written):
                first = max(0, -done) if i == 0 else 0
                assert read.get(page, 0) <= first, "a page read in this call is only ever grown"
                pool[page, first:rows] = (offset + np.arange(done + first, done + rows)) * layers + layer
                pool[page, rows:] = -1
                done += rows
            assert not written or done == n


@settings(max_examples=150)
@given(cases())
def test_no_live_page_is_handed_out_twice(case):
    schedule, policy, layers, page_size = case
    plan = CachePlan.build(schedule, policy, layers, page_size)
    for step in range(len(schedule)):
        for layer in range(layers):
            owners = {}
            for other in range(layers):
                now = step if other >= layer else step + 1  # the step this layer attends at next, or is at
                stored = step + 1 if other <= layer else step
                for scale in range(min(stored, len(schedule))):
                    if policy.deaths[other][scale] >= max(now, scale + 1):
                        for extent in plan._tables.extents[other, scale]:
                            assert 0 <= extent.page_offset < plan.pages
                            owner = other, policy.deaths[other][scale]
                            assert owners.setdefault(extent.page_offset, owner) == owner


@settings(max_examples=150)
@given(cases())
def test_memory_is_exact(case):
    schedule, policy, layers, page_size = case
    plan = CachePlan.build(schedule, policy, layers, page_size)
    steps, tokens = len(schedule), schedule.tokens
    deaths = policy.deaths
    retained = [sum(tokens[s] for row in deaths for s in range(step + 1) if row[s] > step) for step in range(steps)]
    assert plan.retained.tolist() == retained
    assert plan.retained_tokens == max(retained)
    peak, most_pages = 0, 0
    for step in range(steps):
        for layer in range(layers):
            groups = {}
            for other, row in enumerate(deaths):
                born = step + 1 if other <= layer else step  # scales this layer has stored by now
                dead = step if other >= layer else step + 1  # the earliest death still live
                for s in range(born):
                    if row[s] > s and row[s] >= dead:
                        groups[other, row[s]] = groups.get((other, row[s]), 0) + tokens[s]
            live = sum(groups.values())
            pages = sum(-(-rows // page_size) for rows in groups.values())
            assert (plan.live[step, layer], plan.live_pages[step, layer]) == (live, pages)
            peak, most_pages = max(peak, live + tokens[step]), max(most_pages, pages)
            assert pages * page_size - live <= len(groups) * (page_size - 1)
    assert plan.peak_tokens == peak
    assert plan.pages == most_pages, "a linear scan over equal pages wastes none"


def test_nothing_is_written_that_is_never_read():
    plan = CachePlan.build(ScaleSchedule.named("var-256"), Full(), 3)
    assert all(plan.write_slots(9, layer).size == 0 for layer in range(3))
    plan = CachePlan.build(ScaleSchedule.named("var-256"), AMSKV(max_scale_tokens=100), 3)
    assert all(plan.write_slots(8, layer).size == 0 for layer in range(3))


def test_full_is_lossless_and_saves_the_last_scale():
    shape = ModelShape.named("var-d30")
    plan = CachePlan.build(shape.schedule, Full(), shape.layers)
    assert plan.retained_tokens == 424 * 30
    assert plan.allocated_tokens <= 1.02 * plan.retained_tokens


def test_condensed_scales_share_a_page():
    plan = CachePlan.build(ScaleSchedule.named("var-256"), AMSKV(), 2, 16)
    first, second = plan.slots_of(0, 9, 0), plan.slots_of(0, 9, 1)
    assert [e.page_offset for e in first] == [e.page_offset for e in second]
    assert (first[0].first_row, first[0].rows, second[0].first_row, second[0].rows) == (0, 1, 1, 4)


@pytest.mark.parametrize(("model", "ratio"), [("var-d30", 1.25), ("infinity-2b", 1.03)])
@pytest.mark.parametrize("percent", [71.29, 75, 78.72, 84.83])
def test_allocation_stays_near_the_tokens_own_bytes(model, ratio, percent):
    shape = ModelShape.named(model)
    policy = AMSKV.for_saving(shape.schedule, shape.layers, percent / 100)
    plan = CachePlan.build(shape.schedule, policy, shape.layers)
    assert plan.allocated_tokens <= ratio * plan.retained_tokens


@pytest.mark.parametrize("percent", [0, 50, 71.29, 75, 78.72, 84.83])
@pytest.mark.parametrize("model", ["var-d30", "var-d36", "infinity-2b"])
def test_the_chosen_page_size_is_the_largest_that_costs_little(model, percent):
    shape = ModelShape.named(model)
    policy = AMSKV.for_saving(shape.schedule, shape.layers, percent / 100) if percent else Full()
    plans = {size: CachePlan.build(shape.schedule, policy, shape.layers, size) for size in PAGE_SIZES}
    chosen = CachePlan.build(shape.schedule, policy, shape.layers).page_size
    tokens, pools = plans[16].retained_tokens, {size: plan.allocated_tokens for size, plan in plans.items()}
    least = min(pools.values())
    cheap = {size for size in PAGE_SIZES if pools[size] <= min(1.02 * least, 1.03 * tokens)}
    assert chosen == max(cheap | {size for size in PAGE_SIZES if pools[size] == least})


@pytest.mark.parametrize(("model", "page_size"), [("var-d30", 16), ("var-d36", 64), ("infinity-2b", 128)])
def test_large_maps_have_large_pages(model, page_size):
    shape = ModelShape.named(model)
    assert CachePlan.build(shape.schedule, Full(), shape.layers).page_size == page_size


@dataclass(frozen=True)
class Fixed(Policy):
    steps: tuple[tuple[int, ...], ...]

    def visible(self, schedule, layer, step):
        return self.steps[step]


@pytest.mark.parametrize(
    ("policy", "arguments", "message"),
    [
        (Fixed(((), (0,), (1,), (0, 1))), {}, "Fixed reads scale 0 in layer 0 at step 3, after having dropped it"),
        (Fixed(((), (), (0,), ())), {}, "reads scale 0 in layer 0 at step 2, after having dropped it"),
        (Fixed(((), (1,), (), ())), {}, "reads scale 1 in layer 0 at step 1; it must be an earlier one, 0 … 0"),
        (Fixed(((), (0,), (1, 0), ())), {}, r"reads scales \(1, 0\) in layer 0 at step 2; they must ascend"),
        (AMSKV(demanding_layers=(5,)), {}, "demanding_layers names layer 5"),
        (Full(), {"page_size": 48}, r"page_size is 48; it must be one of \(16, 32, 64, 128\)"),
        (Full(), {"page_size": 16.0}, "page_size is 16.0; it must be one of"),
        (Full(), {"num_layers": 0}, "num_layers is 0; it must be a whole number ≥ 1"),
        (Full(), {"num_layers": True}, "num_layers is True; it must be a whole number ≥ 1"),
        (Full(), {"kv_heads": 1.5}, "kv_heads is 1.5; it must be a whole number ≥ 1"),
    ],
)
def test_bad_plans_are_refused(policy, arguments, message):
    with pytest.raises(ValueError, match=message):
        CachePlan.build(ScaleSchedule([(1, 1), (2, 2), (3, 3), (4, 4)]), policy, **{"num_layers": 2, **arguments})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([(1, 1)], Full(), 2), r"schedule is \[\(1, 1\)\]; it must be a ScaleSchedule"),
        ((ScaleSchedule([(1, 1)]), "ams-kv:75", 2), "policy is 'ams-kv:75'; it must be a Policy"),
        ((ScaleSchedule([(1, 1)]), Full, 2), "policy is <class .*; it must be a Policy"),
    ],
)
def test_arguments_of_other_types_are_refused(arguments, message):
    with pytest.raises(TypeError, match=message):
        CachePlan.build(*arguments)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda plan: plan.read_slots(-1, 0), "step is -1; it must be within 0 … 9"),
        (lambda plan: plan.write_slots(0, -1), "layer is -1; it must be within 0 … 1"),
        (lambda plan: plan.read_rows(10, 0), "step is 10; it must be within 0 … 9"),
        (lambda plan: plan.compaction(0, 2), "layer is 2; it must be within 0 … 1"),
        (lambda plan: plan.visible(-1, 3), "layer is -1; it must be within 0 … 1"),
        (lambda plan: plan.visible(0, 3, head=1), "head is 1; it must be within 0 … 0"),
        (lambda plan: plan.slots_of(0, -1, 0), "step is -1; it must be within 0 … 9"),
        (lambda plan: plan.slots_of(0, 3, -1), "scale is -1; it must be within 0 … 9"),
    ],
)
def test_nothing_counts_from_the_end(call, message):
    with pytest.raises(IndexError, match=message):
        call(CachePlan.build(ScaleSchedule.named("var-256"), Full(), 2))


@pytest.mark.parametrize("step", [1.0, True, slice(0, 2)])
def test_an_index_must_be_a_whole_number(step):
    plan = CachePlan.build(ScaleSchedule.named("var-256"), Full(), 2)
    with pytest.raises(TypeError, match=rf"step is {re.escape(repr(step))}; it must be a whole number"):
        plan.read_slots(step, 0)
    assert np.array_equal(plan.read_slots(np.int64(3), np.int32(1)), plan.read_slots(3, 1))


@pytest.mark.parametrize("policy", ["full", "ams-kv:75", "ams-kv:84.83", "sink:2,1", "sliding:2"])
def test_a_scale_fills_its_pages_in_order(policy):
    """Full pages after the first, then the rest: what lets a kernel store a scale page by page as it reads it."""
    schedule = ScaleSchedule.named("var-256")
    plan = CachePlan.build(schedule, parse_policy(policy, schedule, 30), 30)
    for step, tokens in enumerate(schedule.tokens):
        for layer in range(30):
            rows = plan.write_slots(step, layer).reshape(-1) & 255
            if rows.sum():
                assert 0 <= rows.sum() - tokens < plan.page_size
                full = np.clip(rows.sum() - plan.page_size * np.arange(len(rows)), 0, plan.page_size)
                assert np.array_equal(rows, full)


def test_a_plan_equals_itself_alone():
    one, other = (CachePlan.build(ScaleSchedule.named("var-256"), Full(), 2) for _ in range(2))
    assert one == one
    assert one != other
    assert len({one, other}) == 2


def test_numpy_integers_count():
    schedule = ScaleSchedule.named("var-256")
    assert repr(CachePlan.build(schedule, Full(), np.int64(2))) == repr(CachePlan.build(schedule, Full(), 2))


def test_a_plan_prints_as_one_line_of_facts():
    plan = CachePlan.build(ScaleSchedule.named("var-256"), Full(), 2, 32)
    assert repr(plan) == (
        f"CachePlan(var-256: 10 steps, 2 layers, {plan.pages} pages of 32 rows, {32 * plan.pages + 256} tokens needed, "
        f"848 retained)"
    )


def test_a_dropped_scale_has_no_slots():
    plan = CachePlan.build(ScaleSchedule.named("var-256"), SlidingWindow(1), 2)
    with pytest.raises(ValueError, match="layer 1 does not hold scale 3 at step 6"):
        plan.slots_of(1, 6, 3)
    assert plan.visible(1, 6) == (5,)


def test_retained_never_exceeds_peak_and_grows_for_full():
    plan = CachePlan.build(ScaleSchedule.named("var-512"), Full(), 2)
    assert all(a <= b for a, b in pairwise(plan.retained[:-1]))
    assert plan.retained[-1] == 0
    assert plan.retained_tokens < plan.peak_tokens
