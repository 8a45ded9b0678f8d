"""Budgets: one spelling that means the same for every policy, beside what the papers mean by their numbers."""

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from amskv_kernels import AMSKV, CachePlan, ScaleSchedule, Share, Tokens, parse_policy
from amskv_kernels.policies import H2O, HeadOrders, HeatKV, PyramidKV, Recent, ScaleKV, SnapKV
from amskv_kernels.policies.budgets import budget_mean, budget_tokens
from amskv_kernels.shapes import ModelShape

VAR_256, LAYERS, HEADS = ScaleSchedule.named("var-256"), 6, 2
INFINITY = ScaleSchedule.named("infinity-1m-1.000")


def orders(schedule=VAR_256):
    scores = np.random.default_rng(0).random((LAYERS, HEADS, len(schedule))).tolist()
    return HeadOrders.from_scores(scores, schedule)


POLICIES = {
    "ams-kv": lambda budget, schedule=VAR_256: AMSKV.for_budget(schedule, LAYERS, budget),
    "scalekv": lambda budget, schedule=VAR_256: ScaleKV(budget),
    "scalekv, paper": lambda budget, schedule=VAR_256: ScaleKV(budget, "paper"),
    "snapkv": lambda budget, schedule=VAR_256: SnapKV(budget),
    "pyramidkv": lambda budget, schedule=VAR_256: PyramidKV(budget),
    "h2o": lambda budget, schedule=VAR_256: H2O(budget),
    "recent": lambda budget, schedule=VAR_256: Recent(budget, 4),
    "heatkv": lambda budget, schedule=VAR_256: HeatKV(budget, orders(schedule)),
}


def held(policy, schedule=VAR_256):
    """Tokens per head and layer between steps, at the widest step."""
    plan = CachePlan.build(schedule, policy, LAYERS, kv_heads=HEADS)
    return plan.retained_tokens / plan.heads / LAYERS


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("share", [0.1, 0.25, 0.5])
@pytest.mark.parametrize("schedule", [VAR_256, INFINITY], ids=["var", "infinity"])
def test_a_share_means_the_same_for_every_policy(name, share, schedule):
    """Of all tokens, never more than it says, and nearly that where tokens are chosen."""
    policy = POLICIES[name](Share(share), schedule)
    assert held(policy, schedule) <= share * schedule.total + 1e-6
    least = 0.6 if name in ("ams-kv", "heatkv") else 0.97
    assert held(policy, schedule) >= least * int(share * schedule.total)


@pytest.mark.parametrize("name", POLICIES)
def test_tokens_mean_the_same_for_every_policy(name):
    assert 0.8 * 170 <= held(POLICIES[name](Tokens(170))) <= 170


@given(st.floats(0.05, 0.99), st.integers(0, 30))
def test_any_budget_of_ams_kv_holds_no_more(kept, seed):
    for budget in (Share(kept), Tokens(max(5, round(kept * 680)))):
        ranking = np.random.default_rng(seed).permutation(LAYERS)
        assert held(AMSKV.for_budget(VAR_256, LAYERS, budget, ranking)) <= budget_mean(budget, VAR_256) + 1e-6


def test_papers_forms_stay_what_they_were():
    assert (budget_tokens(0.1, INFINITY), budget_tokens(10, INFINITY), budget_tokens(0.1, VAR_256)) == (650, 10, 42)
    assert budget_tokens(1.0, VAR_256) == 424
    assert parse_policy("h2o:10", VAR_256, LAYERS) == H2O(0.1)
    assert parse_policy("ams-kv:75", VAR_256, 6) == AMSKV.for_saving(VAR_256, 6, 0.75)


def test_budgets_are_exact():
    assert budget_tokens(Share(0.25), VAR_256) == 170
    assert budget_tokens(Share.saving(0.9), ScaleSchedule([(1, 9), (1, 1)])) == 1  # 1 − 0.9 is below 0.1
    assert budget_tokens(Share(1), VAR_256) == 424 == budget_tokens(Tokens(10**6), VAR_256)
    assert Share.saving(0.75) == Share(0.25)
    assert Share(0.25).saved == 0.75
    assert repr(Tokens(np.int64(3))) == "Tokens(count=3)"


FORMS = ["ams-kv", "scalekv", "snapkv", "pyramidkv", "h2o", "recent"]


@pytest.mark.parametrize("name", FORMS)
def test_three_strings_of_one_budget(name):
    """A quarter of all 680 tokens, said in three ways."""
    kept, saved, tokens = (
        parse_policy(f"{name}@{text}", VAR_256, LAYERS) for text in ("kept=25%", "saved=75%", "tokens=170")
    )
    plans = [CachePlan.build(VAR_256, policy, LAYERS) for policy in (kept, saved, tokens)]
    assert kept == saved
    assert plans[0].retained.tolist() == plans[2].retained.tolist()
    assert plans[0].retained_tokens <= 170 * LAYERS


