"""ASI and S-CAS by their definitions, and the drafters that follow."""

import json

import pytest
import torch

from amskv_kernels import ScaleSchedule, parse_policy
from amskv_kernels.calibrate import AttentionRecorder
from amskv_kernels.models import ConcatKVCache
from amskv_kernels.policies import Drafters, HeadOrders
from amskv_kernels.policies.drafters import choose_drafters

SMALL = ScaleSchedule([(1, 1), (2, 2), (3, 2), (4, 4)])


def generation(recorder, seed, layers, heads=4, kv_heads=2, batch=4):
    """Drives a recorder; returns every call's attention weights (B, H, n, N), from its own keys."""
    rng, keys, found = torch.Generator().manual_seed(seed), [[] for _ in range(layers)], []
    recorder.inner = ConcatKVCache()
    for n in SMALL.tokens:
        for layer in range(layers):
            q = 3 * torch.randn(batch, n, heads, 64, generator=rng)
            k = torch.randn(batch, n, kv_heads, 64, generator=rng)
            keys[layer].append(k)
            recorder.observe(layer, q, k, k, 0.1)
            every = torch.cat(keys[layer], 1).repeat_interleave(heads // kv_heads, 2)
            found.append((0.1 * torch.einsum("bnhd,bmhd->bhnm", q, every)).softmax(-1).double())
    return found


@pytest.mark.parametrize("rows", [3, 1024])
@pytest.mark.parametrize("half", [None, "conditional", "both"])
def test_asi_and_scas_are_their_definitions(rows, half):
    layers, heads, top = 3, 4, 2
    recorder = AttentionRecorder(SMALL, layers, top=top, rows=rows, **({} if half is None else {"half": half}))
    heard = 4 if half == "both" else 2  # the first half of a guided batch has the prompts
    runs = [generation(recorder, seed, layers) for seed in range(2)]
    asi, scas = recorder.selectivity(), torch.tensor(recorder.scores(), dtype=torch.float64)
    assert scas.shape == (layers, 2, len(SMALL))
    for layer in range(layers):
        for step in range(1, len(SMALL)):
            calls = [run[step * layers + layer] for run in runs]
            history = SMALL.offsets[step]
            current = torch.stack([w[..., history:].sum(-1).mean() for w in calls]).mean()
            strong = torch.stack([w[..., :history].topk(min(top, history)).values.sum(-1).mean() for w in calls]).mean()
            assert asi[layer][step] == pytest.approx(float(current * strong), rel=1e-5)
        assert asi[layer][0] == 0
        for source in range(len(SMALL) - 1):
            a, b = SMALL.offsets[source], SMALL.offsets[source + 1]
            later = range(source + 1, len(SMALL))
            mass = sum(run[t * layers + layer][:heard, ..., a:b].sum(-1).mean((0, 2)) for run in runs for t in later)
            by_kv_head = mass.view(2, heads // 2).mean(1) / (len(runs) * len(later))
            torch.testing.assert_close(scas[layer, :, source], by_kv_head, rtol=1e-5, atol=1e-7)
    assert recorder.images == 4
    orders = recorder.orders(protected=1)
    assert len(orders.orders) == 2 and orders.half == (half or "conditional")


def test_one_sequence_is_measured_whatever_half_it_is():
    recorder = AttentionRecorder(SMALL, 1)
    generation(recorder, 0, 1, batch=1)
    assert sum(map(sum, recorder.scores()[0])) > 0


def test_orders_say_whose_attention_they_are(tmp_path):
    recorder = AttentionRecorder(SMALL, 2, half="both")
    generation(recorder, 0, 2)
    recorder.orders(1).save(tmp_path / "orders.json")
    assert HeadOrders.load(tmp_path / "orders.json").half == "both"
    (tmp_path / "released.json").write_text("[[[0, 0]]]", encoding="utf-8")
    assert HeadOrders.load(tmp_path / "released.json").half is None
    for make in (lambda: AttentionRecorder(SMALL, 2, half="left"), lambda: HeadOrders([[[0, 0]]], half="left")):
        with pytest.raises(ValueError, match="half is 'left'; it must be 'conditional' or 'both'"):
            make()


def test_drafters_are_the_lowest_standing_within_each_scale():
    # Layer 2 stands out at scale 1, layer 0 at scale 3; scale 2 has by far the lowest values but no spread.
    table = [[0, 5.0, 0.1, 1.0], [0, 5.1, 0.1, 4.0], [0, 1.0, 0.1, 4.1], [0, 5.2, 0.1, 4.2]]
    assert choose_drafters(table, 2) == ((), (2,), (), (0,))
    assert sum(map(len, choose_drafters(table))) == 3
    assert choose_drafters(table, 2, first=2) in (((), (), (0,), (0,)), ((), (), (1,), (0,)), ((), (), (), (0, 1)))
    assert choose_drafters(table, first=4) == ((), (), (), ())
    assert choose_drafters(table, 0) == ((), (), (), ())


def drafters():
    recorder = AttentionRecorder(SMALL, 3, top=4)
    generation(recorder, 0, 3)
    return recorder.drafters(2, "test")


def test_drafters_round_trip_and_serve(tmp_path):
    made = drafters()
    made.save(tmp_path / "asi.json")
    assert Drafters.load(tmp_path / "asi.json") == made
    policy = parse_policy(f"scalekv:90@{tmp_path / 'asi.json'}", SMALL, 3)
    assert policy.drafters == made.layers
    for step in range(len(SMALL)):
        assert policy.drafters_at(SMALL, 3, step) == made.layers[step]
    with pytest.raises(ValueError, match="the ASI calibration was made for 3 layers; this model has 4"):
        parse_policy(f"scalekv:90@{tmp_path / 'asi.json'}", SMALL, 4)
    with pytest.raises(ValueError, match=r"made for maps 1×1 2×2 3×2 4×4; this schedule has"):
        parse_policy(f"scalekv:90@{tmp_path / 'asi.json'}", ScaleSchedule.named("var-256"), 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda raw: raw.pop("top"), "field 'top' is missing"),
        (lambda raw: raw.update(layers=[[]]), "layers has 1 entries; it must have 4, one per scale"),
        (lambda raw: raw["layers"].__setitem__(0, [9]), "layers names layer 9"),
        (lambda raw: raw["selectivity"][0].pop(), "selectivity must have 4 entries"),
        (lambda raw: raw.update(format="x"), "has format 'x'; it must be 'amskv-asi-1'"),
    ],
)
def test_corrupt_drafters_are_named(tmp_path, change, message):
    path = tmp_path / "asi.json"
    drafters().save(path)
    raw = json.loads(path.read_text())
    change(raw)
    path.write_text(json.dumps(raw))
    with pytest.raises(ValueError, match=message):
        Drafters.load(path)


def test_a_recorder_says_what_is_wrong():
    recorder = AttentionRecorder(SMALL, 2)
    q = torch.randn(1, 1, 2, 64)
    for call, message in (
        (lambda: recorder.observe(1, q, q, q, 1.0), "layer is 1; the next call is layer 0 of step 0"),
        (lambda: recorder.attend(0, q, q, q, 1.0), "no inner attention"),
        (recorder.scores, "no whole generation has been recorded yet"),
        (lambda: AttentionRecorder(SMALL, 2, top=0), "top is 0; it must be a whole number ≥ 1"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
