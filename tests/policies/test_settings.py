"""Settings that no policy, selection or measurement may have, each named once; and what policies remember."""

from dataclasses import replace

import pytest

from amskv_kernels import AMSKV, CachePlan, Calibration, ScaleSchedule, parse_policy
from amskv_kernels.cache import OnlineKVCache
from amskv_kernels.policies import Drafters, HeadOrders, ScaleKV, Selection
from amskv_kernels.policies.base import MOST_LAYERS
from amskv_kernels.policies.drafters import choose_drafters

VAR_256, VAR_512 = ScaleSchedule.named("var-256"), ScaleSchedule.named("var-512")
NAN, HUGE = float("nan"), 10**400
TABLE = tuple((0.0, *(-float(layer + scale) for scale in range(1, 10))) for layer in range(3))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"observers": "some"}, "observers is 'some'; it must be one of 'grid', 'last', 'all', 'none'"),
        ({"observers": None}, "observers is None; it must be one of"),
        ({"observers": ["grid"]}, r"observers is \['grid'\]; it must be one of"),
        ({"window": 0}, "window is 0; it must be a whole number ≥ 1"),
        ({"window": 1.5}, "window is 1.5; it must be a whole number ≥ 1"),
        ({"score": "max"}, "score is 'max'; it must be one of 'softmax', 'sum_logits'"),
        ({"pool": "median"}, "pool is 'median'; it must be one of None, 'max', 'mean'"),
        ({"pool": False}, "pool is False; it must be one of None"),
        ({"kernel": 4}, "kernel is 4; it must be odd"),
        ({"kernel": -5}, "kernel is -5; it must be a whole number ≥ 1"),
        ({"kernel": HUGE}, "kernel is 1000.*; it must be at most 1048575"),
        ({"raw_queries": 1}, "raw_queries is 1; it must be one of False, True"),
        ({"accumulate": "yes"}, "accumulate is 'yes'; it must be one of False, True"),
        ({"accumulate": True}, "accumulate adds up what every query pays: observers must be 'all'"),
        ({"observers": "all", "accumulate": True, "raw_queries": True}, "accumulate adds up what every query pays"),
        ({"recent": -5}, "recent is -5; it must be within 0 … 1"),
        ({"recent": NAN}, "recent is nan; it must be within 0 … 1"),
        ({"observers": "none", "recent": 0.5}, "recent is not 0 where nothing is scored"),
        ({"first": -1}, "first is -1; it must be a whole number ≥ 0"),
    ],
)
def test_every_field_of_a_selection_is_checked(fields, message):
    with pytest.raises(ValueError, match=message):
        Selection(**{"observers": "grid"} | fields)


def test_a_share_of_a_selection_must_be_a_number():
    with pytest.raises(TypeError, match=r"recent is '0.5'; it must be a number"):
        Selection("all", recent="0.5")


