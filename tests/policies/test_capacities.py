"""AMS-KV's settings: within the budget, nearly all of it spent, and better where losses tell how."""

import pytest
from test_allocation import random_losses

from amskv_kernels import AMSKV, CachePlan, ScaleSchedule, parse_policy
from amskv_kernels.policies import PUBLISHED_SAVINGS, LeastLoss
from amskv_kernels.shapes import ModelShape

VAR_256 = ScaleSchedule.named("var-256")


def unspent(shape, policy, saved):
    plan = CachePlan.build(shape.schedule, policy, shape.layers)
    allowed = min((1 - saved + 5e-5) * shape.schedule.total, shape.schedule.prefix) * shape.layers
    assert plan.retained_tokens <= allowed + 1e-6
    return 1 - plan.retained_tokens / allowed


@pytest.mark.parametrize("model", ModelShape.names())
def test_what_may_be_spent_is_spent(model):
    shape = ModelShape.named(model)
    for percent in sorted({75, 84.83, 90, *PUBLISHED_SAVINGS.get(model, ())}):
        policy = AMSKV.for_saving(shape.schedule, shape.layers, percent / 100)
        assert unspent(shape, policy, percent / 100) <= 0.03, percent


@pytest.mark.parametrize("saved", [0.5, 0.75, 0.8483, 0.9])
def test_losses_choose_within_the_same_budget(saved):
    shape = ModelShape.named("var-d16")
    losses = random_losses(shape.schedule, 16, 2, 0)
    policy = AMSKV.for_saving(shape.schedule, 16, saved, losses=losses)
    assert unspent(shape, policy, saved) <= 0.03
    assert policy.demanding_layers == tuple(sorted(losses.ranking[: len(policy.demanding_layers)]))


def test_losses_choose_the_setting_that_loses_less():
    """One late scale alone is worth keeping: the setting that keeps it is found, whichever it is."""
    for wanted in (7, 8):
        losses = random_losses(VAR_256, 8, 2, 1)
        losses.gram[:] *= 1e-9
        losses.gram[..., wanted, wanted] = 1
        policy = AMSKV.for_saving(VAR_256, 8, 0.7, losses=losses)
        kept = [wanted in policy.visible(VAR_256, layer, 9) for layer in range(8)]
        assert sum(kept) >= 4, "as many layers as can"
        fitted = LeastLoss(204, losses)
        assert all(wanted in fitted.visible(VAR_256, layer, 9) for layer in range(8))


def test_losses_choose_how_many_scales_are_condensed():
    """Where a coarse scale is what queries miss, to the end, it is never dropped."""
    for wanted in (0, 3, 5):
        losses = random_losses(VAR_256, 8, 2, 1)
        losses.gram[:] *= 1e-9
        losses.gram[..., wanted, wanted] = 1
        policy = AMSKV.for_saving(VAR_256, 8, 0.75, losses=losses)
        assert all(
            wanted in policy.visible(VAR_256, layer, step) for layer in range(8) for step in range(wanted + 1, 10)
        )
        assert AMSKV.for_saving(VAR_256, 8, 0.75, losses=losses, condensed=4).condensed == 4


@pytest.mark.parametrize("layers", [8, 30])
def test_without_losses_the_papers_two_scales_are_condensed_or_all_that_fit_beside_the_largest(layers):
    for budget in (100, 170, 254, 424):
        assert AMSKV.for_budget(VAR_256, layers, budget).condensed == 2, budget
    for budget, condensed in ((255, 5), (260, 6), (324, 7), (340, 7), (423, 7)):
        policy = AMSKV.for_budget(VAR_256, layers, budget)
        assert policy.condensed == condensed, budget
        for layer in range(layers):
            assert {*range(condensed), 8} <= set(policy.visible(VAR_256, layer, 9))
            assert all(policy.visible(VAR_256, layer, step) == tuple(range(step)) for step in range(9))
    assert AMSKV.for_budget(VAR_256, layers, 340, condensed=2).condensed == 2


def test_losses_by_string_and_by_mistake(tmp_path):
    losses = random_losses(VAR_256, 8, 2, 2)
    losses.save(tmp_path / "losses.json")
    policy = parse_policy(f"ams-kv:75@{tmp_path / 'losses.json'}", VAR_256, 8)
    assert policy == AMSKV.for_saving(VAR_256, 8, 0.75, losses=losses)
    for make, message in (
        (lambda: AMSKV.for_saving(VAR_256, 6, 0.75, losses=losses), "made for 8 layers; this model has 6"),
        (lambda: AMSKV.for_saving(VAR_256, 8, 0.75, range(8), losses=losses), "ranking and losses both say"),
        (lambda: parse_policy(f"ams-kv:75@{tmp_path / 'losses.json'}", VAR_256, 6), "made for 8 layers"),
    ):
        with pytest.raises(ValueError, match=message):
            make()
