"""What a plan asks of the pool: replayed step by step against the plan's own tables."""

import numpy as np
import pytest

from amskv_kernels import CachePlan, ScaleSchedule, parse_policy
from amskv_kernels.planning.layout import ROWS_BITS, ROWS_MASK
from amskv_kernels.serving.units import PlanUnits, remapped

LAYERS, HEADS = 5, 3
SCHEDULE = ScaleSchedule([(1, 1), (2, 2), (3, 3), (4, 5), (6, 6), (8, 8)])
POLICIES = ("full", "sliding:1", "sink:2,1", "ams-kv:60", "ams-kv:84.83")


def built(policy: str) -> CachePlan:
    return CachePlan.build(SCHEDULE, parse_policy(policy, SCHEDULE, LAYERS), LAYERS, 16, HEADS)


@pytest.mark.parametrize("policy", POLICIES)
def test_what_a_call_reads_is_held_since_it_was_written(policy):
    plan = built(policy)
    units = PlanUnits(plan)
    held: set[int] = set()
    rows = {}  # page → rows that some call has written since the page was last taken
    for k, step in enumerate(units.steps):
        assert held == set(step.carried)
        fresh = set(step.fresh)
        assert not held & fresh
        for page in fresh:
            rows.pop(page, None)
        held |= fresh
        for layer in range(LAYERS):
            for slot in plan.read_slots(k, layer):
                assert slot >> ROWS_BITS in held
                assert rows[slot >> ROWS_BITS] >= slot & ROWS_MASK
            for slot in plan.write_slots(k, layer):
                assert slot >> ROWS_BITS in held
                rows[slot >> ROWS_BITS] = slot & ROWS_MASK
        held -= set(step.released)
    assert not held, "nothing is held after the last step"


@pytest.mark.parametrize("policy", POLICIES)
def test_the_curve_is_the_plans_own_count(policy):
    plan = built(policy)
    curve = PlanUnits(plan).curve
    assert (curve >= plan.live_pages.max(1)).all()
    assert curve.max() == plan.pages


def test_tables_name_the_units_of_their_own_sequence():
    plan = built("sink:2,1")
    units, rng = PlanUnits(plan), np.random.default_rng(5)
    maps = np.stack([rng.permutation(200)[: plan.pages] for _ in range(4)]).astype(np.int32)
    for k, step in enumerate(units.steps):
        for slots, of in ((step.read, plan.read_slots), (step.write, plan.write_slots)):
            found = remapped(slots, maps)
            assert found.dtype == np.int32 and found.shape == (LAYERS, 4, 1, slots.shape[2])
            for layer in range(LAYERS):
                for n in range(4):
                    want = [maps[n, slot >> ROWS_BITS] << ROWS_BITS | slot & ROWS_MASK for slot in of(k, layer)]
                    assert found[layer, n, 0].tolist() == want + [0] * (slots.shape[2] - len(want))


def test_a_token_policy_is_refused():
    plan = CachePlan.build(SCHEDULE, parse_policy("h2o:25", SCHEDULE, LAYERS), LAYERS)
    with pytest.raises(ValueError, match="token policy; serving runs policies that keep whole scales"):
        PlanUnits(plan)


def test_what_is_no_plan_is_refused():
    with pytest.raises(TypeError, match="plan is 3; it must be a CachePlan"):
        PlanUnits(3)