def test_first_and_recent_tokens_stay_beside_observers():
    """Sixteen observers of an 8 × 8 map, the first two keys, and the last tenth of forty."""
    kept = Selection("grid", first=2, recent=0.1).always_kept((8, 8), 10, 40)
    assert {0, 1, 70, 71, 72, 73} < set(kept)
    assert len(kept) == len({*Selection("grid").always_kept((8, 8), 10, 40), 0, 1, 70, 71, 72, 73})
    with pytest.raises(ValueError, match="a budget of 17 tokens cannot hold the tokens that are always kept"):
        Selection("grid", first=2).always_kept((8, 8), 10, 17)
    with pytest.raises(ValueError, match="a budget of 3 tokens cannot hold"):
        Selection("none", first=2**30).always_kept((8, 8), 10, 3)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: AMSKV.for_saving(VAR_256, 4, 0.75, ranking=3), ValueError, "ranking is 3; it must be a sequence of"),
        (lambda: AMSKV.for_saving(VAR_256, 2, 0.75, ranking=["a", 1]), ValueError, "each of ranking is 'a'"),
        (lambda: AMSKV.for_saving(VAR_256, 2, 0.75, ranking="01"), ValueError, "ranking is '01'; it must be a seq"),
        (lambda: AMSKV.for_saving(VAR_256, 2, 0.75, ranking=[0, 9]), ValueError, "each of the layers 0 … 1 once"),
        (
            lambda: AMSKV.for_saving(VAR_256, 10**9, 0.75),
            ValueError,
            f"num_layers .*; .* most {MOST_LAYERS}",
        ),
        (lambda: AMSKV.for_saving(VAR_256, 4, HUGE), ValueError, "saved is 1000.*; it must be a number that a float"),
        (lambda: AMSKV.for_saving(VAR_256, 4, 0.5, condensed=HUGE), ValueError, "with 1000.* condensed scales"),
        (lambda: AMSKV(demanding_layers=(HUGE,)).check_layers(4), ValueError, "demanding_layers names layer 1000"),
        (lambda: AMSKV.with_capacity(9, 9, similarity=3, theta=0.0), TypeError, "similarity is 3; it must be a table"),
        (lambda: AMSKV.with_capacity(9, 9, similarity=[3], theta=0.0), TypeError, "similarity has a row 3; it must be"),
        (lambda: AMSKV.with_capacity(9, 9, similarity=[["a"]], theta=0.0), TypeError, "similarity is 'a'; it must be"),
        (
            lambda: AMSKV.with_capacity(9, 9, similarity=[[NAN]], theta=0.0),
            ValueError,
            "similarity holds a number that",
        ),
        (lambda: AMSKV.with_capacity(9, 9, similarity=[[0.0]], theta=NAN), ValueError, "theta is nan; it must be a"),
        (lambda: AMSKV.with_capacity(9, 9, similarity=[[0.0]], theta="x"), TypeError, "theta is 'x'; it must be a num"),
        (lambda: AMSKV.with_capacity(9, 9, unit=["tokens"]), ValueError, r"unit is \['tokens'\]; it must be 'tokens'"),
        (lambda: AMSKV.with_capacity(HUGE, 9), ValueError, "c_max is 9; it must be at least c_min, which is 1000"),
        (lambda: ScaleKV(refiner=3), ValueError, "refiner is 3; it must be two numbers, B_r"),
        (lambda: ScaleKV(refiner=(1, 2, 3)), ValueError, r"refiner is \(1, 2, 3\); it must be two numbers"),
        (lambda: ScaleKV(refiner=(0, 2)), ValueError, r"refiner\[0\] is 0; it must be a whole number ≥ 1"),
        (lambda: ScaleKV(refiner=(5, -2)), ValueError, r"refiner\[1\] is -2; it must be a whole number ≥ 0"),
        (lambda: ScaleKV(mode=["paper"]), ValueError, r"mode is \['paper'\]; it must be 'released'"),
        (
            lambda: CachePlan.build(VAR_256, ScaleKV(40, "paper", refiner=(41, 1)), 4),
            ValueError,
            "refiner starts at 41 tokens; it must be at most the mean, which is 40",
        ),
        (lambda: choose_drafters([[0.0, NAN]]), ValueError, "selectivity holds a number that is not finite"),
        (lambda: choose_drafters([[0.0, 1.0], [0.0]]), ValueError, "selectivity must have 2 entries"),
        (lambda: choose_drafters(3), TypeError, "selectivity is 3; it must be a table"),
    ],
)
def test_bad_settings_are_named(make, error, message):
    with pytest.raises(error, match=message):
        make()


CALIBRATION = {"schedule": VAR_256.sizes, "similarity": TABLE, "demanding_layers": (1,), "theta": -3.0, "images": 4}
DRAFTERS = {"schedule": VAR_256.sizes, "selectivity": TABLE, "layers": ((0,),) * 10, "top": 16, "images": 4}
ORDERS = {"orders": (((0, 0), (0, 1)),), "schedule": VAR_256.sizes, "images": 4}


