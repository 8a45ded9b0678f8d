import json
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from amskv_kernels import AMSKV, CachePlan, Calibration, Full, ScaleSchedule, Sink, SlidingWindow, parse_policy
from amskv_kernels.policies import PUBLISHED_SAVINGS
from amskv_kernels.shapes import ModelShape

VAR_256 = ScaleSchedule.named("var-256")


def tokens(schedule, scales):
    return sum(schedule.tokens[scale] for scale in scales)


def test_whole_scale_policies_on_var_256():
    assert Full().visible(VAR_256, 0, 9) == tuple(range(9))
    assert SlidingWindow(2).visible(VAR_256, 0, 9) == (7, 8)
    assert SlidingWindow(2).visible(VAR_256, 0, 1) == (0,)
    assert Sink(1, 2).visible(VAR_256, 0, 9) == (0, 7, 8)
    policy = AMSKV(demanding_layers=(1,))
    assert policy.visible(VAR_256, 0, 9) == (0, 1, 8)
    assert policy.visible(VAR_256, 1, 9) == (0, 1, 6, 7, 8)
    assert policy.visible(VAR_256, 0, 2) == (0, 1)


@pytest.mark.parametrize(("local", "expected"), [(1, 174), (2, 274), (3, 338)])
def test_static_form_has_the_derived_token_counts(local, expected):
    assert tokens(VAR_256, AMSKV(local=local).visible(VAR_256, 0, 9)) == expected


def test_scales_too_large_are_skipped():
    policy = AMSKV(local=1, max_scale_tokens=100)
    assert policy.visible(VAR_256, 0, 9) == (0, 1, 7)
    assert policy.visible(VAR_256, 0, 8) == (0, 1, 7)


def algorithm_1(schedule, c_min, c_max, condensed, similarity, theta, steps, size):
    """AMS-KV's Algorithm 1, transcribed on its own; `size` measures a scale."""
    budget, cache = c_min, []
    for i in range(steps):
        if size(i) > c_max:
            continue
        if sum(map(size, cache)) + size(i) > budget:
            if budget == c_min and similarity[i] < theta:
                budget = c_max
            fixed = sum(size(s) for s in cache if s < condensed)
            if fixed + size(i) > budget:
                continue
            while sum(map(size, cache)) + size(i) > budget:
                cache.remove(min(s for s in cache if s >= condensed))
        cache.append(i)
    return tuple(cache)


@given(
    st.integers(20, 400),
    st.integers(0, 500),
    st.lists(st.floats(-10, 0), min_size=10, max_size=10),
    st.floats(-10, 0),
    st.sampled_from(["tokens", "scales"]),
)
def test_capacity_form_is_algorithm_1(low, extra, similarity, theta, unit):
    if unit == "scales":
        low, extra = 3 + low % 5, extra % 4

        def size(scale):
            return 1
    else:

        def size(scale):
            return VAR_256.tokens[scale]

    policy = AMSKV.with_capacity(low, low + extra, unit, similarity=[similarity], theta=theta)
    for step in range(10):
        expected = algorithm_1(VAR_256, low, low + extra, 2, similarity, theta, step, size)
        assert policy.visible(VAR_256, 0, step) == expected


def test_demanding_layers_start_with_the_larger_capacity():
    policy = AMSKV.with_capacity(105, 174, demanding_layers=(1,))
    assert policy.visible(VAR_256, 0, 9) == (0, 1, 7)
    assert policy.visible(VAR_256, 1, 9) == (0, 1, 8)


@pytest.mark.parametrize(("model", "percent"), [(m, p) for m, ps in PUBLISHED_SAVINGS.items() for p in ps])
def test_published_savings_are_reached(model, percent):
    shape = ModelShape.named(model)
    policy = parse_policy(f"ams-kv:{percent}", shape.schedule, shape.layers)
    plan = CachePlan.build(shape.schedule, policy, shape.layers)
    saved = 1 - plan.retained_tokens / shape.layers / shape.schedule.total
    assert saved >= percent / 100 - 5e-5
    assert percent < 40 or saved < percent / 100 + 0.025, "spends most of what the percentage allows"


@given(st.floats(0.38, 0.98), st.integers(1, 40))
def test_any_saving_is_reached_by_a_policy_that_never_brings_a_scale_back(saved, layers):
    policy = AMSKV.for_saving(VAR_256, layers, saved)
    plan = CachePlan.build(VAR_256, policy, layers, 16)
    assert plan.retained_tokens <= (1 - saved + 5e-5) * 680 * layers


