"""Budgets of token policies, head by head plans, and the measurements behind both."""

import json
from importlib import resources
from math import ceil

import numpy as np
import pytest
import torch

from amskv_kernels import CachePlan, Full, PagedKVCache, ScaleSchedule, parse_policy
from amskv_kernels.planning.layout import ROWS_MASK
from amskv_kernels.planning.memory import report
from amskv_kernels.policies import H2O, HeadOrders, HeatKV, PyramidKV, Recent, ScaleKV, SnapKV
from amskv_kernels.policies.budgets import budget_tokens
from amskv_kernels.policies.drafters import choose_drafters
from amskv_kernels.policies.tokens import scalekv_budgets
from amskv_kernels.shapes import ModelShape

INFINITY = ScaleSchedule.named("infinity-1m-1.000")
VAR_256 = ScaleSchedule.named("var-256")
RELEASED = json.loads(resources.files("amskv_kernels").joinpath("data/scalekv_budgets.json").read_text())["budgets"]


@pytest.mark.parametrize("model", RELEASED)
def test_the_rule_gives_the_released_budgets(model):
    released, rows = RELEASED[model], 0
    held = ScaleKV(0.10).held(INFINITY, released["layers"])
    for row in released["rows"]:
        now = held[row["scale"] - 1]
        for layer, tokens in enumerate(now):
            kind = "drafter" if layer in row["drafter_layers"] else "refiner"
            assert tokens == row[f"{kind}_tokens"], (model, row["scale"], layer)
        assert sum(now) == 650 * released["layers"]
        rows += 1
    assert rows == 5
    # Nothing is dropped before the prefix exceeds the mean.
    assert held[7] == (521,) * released["layers"]