@pytest.mark.parametrize(
    ("kind", "good", "bad", "error", "message"),
    [
        (Calibration, CALIBRATION, {"similarity": ((NAN,) * 10,)}, ValueError, "similarity holds a number that is not"),
        (Calibration, CALIBRATION, {"similarity": ((0.0,) * 9,)}, ValueError, "similarity must have 10 entries"),
        (Calibration, CALIBRATION, {"similarity": None}, TypeError, "similarity is None; it must be a table"),
        (Calibration, CALIBRATION, {"demanding_layers": (3,)}, ValueError, "demanding_layers names layer 3"),
        (Calibration, CALIBRATION, {"theta": NAN}, ValueError, "theta is nan; it must be finite"),
        (Calibration, CALIBRATION, {"theta": "low"}, TypeError, "theta is 'low'; it must be a number"),
        (Calibration, CALIBRATION, {"images": -5}, ValueError, "images is -5; it must be a whole number ≥ 0"),
        (Calibration, CALIBRATION, {"model": 3}, TypeError, "model is 3; it must be a str"),
        (Calibration, CALIBRATION, {"schedule": None}, TypeError, "sizes is None; it must be a sequence of"),
        (Drafters, DRAFTERS, {"selectivity": ((float("inf"),) * 10,)}, ValueError, "selectivity holds a number that"),
        (Drafters, DRAFTERS, {"layers": 3}, TypeError, "layers is 3; it must be a sequence of layers"),
        (Drafters, DRAFTERS, {"layers": ((0,),)}, ValueError, "layers has 1 entries; it must have 10"),
        (Drafters, DRAFTERS, {"layers": ((3,),) * 10}, ValueError, "layers names layer 3"),
        (Drafters, DRAFTERS, {"top": 100000}, ValueError, "top is 100000; it must be below 424, the longest history"),
        (Drafters, DRAFTERS, {"top": 0}, ValueError, "top is 0; it must be a whole number ≥ 1"),
        (Drafters, DRAFTERS, {"images": -5}, ValueError, "images is -5; it must be a whole number ≥ 0"),
        (HeadOrders, ORDERS, {"orders": ()}, ValueError, "the order is empty"),
        (HeadOrders, ORDERS, {"orders": ((),)}, ValueError, "the order is empty"),
        (HeadOrders, ORDERS, {"orders": 3}, TypeError, r"orders is 3; it must be \[head, layer\] pairs"),
        (HeadOrders, ORDERS, {"orders": (((0, 0, 0),),)}, ValueError, r"orders\[0\] has \(0, 0, 0\); each must be"),
        (HeadOrders, ORDERS, {"orders": (((0, -1),),)}, ValueError, "layer is -1; it must be a whole number ≥ 0"),
        (HeadOrders, ORDERS, {"images": -5}, ValueError, "images is -5; it must be a whole number ≥ 0"),
    ],
)
def test_measurements_are_checked_when_they_are_made(kind, good, bad, error, message):
    kind(**good)
    with pytest.raises(error, match=message):
        kind(**good | bad)


@pytest.mark.parametrize(
    ("scores", "error", "message"),
    [
        ([[[NAN] * 10]], ValueError, r"scores\[0\] holds a number that is not finite"),
        ([[[0.0] * 9]], ValueError, r"scores\[0\] must have 10 entries"),
        ([[[0.0] * 10], [[0.0] * 10] * 2], ValueError, "scores has layers of different head counts"),
        ([], ValueError, r"scores is \[\]; it must be a table of numbers"),
        (None, ValueError, "scores is None; it must be a table of numbers"),
        ([3], TypeError, r"scores\[0\] is 3; it must be a table"),
    ],
)
def test_scas_must_be_a_table_of_finite_numbers(scores, error, message):
    with pytest.raises(error, match=message):
        HeadOrders.from_scores(scores, VAR_256)