def test_for_saving_takes_the_ranking():
    policy = AMSKV.for_saving(VAR_256, 8, 0.75, ranking=[7, 6, 5, 4, 3, 2, 1, 0])
    count = len(policy.demanding_layers)
    assert count > 0
    assert policy.demanding_layers == tuple(range(8 - count, 8))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SlidingWindow(0), "local is 0; it must be a whole number ≥ 1"),
        (lambda: Sink(0, 1), "condensed is 0; it must be a whole number ≥ 1"),
        (lambda: AMSKV(condensed=-1), "condensed is -1"),
        (lambda: AMSKV(local=3, demanding_local=2), "demanding_local is 2; it must be at least local, which is 3"),
        (lambda: AMSKV(demanding_layers=(1, 1)), "no layer may stand in it twice"),
        (lambda: AMSKV(demanding_layers=(-1,)), "each of demanding_layers is -1"),
        (lambda: AMSKV(demanding_layers=3), "demanding_layers is 3; it must be a sequence of layer numbers"),
        (lambda: AMSKV(max_scale_tokens=0), "max_scale_tokens is 0"),
        (lambda: AMSKV.with_capacity(100, 50), "c_max is 50; it must be at least c_min, which is 100"),
        (lambda: AMSKV.with_capacity(1, 2, unit="pages"), "unit is 'pages'; it must be 'tokens' or 'scales'"),
        (lambda: AMSKV.with_capacity(1, 2, theta=0.5), "similarity and theta decide together"),
        (lambda: AMSKV.with_capacity(4, 9).visible(VAR_256, 0, 5), "cannot hold the 2 condensed scales"),
        (lambda: AMSKV.for_saving(VAR_256, 4, 0.999), "saved is 0.9990; with 2 condensed scales"),
        (lambda: AMSKV.for_saving(VAR_256, 4, 0.0), "saved is 0.0000"),
        (lambda: AMSKV.for_saving(VAR_256, 1.5, 0.5), "num_layers is 1.5; it must be a whole number ≥ 1"),
        (lambda: AMSKV.for_saving(VAR_256, 0, 0.5), "num_layers is 0; it must be a whole number ≥ 1"),
        (lambda: AMSKV.with_capacity(9, 9, demanding_layers=3), "demanding_layers is 3; it must be a sequence"),
        (lambda: AMSKV.for_saving(VAR_256, 2, 0.5, ranking=[0, 0]), r"it must name each of the layers 0 … 1 once"),
        (lambda: AMSKV(demanding_layers=(4,)).check_layers(4), "names layer 4; this model has layers 0 … 3"),
        (
            lambda: AMSKV.with_capacity(9, 9, similarity=[[0.0] * 10], theta=0.0).check_layers(2),
            "similarity has 1 layers; this model has 2",
        ),
        (lambda: parse_policy("magic:4", VAR_256, 4), "policy 'magic:4' is not known; known: full"),
        (lambda: parse_policy("ams-kv:75@nowhere.json", VAR_256, 4), "calibration nowhere.json cannot be read"),
    ],
)
def test_bad_settings_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AMSKV.for_saving("var-256", 4, 0.5), "schedule is 'var-256'; it must be a ScaleSchedule"),
        (lambda: AMSKV.for_saving(VAR_256, 4, "0.75"), "saved is '0.75'; it must be a number"),
    ],
)
def test_settings_of_another_type_are_named(make, message):
    with pytest.raises(TypeError, match=message):
        make()


def test_numpy_numbers_are_numbers():
    assert AMSKV.for_saving(VAR_256, np.int64(4), np.float32(0.75)) == AMSKV.for_saving(VAR_256, 4, 0.75)


AMSKV_FORM = "ams-kv:SAVED | ams-kv:SAVED@CALIBRATION.json"
RECENT_FORM = "recent:KEPT | recent:KEPT,FIRST"
SCALEKV_FORM = "scalekv:KEPT | scalekv:KEPT,paper | scalekv:KEPT@ASI.json"