@pytest.mark.parametrize("mean", [33, 260, 650, 1300])
@pytest.mark.parametrize(("layers", "drafters"), [(32, 2), (40, 3), (8, 1), (7, 6), (5, 0), (5, 5)])
def test_the_rule_spends_the_budget_exactly(mean, layers, drafters):
    for limit in (mean, mean + 1, 3 * mean, 10 * mean):
        large, small = scalekv_budgets(mean, layers, drafters, limit, max(16, mean // 3))
        assert drafters * large + (layers - drafters) * small == mean * layers
        assert min(16, mean) <= small <= mean <= large <= limit


@pytest.mark.parametrize(
    ("share", "tokens"), [(0.2, 1300), (0.1, 650), (0.04, 265), (0.5, 3212), (1.0, 6425), (77, 77)]
)
def test_published_percentages_are_the_published_tokens(share, tokens):
    assert budget_tokens(share, INFINITY) == tokens


def test_paper_mode_takes_delta_from_the_refiners_at_each_scale():
    held = ScaleKV(0.10, "paper").held(INFINITY, 32)
    assert [row[5] for row in held[8:]] == [600, 530, 460, 390, 320]
    assert all(sum(row) <= 650 * 32 for row in held[8:])
    assert ScaleKV(0.10, "paper", refiner=(500, 10)).held(INFINITY, 32)[9][5] == 490


@pytest.mark.parametrize(
    "name", [n for n in ScaleSchedule.names() if n.startswith(("var", "infinity-1m", "infinity-0.06m"))]
)
@pytest.mark.parametrize("make", [ScaleKV, lambda b: ScaleKV(b, "paper"), SnapKV, PyramidKV, H2O, Recent])
def test_any_schedule_holds_the_budget(name, make):
    schedule = ScaleSchedule.named(name)
    for share in (0.1, 0.3, 0.8):
        if (mean := budget_tokens(share, schedule)) < 16:
            continue
        held = make(share).held(schedule, 6)
        for step, row in enumerate(held):
            assert sum(row) <= 6 * mean
            assert all(0 <= tokens <= schedule.offsets[step] for tokens in row)
            if step:
                before, n = held[step - 1], schedule.tokens[step - 1]
                assert all(now <= then + n for now, then in zip(row, before, strict=True))
            if schedule.offsets[step] <= mean:
                assert set(row) == {schedule.offsets[step]}


@pytest.mark.parametrize("policy", [ScaleKV(0.1), SnapKV(0.1), PyramidKV(0.1), H2O(0.1), Recent(0.1, 4)], ids=str)
def test_equal_tokens_per_head_and_layer(policy):
    assert 649.5 * 32 <= CachePlan.build(INFINITY, policy, 32).retained_tokens <= 650 * 32


def test_pyramid_falls_from_the_first_layer_to_the_last():
    last = PyramidKV(0.1).held(INFINITY, 32)[-1]
    assert list(last) == sorted(last, reverse=True)
    assert last[0] > 1200 and last[-1] == 16 + (650 - 16) // 20


def test_scalekv_takes_what_the_paper_says_it_takes():
    shape = ModelShape.named("infinity-2b")
    plan = CachePlan.build(shape.schedule, ScaleKV(0.10), shape.layers)
    memory = report(plan, shape, "scalekv:10", images=8)
    assert memory.retained_at_stock_dtype_mib == 3900
    assert memory.retained_mib == 2600
    assert memory.retained_mib < memory.allocated_mib < memory.peak_mib < 3800
    assert memory.saved_of_prefix == pytest.approx(1 - 650 / 6425)
    assert memory.saved_of_all == pytest.approx(1 - 650 / 10521)


def orders(schedule, layers, heads, seed=0, protected=3):
    scores = np.random.default_rng(seed).random((layers, heads, len(schedule))).tolist()
    return HeadOrders.from_scores(scores, schedule, protected)


@pytest.mark.parametrize(
    ("schedule", "layers", "heads", "budget"),
    [(INFINITY, 6, 4, 0.05), (INFINITY, 5, 3, 0.3), (VAR_256, 4, 2, 0.1), (VAR_256, 8, 3, 1.0)],
)
def test_heatkv_keeps_its_cap_after_every_layer(schedule, layers, heads, budget):
    policy = HeatKV(budget, orders(schedule, layers, heads))
    cap = budget * schedule.prefix * layers * heads
    reads = {
        (layer, head, step): set(policy.visible_to(schedule, layer, head, step))
        for layer in range(layers)
        for head in range(heads)
        for step in range(len(schedule))
    }
    for step in range(len(schedule) - 1):
        prunable = schedule.offsets[step] + schedule.tokens[step]
        protected = sum(schedule.tokens[:3])
        expected = 0 if prunable <= budget * schedule.prefix else ceil(
            layers * heads * (prunable - budget * schedule.prefix) / (prunable - protected)
        )  # fmt: skip
        assert policy.dropped(schedule, step) == min(expected, layers * heads)
        for done in range(layers):
            held = sum(
                schedule.tokens[scale]
                for layer in range(layers)
                for head in range(heads)
                for scale in reads[layer, head, step + 1 if layer <= done else step]
            )
            assert held <= cap + 1e-6, (step, done)
        for scale in range(3, step + 1):
            gone = {(h, la) for la in range(layers) for h in range(heads) if scale not in reads[la, h, step + 1]}
            order, after = policy.orders.orders[scale - 3], min(step + 1, len(schedule) - 2)
            # What goes after the next step may go before the layer's turn at it.
            assert set(order[: policy.dropped(schedule, step)]) <= gone <= set(order[: policy.dropped(schedule, after)])
    assert all({0, 1, 2} & set(range(step)) <= seen for (_, _, step), seen in reads.items())


@pytest.mark.parametrize("page_size", [16, 64, None])
def test_heads_of_a_layer_have_tables_of_their_own(page_size):
    layers, heads, batch = 3, 3, 2
    schedule = ScaleSchedule([(1, 1), (2, 2), (3, 3), (4, 5), (6, 6), (7, 7)])
    policy = HeatKV(0.4, orders(schedule, layers, heads, 1, protected=2))
    plan = CachePlan.build(schedule, policy, layers, page_size, kv_heads=heads)
    assert plan.heads == heads
    assert plan.retained_tokens <= 0.4 * schedule.prefix * layers * heads
    cache = PagedKVCache(plan, batch=batch, kv_heads=heads, head_dim=64, dtype=torch.float32)
    cache.pages.fill_(torch.nan)
    ragged = False
    for _ in range(2):
        past = [[] for _ in range(layers)]
        for step, n in enumerate(schedule.tokens):
            for layer in range(layers):
                q, k, v = torch.randn(3, batch, n, heads, 64)
                out = cache.attend(layer, q, k, v)
                for head in range(heads):
                    visible = policy.visible_to(schedule, layer, head, step)
                    assert plan.visible(layer, step, head) == visible
                    seen = [past[layer][s] for s in visible] + [(k, v)]
                    keys, values = (torch.cat([each[i][:, :, head] for each in seen], 1) for i in (0, 1))
                    expected = torch.nn.functional.scaled_dot_product_attention(q[:, :, head], keys, values)
                    torch.testing.assert_close(out[:, :, head], expected, rtol=1e-5, atol=1e-5)
                ragged |= len({plan.visible(layer, step, head) for head in range(heads)}) > 1
                past[layer].append((k, v))
        cache.reset()
    assert ragged


def test_pages_of_heads_never_clash():
    layers, heads = 4, 3
    plan = CachePlan.build(VAR_256, HeatKV(0.3, orders(VAR_256, layers, heads)), layers, 16, kv_heads=heads)
    pool = np.full((plan.pages, 16), -1)
    for step, n in enumerate(VAR_256.tokens):
        for layer in range(layers):
            read, write = plan.read_slots(step, layer), plan.write_slots(step, layer)
            assert read.shape[0] == write.shape[0] == heads
            for head in range(heads):
                tag = layer * heads + head
                for slot in read[head][read[head] > 0]:
                    assert (pool[slot >> 8, : slot & ROWS_MASK] == tag).all()
                rows = int((read[head] & ROWS_MASK).sum())
                assert rows == sum(VAR_256.tokens[s] for s in plan.visible(layer, step, head))
            for head in range(heads):
                own = write[head][write[head] > 0]
                first = int((own & ROWS_MASK).sum()) - n if len(own) else 0
                for i, slot in enumerate(own):
                    assert (pool[slot >> 8, : first if i == 0 else 0] == layer * heads + head).all()
                    pool[slot >> 8, : slot & ROWS_MASK] = layer * heads + head
    assert plan.slots_of(0, 4, 0, head=2)
    gone = next(h for h in range(heads) for s in range(9) if s not in plan.visible(0, 9, h))
    scale = next(s for s in range(9) if s not in plan.visible(0, 9, gone))
    with pytest.raises(ValueError, match=f"head {gone} of layer 0 does not hold scale {scale} at step 9"):
        plan.slots_of(0, 9, scale, head=gone)


def test_orders_come_in_our_format_and_in_the_released_one(tmp_path):
    made = orders(VAR_256, 3, 2)
    made.save(tmp_path / "ours.json")
    (tmp_path / "bare.json").write_text(json.dumps(made.orders))
    (tmp_path / "wrapped.json").write_text(json.dumps({"orders": made.orders, "metadata": {"seed": 0}}))
    for name in ("ours", "bare", "wrapped"):
        loaded = HeadOrders.load(tmp_path / f"{name}.json")
        assert loaded.orders == made.orders
        policy = parse_policy(f"heatkv:20@{tmp_path / name}.json", VAR_256, 3)
        CachePlan.build(VAR_256, policy, 3, kv_heads=2)
    assert HeadOrders.load(tmp_path / "ours.json").schedule == VAR_256.sizes


def build(policy, schedule=VAR_256, layers=3, heads=2):
    return CachePlan.build(schedule, policy, layers, kv_heads=heads)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: build(SnapKV(12)), "budget is 12 tokens per head; it must hold the 16 that are always kept"),
        (lambda: build(ScaleKV(12)), "budget is 12 tokens per head; it must hold the observation window of 16"),
        (lambda: build(ScaleKV(0.0)), r"budget is 0.0; as a share of the tokens it must be above 0 and at most 1"),
        (lambda: build(H2O(1.5)), "budget is 1.5; as a share"),
        (lambda: build(H2O(0)), "budget is 0; it must be a whole number ≥ 1"),
        (lambda: build(Recent(5, first=5)), "budget is 5 tokens per head; it must hold the 6 that are always kept"),
        (lambda: ScaleKV(mode="new"), "mode is 'new'; it must be 'released' or 'paper'"),
        (lambda: ScaleKV(drafters=()), "drafters is empty"),
        (lambda: ScaleKV(drafters=((1, 1),)), "no layer may stand in it twice"),
        (lambda: build(ScaleKV(drafters=((7,),))), "drafters names layer 7; this model has layers 0 … 2"),
        (lambda: ScaleKV(drafters=[99]), r"drafters\[0\] is 99; it must be a sequence of layer numbers"),
        (lambda: ScaleKV(drafters=99), "drafters is 99; it must be a sequence of tuples of layers"),
        (lambda: H2O(recent=2.0), "recent is 2.0; it must be within 0 … 1"),
        (lambda: HeatKV(0, orders(VAR_256, 3, 2)), "budget is 0; it must be above 0 and at most 1"),
        (lambda: build(HeatKV(0.01, orders(VAR_256, 3, 2))), "must hold the 14 tokens of the 3 protected scales"),
        (lambda: build(HeatKV(0.2, orders(VAR_256, 3, 2)), heads=None), "kv_heads is None; HeatKV treats heads"),
        (lambda: build(HeatKV(0.2, orders(VAR_256, 3, 4))), "has head 3 of layer 2; this model has 3 layers of 2 KV"),
        (lambda: build(HeatKV(0.2, orders(VAR_256, 2, 2))), "has 4 pairs; this model has 3 layers of 2 KV heads"),
        (
            lambda: build(HeatKV(0.2, orders(VAR_256, 3, 2)), ScaleSchedule.named("var-512")),
            "the head order was made for maps 1×1 2×2",
        ),
        (
            lambda: build(HeatKV(0.2, HeadOrders(orders(INFINITY, 3, 2).orders * 2))),
            "the head order covers 18 source scales; schedule var-256 has 9 that are read later",
        ),
        (
            lambda: HeadOrders.from_scores([[[0.0] * 10]], VAR_256, protected=9),
            "protected is 9; schedule var-256 has 9",
        ),
        (lambda: parse_policy("heatkv:10", VAR_256, 3), "HeatKV needs a head order"),
        (lambda: parse_policy("snapkv:0", VAR_256, 3), "KEPT is '0'; it must be a percentage above 0"),
        (lambda: parse_policy("h2o:10@x.json", VAR_256, 3), "policy 'h2o:10@x.json': this policy takes no file"),
        (lambda: parse_policy("scalekv:10@no.json", VAR_256, 3), "ASI calibration no.json cannot be read"),
        (lambda: parse_policy("heatkv:10@no.json", VAR_256, 3), "head order no.json cannot be read"),
        (lambda: build(SnapKV(40)).visible(0, 3), "this plan is of a token policy"),
        (
            lambda: choose_drafters([[0.0, 1.0]], 2),
            "count is 2; there are 1 pairs of a layer and a scale from scale 1 on",
        ),
    ],
)
def test_bad_settings_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("policy", [ScaleKV, SnapKV, PyramidKV, H2O, Recent])
@pytest.mark.parametrize("budget", [-1, None, "0.1", True, float("nan"), -0.5])
def test_a_bad_budget_is_refused_at_once(policy, budget):
    with pytest.raises(ValueError, match=f"budget is {budget!r}; "):
        policy(budget)