def test_measurements_cannot_be_changed_by_whoever_made_them():
    table = [list(row) for row in TABLE]
    made = Calibration(**CALIBRATION | {"similarity": table, "demanding_layers": [1]})
    table[0][1] = 7.0
    assert made == Calibration(**CALIBRATION)
    assert hash(made)


MADE = {
    "saving": AMSKV.for_saving(VAR_256, 36, 0.8483),
    "string": parse_policy("ams-kv:84.83", VAR_256, 36),
    "budget": parse_policy("ams-kv@kept=20%", VAR_256, 36),
    "replaced": replace(AMSKV.for_saving(VAR_256, 36, 0.8483), condensed=1),
    "measured": ScaleKV(0.1, drafters=Drafters(**DRAFTERS | {"selectivity": TABLE * 12})),
}


@pytest.mark.parametrize("name", MADE)
def test_a_policy_serves_the_model_it_was_made_for_alone(name):
    policy = MADE[name]
    CachePlan.build(VAR_256, policy, 36)
    with pytest.raises(ValueError, match=r"the policy was made for maps 1×1 2×2 .* this schedule has 1×1"):
        CachePlan.build(VAR_512, policy, 36)
    for check in (lambda: CachePlan.build(VAR_256, policy, 30), lambda: policy.check_layers(30)):
        with pytest.raises(ValueError, match="the policy was made for 36 layers; this model has 30"):
            check()
    same = ScaleSchedule(VAR_256.sizes, "another name")
    assert CachePlan.build(same, policy, 36).retained_tokens == CachePlan.build(VAR_256, policy, 36).retained_tokens


def test_the_online_mode_too_refuses_a_policy_made_for_another_model():
    with pytest.raises(ValueError, match="the policy was made for maps"):
        OnlineKVCache(VAR_512, 36, MADE["saving"], 0.0, batch=1, kv_heads=1, head_dim=64)


def test_a_similarity_must_cover_every_scale():
    policy = AMSKV.with_capacity(105, 274, similarity=TABLE, theta=-3.0)
    CachePlan.build(VAR_256, policy, 3)
    with pytest.raises(ValueError, match="similarity has 10 scales; this schedule has 5"):
        CachePlan.build(ScaleSchedule([(1, 1), (2, 2), (3, 3), (4, 4), (5, 5)]), policy, 3)
    with pytest.raises(ValueError, match="similarity has 3 layers; this model has 4"):
        CachePlan.build(VAR_256, policy, 4)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((None,), TypeError, "sizes is None; it must be a sequence"),
        (([],), ValueError, "sizes is empty"),
        (([(1, 1), None],), TypeError, r"sizes\[1\] is None; it must be two positive integers"),
        (([(8.0, 8)],), ValueError, r"sizes\[0\] is \(8.0, 8\); it must be two positive integers"),
        (([(HUGE, 1)],), ValueError, "sizes has 1000.* tokens; a schedule has at most 2147483647"),
        (([(10**5000, 1)],), ValueError, "sizes has an integer of 16610 bits tokens"),
        (([(2**16, 2**15)],), ValueError, "sizes has 2147483648 tokens"),
        ((((1, 1) for _ in iter(int, 1)),), ValueError, "sizes has more than 1024 scales"),
        (([(1, 1)], 3), TypeError, "name is 3; it must be a str"),
    ],
    ids=range(9),
)
def test_schedules_are_checked_before_anything_is_made_of_them(arguments, error, message):
    with pytest.raises(error, match=message):
        ScaleSchedule(*arguments)
    assert ScaleSchedule.named("var-256").sizes[0] == (1, 1)


@pytest.mark.parametrize("name", [None, 3, ["var-256"], "x" * 1000])
def test_a_schedule_of_no_name_is_refused(name):
    with pytest.raises(ValueError, match=r"schedule .{1,40} is not a published one; known: var-256"):
        ScaleSchedule.named(name)
