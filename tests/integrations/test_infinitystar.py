"""InfinityStar through `patch`: video, grouped heads, a text first, repeated scales, a rule of what may be seen."""

import checks
import public_star
import pytest
import torch

from amskv_kernels import AMSKV, H2O, CachePlan, Full, HeatKV, ScaleSchedule, SlidingWindow, patch
from amskv_kernels.models.infinitystar import references, video_schedule
from amskv_kernels.policies import HeadOrders, Visible
from amskv_kernels.policies.around import Around

MAPS = ScaleSchedule(public_star.SIZES)
RULE = Visible(tuple(map(tuple, references(MAPS))))


def make(kind=public_star.InfinityStar):
    torch.manual_seed(7)
    return kind().eval()


CASE = checks.Case(
    make, lambda model: model.draw(), lambda model: [block.attn for block in model.unregistered_blocks],
    lambda model: list(model.unregistered_blocks), Around(MAPS, rule=RULE),
)  # fmt: skip


def test_full_is_stock_and_stores_what_is_read_later_alone():
    assert checks.full_is_stock(CASE) < 1e-5
    model = make()
    with patch(model, Full()) as patched:
        model.draw()
        plan = patched.plan
    text, image, clip = public_star.TEXT, MAPS.tokens[2], MAPS.tokens[5]
    assert plan.schedule.tokens == (text, *MAPS.tokens) and plan.heads == 1
    stored = {step for step in range(len(plan.schedule)) if plan.write_slots(step, 0).size}
    assert stored == {0, 3, 6}  # the text, and the largest of the image and of the first clip
    assert plan.visible(0, 9) == (0, 6) and plan.visible(0, 5) == (0, 3)
    assert plan.retained_tokens == 3 * (text + max(image, clip))


def test_policies_show_no_more_than_the_rule(monkeypatch):
    model, layers = make(), 3
    stock = model.draw()
    for policy in (SlidingWindow(1), SlidingWindow(2), AMSKV(condensed=0, local=1, demanding_layers=(1,))):
        with patch(model, policy):
            got = model.draw()
        for layer in range(layers):
            attention = model.unregistered_blocks[layer].attn
            monkeypatch.setattr(attention, "sees", lambda scale, at=(policy, layer): at[0].visible(MAPS, at[1], scale))
        expected = model.draw()
        monkeypatch.undo()
        assert checks.difference(expected, stock) > 1e-3
        assert checks.difference(got, expected) < 1e-5


def test_undo_copies_and_graphs():
    checks.undo_leaves_nothing(CASE)
    checks.copies_are_their_own(CASE)
    few = checks.compiled_graphs(CASE)
    assert few <= 24
    public_star.InfinityStar.depth = 5
    try:
        assert checks.compiled_graphs(CASE) == few
    finally:
        public_star.InfinityStar.depth = 3


def test_heads_and_eight_bits_and_observers():
    model, seen = make(), []
    expected = model.draw()
    with patch(model, Full(), pages="int8", observe=lambda *call: seen.append(call)):
        assert 0 < checks.difference(model.draw(), expected) < 0.02
    assert {(q.shape[2], k.shape[2], v.shape[2]) for _, q, k, v, _ in seen} == {(4, 2, 2)}
    scores = torch.rand(3, 2, len(MAPS), generator=torch.Generator().manual_seed(0)).tolist()
    with patch(model, HeatKV(0.2, HeadOrders.from_scores(scores, ScaleSchedule(MAPS.sizes), 1))) as patched:
        with pytest.raises(ValueError, match="the head order was made for images; schedule custom has frames"):
            model.draw()
        assert patched.plan is None


def test_what_a_video_cannot_have_is_named():
    model = make()
    for policy, kind, message in (
        (H2O(6), TypeError, "this model has a rule of which scales it sees, and none of tokens"),
        (AMSKV(demanding_layers=(9,)), ValueError, "demanding_layers names layer 9"),
    ):
        with pytest.raises(kind, match=message), patch(model, policy):
            model.draw()
    with pytest.raises(ValueError, match="online is True; what an InfinityStar may look at is its own rule"):
        patch(model, AMSKV.with_capacity(9, 40), online=True, theta=0.0)
    with pytest.raises(ValueError, match="H2O chooses tokens of images; schedule custom has frames"):
        CachePlan.build(MAPS, H2O(6), 2)
    model.further = "semantic_condition"
    with (
        patch(model, Full()),
        pytest.raises(ValueError, match="scale_ind is 'semantic_condition'; the coming step is of"),
    ):
        model.draw()
    attention = model.unregistered_blocks[0].attn
    with (
        patch(model, Full()),
        torch.no_grad(),
        pytest.raises(ValueError, match="scale_ind is 0; a generation begins with"),
    ):
        attention.kv_caching(True)
        attention(torch.randn(1, 1, 256), None, None, torch.zeros(2, 1, 1, 1, 1, 32), MAPS.sizes, 0, {})


def test_a_model_that_is_split_over_devices_is_refused(monkeypatch):
    class Manager:
        @staticmethod
        def sp_on():
            return True

    monkeypatch.setattr(public_star, "sp_manager", Manager, raising=False)
    with pytest.raises(ValueError, match="sequence parallelism is on; a patched attention has all tokens"):
        patch(make(), Full())


def test_published_schedules():
    five, ten = video_schedule("480p", 5), video_schedule("720p", 10)
    assert five.sizes[-1] == (30, 53) and len(five) == 28 and set(five.frames) == {1, 20}
    assert ten.sizes[-1] == (45, 80) and len(ten) == 45
    assert references(five)[13] == [] and references(five)[14] == references(five)[27] == [13]
    assert references(ten)[44] == [29]
    assert video_schedule("480p", 0).still and not five.still
    for arguments, message in (
        (("1080p", 5), "resolution is '1080p'; it must be one of"),
        (("480p", 7), "seconds is 7; clips have 5 seconds each"),
    ):
        with pytest.raises(ValueError, match=message):
            video_schedule(*arguments)


def test_a_rule_is_a_policy_of_its_own():
    plan = CachePlan.build(MAPS, RULE, 2)
    assert plan.visible(1, 5) == (2,) and plan.visible(1, 2) == ()
    for table, message in (
        (3, "table is 3; it must be the scales that each step reads"),
        (((), (0,)), "table has 2 steps; schedule custom has 9"),
        ((*RULE.table[:-1], (1,)), "after having dropped it"),
        (((), "a"), r"table\[1\] is 'a'; it must be a sequence of layer numbers"),
    ):
        with pytest.raises(ValueError, match=message):
            CachePlan.build(MAPS, Visible(table), 2)