def test_a_budget_stands_before_further_arguments_and_a_file(tmp_path):
    assert parse_policy("scalekv@kept=30%,paper", VAR_256, 4) == ScaleKV(Share(0.3), "paper")
    assert parse_policy("recent@tokens=50,4", VAR_256, 4) == Recent(Tokens(50), 4)
    orders().save(tmp_path / "o.json")
    policy = parse_policy(f"heatkv@saved=90.5%@{tmp_path / 'o.json'}", VAR_256, LAYERS)
    assert policy.budget == Share.saving(0.905)
    assert held(policy) <= 0.095 * 680


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("h2o@kept=25", "kept is '25'; it must be a percentage with its sign, such as 25%; write h2o:KEPT"),
        ("h2o@kept=", "kept is ''; it must be a percentage with its sign"),
        ("h2o@kept", "the budget is 'kept'; it must be kept=PERCENT%, saved=PERCENT% or tokens=NUMBER"),
        ("h2o@kept=0%", "kept is 0.0; it must be above 0 and at most 1"),
        ("h2o@kept=101%", "kept is 1.01; it must be above 0 and at most 1"),
        ("h2o@saved=100%", "saved is 1.0; it must be at least 0 and below 1"),
        ("h2o@saved=-5%", "saved is '-5%'; it must be a percentage with its sign"),
        ("h2o@tokens=0", "tokens is '0'; it must be a whole number ≥ 1"),
        ("h2o@tokens=12%", "tokens is '12%'; it must be a whole number ≥ 1"),
        ("h2o@tokens=9999999999", "count is 9999999999; it must be at most 2147483647"),
        ("sliding:12345678901", "LOCAL is '12345678901'; it must have at most 10 digits"),
        ("h2o:10@kept=25%", "the budget is given twice, after the colon and after @"),
        ("h2o@kept=25%,4", "the number of arguments is 2; it must be 1"),
        ("h2o@kept=25%,", "an argument is empty"),
        ("h2o@kept=25%@", "this policy takes no file"),
        ("scalekv@kept=25%@", "no file is named after @"),
        ("full@kept=25%", "this policy takes no budget; write full"),
        ("sliding@kept=25%", "this policy takes no budget; write sliding:LOCAL"),
        ("ams-kv@tokens=4", "budget is Tokens(count=4), 4 tokens per layer; it must hold the 5 of 2 condensed scales"),
        ("heatkv@kept=5%", "HeatKV needs a head order"),
    ],
)
def test_a_malformed_budget_is_named(text, message):
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        parse_policy(text, VAR_256, 4)
    assert str(caught.value).startswith(f"policy {text[:200]!r}"[:200])


def test_a_long_policy_is_quoted_in_part():
    with pytest.raises(ValueError, match=r"^policy 'h2o@tokens=9{189}…': tokens is '999.*'; it must have at most 10"):
        parse_policy("h2o@tokens=" + "9" * 5000, VAR_256, 4)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Tokens(0), ValueError, "count is 0; it must be a whole number ≥ 1"),
        (lambda: Tokens(1.0), ValueError, "count is 1.0; it must be a whole number ≥ 1"),
        (lambda: Tokens(10**400), ValueError, "count is 1000.*; it must be at most 2147483647"),
        (lambda: Share(0), ValueError, "kept is 0; it must be above 0 and at most 1"),
        (lambda: Share(float("nan")), ValueError, "kept is nan; it must be above 0"),
        (lambda: Share("25%"), TypeError, "kept is '25%'; it must be a number"),
        (lambda: Share(10**400), ValueError, "kept is 1000.*; it must be a number that a float can hold"),
        (lambda: Share.saving(1), ValueError, "saved is 1; it must be at least 0 and below 1"),
        (lambda: H2O("10%"), ValueError, "budget is '10%'; it must be a whole number"),
        (lambda: budget_mean(Tokens(3), 3), TypeError, "schedule is 3; it must be a ScaleSchedule"),
        (lambda: HeatKV("1", orders()), TypeError, "budget is '1'; it must be a number"),
        (lambda: AMSKV.for_budget(VAR_256, 4, Share(0.001)), ValueError, "it must hold the 5 of 2 condensed scales"),
        (lambda: AMSKV.for_budget(VAR_256, 10**9, Share(0.2)), ValueError, "num_layers is 1000000000; it must be at"),
        (lambda: AMSKV.for_budget(VAR_256, 4, Share(0.2), condensed=9), ValueError, "condensed scales of schedule"),
        (lambda: AMSKV.for_budget(VAR_256, 4, Share(1e-4), condensed=0), ValueError, "must hold the 1 of the smallest"),
        (lambda: AMSKV.for_saving(VAR_256, 4, 1.0, condensed=0), ValueError, "saved is 1.0000; with 0 condensed"),
        (lambda: held(SnapKV(Share(0.01))), ValueError, "budget is 6 tokens per head; it must hold the 16"),
        (lambda: held(HeatKV(Share(0.01), orders())), ValueError, "must hold the 14 tokens of the 3 protected"),
    ],
)
def test_bad_budgets_are_named(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_published_savings_are_what_their_budgets_are():
    """`ams-kv:84.83` and `ams-kv@saved=84.83%` differ by a published percentage's rounding at most."""
    shape = ModelShape.named("var-d30")
    short, plain = (parse_policy(text, shape.schedule, 30) for text in ("ams-kv:75", "ams-kv@saved=75%"))
    assert (short.c_min, short.c_max) == (plain.c_min, plain.c_max)
