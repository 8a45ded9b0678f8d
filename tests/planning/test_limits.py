"""What a plan refuses before it allocates, and that nobody can change one afterwards."""

import copy
import pickle
import tracemalloc
from dataclasses import FrozenInstanceError, dataclass

import numpy as np
import pytest

from amskv_kernels import CachePlan, Full, Policy, Recent, ScaleSchedule, SnapKV
from amskv_kernels.planning.layout import MOST_PAGES, ROWS_BITS
from amskv_kernels.planning.pages import choose_page_size
from amskv_kernels.policies import HeadPolicy, TokenPolicy
from amskv_kernels.policies.base import Selection

HUGE = ScaleSchedule([(8192, 8192), (1, 1)])  # 67,108,864 tokens that the second scale reads
SMALL = ScaleSchedule([(1, 1), (2, 2), (3, 3)])


@dataclass(frozen=True)
class EveryHead(HeadPolicy):
    def visible_to(self, schedule, layer, head, step):
        return tuple(range(step))

    def check_heads(self, schedule, num_layers, kv_heads):
        pass


@pytest.mark.parametrize(
    ("policy", "layers", "kv_heads"),
    [(Full(), 3, None), (EveryHead(), 1, 3), (SnapKV(HUGE.prefix), 3, None), (Recent(HUGE.prefix - 1), 3, None)],
    ids=["whole scales", "heads", "tokens", "tokens, moving"],
)
def test_more_pages_than_a_slot_can_name_are_refused_before_they_are_allocated(policy, layers, kv_heads):
    tracemalloc.start()
    try:
        with pytest.raises(
            ValueError, match=rf"needs \d+ pages of 16 rows in an arena; .* {MOST_PAGES}, take a larger"
        ):
            CachePlan.build(HUGE, policy, layers, 16, kv_heads)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


def test_a_page_size_that_fits_is_found_and_none_is_refused():
    assert choose_page_size({16: MOST_PAGES + 1, 32: MOST_PAGES // 2 + 1, 64: MOST_PAGES}, 16 * MOST_PAGES) == 32
    with pytest.raises(ValueError, match=r"needs \d+ pages of 128 rows in an arena; a slot can name at most 8388608$"):
        CachePlan.build(HUGE, Full(), 17)


def test_the_last_page_that_a_slot_can_name_is_no_sign_bit():
    assert np.iinfo(np.int32).max >= ((MOST_PAGES - 1) << ROWS_BITS) + 128


@pytest.mark.parametrize("layers", [2**20, 10**9, 10**400, 10**5000], ids=lambda n: f"{n.bit_length()} bits")
@pytest.mark.parametrize("policy", [Full(), SnapKV(16), EveryHead()], ids=["scales", "tokens", "heads"])
def test_no_layer_is_planned_of_too_many(policy, layers):
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=r"num_layers is .*; 3 scales .* entries, and a plan has at most 1048576"):
            CachePlan.build(SMALL, policy, layers, kv_heads=2)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


def arrays_of(plan):
    calls = list(np.ndindex(len(plan.schedule), plan.num_layers))
    moved = [plan.compaction(*call) for call in calls]
    tables = [read(*call) for read in (plan.read_slots, plan.write_slots) for call in calls]
    return [*tables, *(at.slots for at in moved if at), plan.retained, plan.live, plan.live_pages]


@pytest.mark.parametrize("policy", [Full(), EveryHead(), Recent(3)], ids=["scales", "heads", "tokens"])
def test_whatever_a_plan_hands_out_is_read_only(policy):
    made = CachePlan.build(SMALL, policy, 2, 16, kv_heads=2)
    for plan in (made, copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        for array in arrays_of(plan):
            assert not array.flags.writeable
            with pytest.raises(ValueError, match="read-only"):
                array[...] = 7
        with pytest.raises(FrozenInstanceError):
            plan.page_size = 32
        with pytest.raises(AttributeError):
            plan.pages = 9
    with pytest.raises(FrozenInstanceError):
        made.schedule.sizes = ((9, 9),)
    with pytest.raises(FrozenInstanceError):
        Selection("grid").kernel = 3


@dataclass(frozen=True)
class Counts(TokenPolicy):
    rows: object
    chosen: object = Selection("none")

    @property
    def selection(self):
        return self.chosen

    def held(self, schedule, num_layers):
        return self.rows


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (((0, 0), (1, 1)), r"Counts.held gives 2 rows of 2 numbers; it must give 3, one per step, of 2, one per layer"),
        (((0,), (1,), (5,)), "gives 3 rows of 1 numbers; it must give 3, one per step, of 2, one per layer"),
        (((0, 0), (1, 1, 1), (5, 5)), "gives 3 rows of 2 and 3 numbers"),
        ((), "gives 0 rows of  numbers"),
        (None, r"Counts.held gives None; it must be \(3, 2\) numbers"),
        ((1, 2, 3), r"Counts.held gives \(1, 2, 3\); it must be \(3, 2\) numbers"),
        (((0, 0), (1, -1), (5, 5)), "Counts.held of layer 1 at step 1 is -1; it must be a whole number ≥ 0"),
        (((0, 0), (1, 0.5), (5, 5)), "Counts.held of layer 1 at step 1 is 0.5"),
        (((1, 0), (1, 1), (5, 5)), "Counts wants 1 tokens in layer 0 after step -1; it holds 0 and the step brings 0"),
        (((0, 0), (1, 1), (5, 6)), "Counts wants 6 tokens in layer 1 after step 1; it holds 1 and the step brings 4"),
    ],
)
def test_a_token_policy_must_say_how_many_tokens_every_layer_holds(rows, message):
    with pytest.raises(ValueError, match=message):
        CachePlan.build(SMALL, Counts(rows), 2)


def test_a_token_policy_must_say_how_it_chooses():
    with pytest.raises(TypeError, match=r"Counts.selection is 'grid'; it must be a Selection"):
        CachePlan.build(SMALL, Counts(((0,), (1,), (5,)), "grid"), 1)


@dataclass(frozen=True)
class Says(Policy):
    what: object

    def visible(self, schedule, layer, step):
        return self.what if step else ()


@pytest.mark.parametrize(
    ("what", "message"),
    [
        (None, "Says reads scales None in layer 0 at step 1; they must be a tuple"),
        (0, "Says reads scales 0 in layer 0 at step 1; they must be a tuple"),
        ((0.0,), "Says reads scale 0.0 in layer 0 at step 1; it must be an earlier one, 0 … 0"),
        ((-1,), "Says reads scale -1 in layer 0 at step 1"),
        ((10**5000,), "Says reads scale an integer of 16610 bits in layer 0"),
    ],
    ids=["None", "a number", "a float", "from the end", "of 5000 digits"],
)
def test_a_policy_must_name_earlier_scales(what, message):
    with pytest.raises(ValueError, match=message):
        CachePlan.build(SMALL, Says(what), 1)


def test_numpy_scales_count():
    plan = CachePlan.build(SMALL, Says((np.int64(0),)), 1)
    assert plan.visible(0, 2) == (0,)