def test_heatkv_takes_a_number_and_head_orders():
    with pytest.raises(TypeError, match=r"orders is \[\]; it must be a HeadOrders"):
        HeatKV(0.1, [])
    for budget in ("0.1", True, None):
        with pytest.raises(TypeError, match=f"budget is {budget!r}; it must be a number"):
            HeatKV(budget, orders(VAR_256, 3, 2))


def test_an_empty_head_order_is_named(tmp_path):
    (tmp_path / "o.json").write_text("[]")
    with pytest.raises(ValueError, match=r"head order .*o.json is corrupt: the order is empty"):
        parse_policy(f"heatkv:5@{tmp_path / 'o.json'}", VAR_256, 3)


def test_a_corrupt_head_order_is_named(tmp_path):
    for text in ('{"a": 1}', "[[[1]]]", "[[1]]", '{"orders": [[["x", 0]]]}'):
        (tmp_path / "o.json").write_text(text)
        with pytest.raises(ValueError, match=r"head order .*o.json is corrupt"):
            HeadOrders.load(tmp_path / "o.json")


def test_a_cache_for_other_heads_is_refused():
    plan = build(HeatKV(0.2, orders(VAR_256, 3, 2)))
    with pytest.raises(ValueError, match="kv_heads is 3; this plan was made for 2 KV heads"):
        PagedKVCache(plan, batch=1, kv_heads=3, head_dim=64)


def test_parsed_policies_are_those_named():
    for text, policy in {
        "scalekv:10": ScaleKV(0.1),
        "scalekv:4,paper": ScaleKV(0.04, "paper"),
        "snapkv:10": SnapKV(0.1),
        "pyramidkv:20": PyramidKV(0.2),
        "h2o:50": H2O(0.5),
        "recent:10": Recent(0.1),
        "recent:10,4": Recent(0.1, 4),
    }.items():
        assert parse_policy(text, INFINITY, 32) == policy


def test_full_stays_as_it_was():
    assert CachePlan.build(VAR_256, Full(), 4).lossless
    assert not CachePlan.build(VAR_256, Recent(50), 4).lossless
    assert CachePlan.build(VAR_256, HeatKV(1.0, orders(VAR_256, 3, 2)), 3, kv_heads=2).lossless