@pytest.mark.parametrize(
    ("text", "reason", "form"),
    [
        ("ams-kv:lots", "SAVED is 'lots'; it must be a percentage above 0 and at most 100", AMSKV_FORM),
        ("ams-kv:-5", "SAVED is '-5'; it must be a percentage", AMSKV_FORM),
        ("ams-kv:nan", "SAVED is 'nan'; it must be a percentage", AMSKV_FORM),
        ("ams-kv: 75", "SAVED is ' 75'; it must be a percentage", AMSKV_FORM),
        ("ams-kv", "the number of arguments is 0; it must be 1", AMSKV_FORM),
        ("ams-kv:75@", "no file is named after @", AMSKV_FORM),
        ("h2o:1_0", "KEPT is '1_0'; it must be a percentage above 0 and at most 100", "h2o:KEPT"),
        ("snapkv:101", "KEPT is '101'; it must be a percentage above 0 and at most 100", "snapkv:KEPT"),
        ("full:", "an argument is empty", "full"),
        ("full:4", "the number of arguments is 1; it must be 0", "full"),
        ("full@x.json", "this policy takes no file", "full"),
        ("sliding:2@", "this policy takes no file", "sliding:LOCAL"),
        ("sliding:0", "LOCAL is '0'; it must be a whole number ≥ 1", "sliding:LOCAL"),
        ("sliding:٣", "LOCAL is '٣'; it must be a whole number ≥ 1", "sliding:LOCAL"),
        ("sink:1", "the number of arguments is 1; it must be 2", "sink:CONDENSED,LOCAL"),
        ("sink:1,2,3", "the number of arguments is 3; it must be 2", "sink:CONDENSED,LOCAL"),
        ("sink:1, 2", "LOCAL is ' 2'; it must be a whole number ≥ 1", "sink:CONDENSED,LOCAL"),
        ("recent:10,", "an argument is empty", RECENT_FORM),
        ("recent:10,4,4", "the number of arguments is 3; it must be 1 or 2", RECENT_FORM),
        ("recent:10,x", "FIRST is 'x'; it must be a whole number ≥ 0", RECENT_FORM),
        ("scalekv:10,", "an argument is empty", SCALEKV_FORM),
        ("scalekv:10,fast", "the mode is 'fast'; it must be 'released' or 'paper'", SCALEKV_FORM),
        ("heatkv:10@", "no file is named after @", "heatkv:KEPT@ORDERS.json"),
    ],
)
def test_a_malformed_policy_is_quoted_with_its_form(text, reason, form):
    with pytest.raises(ValueError, match=re.escape(f"policy {text!r}: {reason}")) as caught:
        parse_policy(text, VAR_256, 4)
    assert str(caught.value).endswith(f"; write {form}")


def test_a_policy_to_parse_must_be_text():
    with pytest.raises(TypeError, match="policy is 75; it must be a str"):
        parse_policy(75, VAR_256, 4)


def calibration(layers=4):
    table = tuple((0.0, *(-float(layer + scale) for scale in range(1, 10))) for layer in range(layers))
    return Calibration(VAR_256.sizes, table, (2, 3), -6.0, 8, "test")


def test_calibration_round_trips_and_ranks(tmp_path):
    saved = calibration()
    saved.save(tmp_path / "c.json")
    loaded = Calibration.load(tmp_path / "c.json")
    assert loaded == saved
    assert loaded.ranking == (3, 2, 1, 0)
    policy = parse_policy(f"ams-kv:75@{tmp_path / 'c.json'}", VAR_256, 4)
    assert policy.demanding_layers == tuple(sorted(loaded.ranking[: len(policy.demanding_layers)])) != ()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda raw: raw.pop("theta"), "field 'theta' is missing"),
        (lambda raw: raw.update(format="other"), "has format 'other'; it must be 'amskv-similarity-1'"),
        (lambda raw: raw["similarity"][1].pop(), "similarity must have 10 entries"),
        (lambda raw: raw["similarity"][1].append("x"), "similarity is 'x'; it must be a number"),
        (lambda raw: raw.update(similarity=[[float("nan")] * 10]), "not finite"),
        (lambda raw: raw.update(demanding_layers=[9]), "demanding_layers names layer 9"),
        (lambda raw: raw.update(schedule=[[1, 0]]), r"sizes\[0\] is \(1, 0\)"),
    ],
)
def test_corrupt_calibrations_are_named(tmp_path, change, message):
    path = tmp_path / "c.json"
    calibration().save(path)
    raw = json.loads(path.read_text())
    change(raw)
    path.write_text(json.dumps(raw))
    with pytest.raises(ValueError, match=message) as caught:
        Calibration.load(path)
    assert str(path) in str(caught.value)


def test_truncated_calibration_is_named(tmp_path):
    path = tmp_path / "c.json"
    calibration().save(path)
    path.write_text(path.read_text()[:100])
    with pytest.raises(ValueError, match="cannot be read"):
        Calibration.load(path)


def test_calibration_for_another_model_is_refused():
    with pytest.raises(ValueError, match="made for 4 layers; this model has 5"):
        calibration().check_fits(VAR_256, 5)
    with pytest.raises(ValueError, match=r"made for maps 1×1 2×2 .* this schedule has 1×1"):
        calibration().check_fits(ScaleSchedule.named("var-512"), 4)
