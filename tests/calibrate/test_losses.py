"""The recorder of losses and its file: against attention with the scales left out, in fp64."""

import numpy as np
import pytest
import torch

from amskv_kernels import ScaleSchedule, parse_policy
from amskv_kernels.calibrate import LossRecorder, SimilarityRecorder
from amskv_kernels.cli import plots
from amskv_kernels.models import ConcatKVCache
from amskv_kernels.policies import LeastLoss, Losses

SCHEDULE = ScaleSchedule([(1, 1), (2, 2), (2, 3), (3, 4)])
LAYERS = 2


def calls(seed, batch=2, heads=4, kv_heads=2):
    rng = torch.Generator().manual_seed(seed)
    for step, n in enumerate(SCHEDULE.tokens):
        for layer in range(LAYERS):
            q = torch.randn(batch, n, heads, 64, generator=rng)
            k, v = torch.randn(2, batch, n, kv_heads, 64, generator=rng)
            yield step, layer, q, k, v


def recorded(seeds=(0,), rows=256, **shape):
    recorder = LossRecorder(SCHEDULE, LAYERS, rows=rows)
    for seed in seeds:
        for _, layer, q, k, v in calls(seed, **shape):
            recorder.observe(layer, q, k, v, 0.2)
    return recorder


def attention(q, k, v, dropped):
    """fp64 outputs (B, n, H, D) and masses of each scale, where the scales in `dropped` are left out."""
    group = q.shape[2] // k[0].shape[2]
    keys = [each.double().repeat_interleave(group, dim=2) for each in k]
    values = torch.cat([each.double().repeat_interleave(group, dim=2) for each in v], dim=1)
    logits = [0.2 * torch.einsum("bnhd,bmhd->bhnm", q.double(), each) for each in keys]
    for scale in dropped:
        logits[scale] = torch.full_like(logits[scale], -torch.inf)
    weights = torch.cat(logits, dim=-1).softmax(-1)
    return torch.einsum("bhnm,bmhd->bnhd", weights, values), weights.split([each.shape[1] for each in keys], dim=-1)


def test_a_scale_forgotten_alone_costs_what_leaving_it_out_costs():
    """Where every query pays a scale the same attention, the mean's loss is the loss's mean: one query, no group."""
    schedule = ScaleSchedule([(1, 1)] * 4)
    recorder = LossRecorder(schedule, 1)
    held = []
    rng = torch.Generator().manual_seed(1)
    for step in range(4):
        q, k, v = torch.randn(3, 1, 1, 2, 64, generator=rng)
        held.append((k, v))
        recorder.observe(0, q, k, v, 0.2)
        losses = None
        if step == 3:
            losses = recorder.losses()
            ks, vs = zip(*held, strict=True)
            whole, _ = attention(q, ks, vs, ())
            for dropped in ((0,), (1,), (2,), (0, 1), (0, 2), (1, 2), (0, 1, 2)):
                moved = (attention(q, ks, vs, dropped)[0] - whole).square().sum(-1)[0, 0]
                kept = 7 - sum(1 << scale for scale in dropped)
                table = losses.of_sets("head", 0)[3][kept]
                assert table == pytest.approx(moved.numpy(), rel=1e-4)
                assert losses.of_sets("layer", 0)[3][kept] == pytest.approx(float(moved.sum()), rel=1e-4)
                if len(dropped) == 1:
                    assert losses.alone()[0, :, 3, dropped[0]] == pytest.approx(moved.numpy(), rel=1e-4)


@pytest.mark.parametrize("rows", [1, 5, 256])
def test_means_run_over_queries_groups_and_generations(rows):
    losses = recorded((0, 1), rows).losses()
    mass, gram = np.zeros((LAYERS, 2, 4, 4)), np.zeros((LAYERS, 2, 4, 4, 4))
    for seed in (0, 1):
        held = [[] for _ in range(LAYERS)]
        for step, layer, q, k, v in calls(seed):
            held[layer].append((k, v))
            ks, vs = zip(*held[layer], strict=True)
            out, weights = attention(q, ks, vs, ())
            moves = []
            for scale, own in enumerate(weights):
                share = own.sum(-1)  # [B, H, n]
                mass[layer, :, step, scale] += share.mean((0, 2)).view(2, 2).mean(1).numpy() / 2
                part = torch.einsum("bhnm,bmhd->bnhd", own, vs[scale].double().repeat_interleave(2, dim=2))
                moves.append(share.transpose(1, 2)[..., None] * out - part)
            moved = torch.stack(moves[:-1]) if step else torch.zeros(0, *out.shape)
            products = torch.einsum("sbnhd,tbnhd->hst", moved.double(), moved.double()) / (q.shape[0] * q.shape[1])
            gram[layer, :, step, :step, :step] += products.view(2, 2, step, step).sum(1).numpy() / 2
    np.testing.assert_allclose(losses.mass, mass, atol=1e-6)
    np.testing.assert_allclose(losses.gram, gram, rtol=1e-4, atol=1e-6)
    assert losses.images == 2


def test_similarity_is_the_similarity_recorders():
    other = SimilarityRecorder(SCHEDULE, LAYERS)
    for _, layer, q, k, v in calls(3):
        other.observe(layer, q, k, v, 0.2)
    np.testing.assert_allclose(recorded((3,)).losses().similarity, other.similarity(), rtol=1e-6)


def test_recorder_passes_attention_through_and_keeps_nothing_of_a_generation():
    recorder, plain = LossRecorder(SCHEDULE, LAYERS, ConcatKVCache()), ConcatKVCache()
    for _, layer, q, k, v in calls(0, kv_heads=4):
        out = recorder.attend(layer, q, k, v, 0.2)
        assert torch.equal(out, plain.attend(layer, q, k, v, 0.2))
    assert not any(recorder._held)


def test_file_keeps_what_was_measured(tmp_path):
    losses = recorded().losses("small")
    path = tmp_path / "losses.json"
    losses.save(path)
    again = Losses.load(path)
    np.testing.assert_allclose(again.mass, losses.mass, rtol=1e-4, atol=1e-12)
    np.testing.assert_allclose(again.gram, losses.gram, rtol=1e-4, atol=1e-12)
    assert (again.images, again.model, again.schedule) == (1, "small", SCHEDULE.sizes)
    policy = parse_policy(f"least-loss:40,head@{path}", SCHEDULE, LAYERS)
    assert isinstance(policy, LeastLoss) and policy.by == "head"
    plots.losses(again, tmp_path / "losses.png")
    assert (tmp_path / "losses.png").stat().st_size > 10_000


def test_misuse_and_bad_files_are_named(tmp_path):
    with pytest.raises(ValueError, match="layer is 1; the next call is layer 0 of step 0"):
        LossRecorder(SCHEDULE, LAYERS).observe(1, *torch.randn(3, 1, 1, 2, 64), 1.0)
    with pytest.raises(ValueError, match="no whole generation has been recorded yet"):
        LossRecorder(SCHEDULE, LAYERS).losses()
    with pytest.raises(ValueError, match="no inner attention"):
        LossRecorder(SCHEDULE, LAYERS).attend(0, *torch.randn(3, 1, 1, 2, 64), 1.0)
    broken = LossRecorder(SCHEDULE, LAYERS)
    for step, layer, q, k, v in calls(0):
        if (step, layer) == (2, 1):
            v[:, :, 1] = float("nan")
        broken.observe(layer, q, k, v, 0.2)
    with pytest.raises(ValueError, match="gram holds a number that is not finite: head 1 of layer 1 at step 2"):
        broken.losses()
    path = tmp_path / "losses.json"
    recorded().losses().save(path)
    text = path.read_text(encoding="utf-8")
    for old, new, message in (
        ("amskv-losses-1", "amskv-losses-9", "has format 'amskv-losses-9'; it must be 'amskv-losses-1'"),
        ('"gram":[[[', '"gram":[[[0,', "gram has another size than 2 layers × 2 heads × 10 numbers"),
        ('"mass":[[[1.0', '"mass":[[["1.0"', "mass holds something that is no number"),
        ('"mass":[[[1.0', '"mass":[[[7.0', "mass holds shares of attention outside 0 … 1"),
        ('"images":1', '"images":-1', "images is -1"),
        ('"mass":', '"masses":', "field 'mass' is missing"),
    ):
        bad = tmp_path / "bad.json"
        assert old in text
        bad.write_text(text.replace(old, new), encoding="utf-8")
        with pytest.raises(ValueError, match=message):
            Losses.load(bad)
    for other, layers, message in (
        (ScaleSchedule.named("var-256"), LAYERS, "the losses file was made for maps"),
        (SCHEDULE, 3, "made for 2 layers; this model has 3"),
    ):
        with pytest.raises(ValueError, match=message):
            parse_policy(f"least-loss:50@{path}", other, layers)
    with pytest.raises(ValueError, match="LeastLoss needs losses"):
        parse_policy("least-loss:50", SCHEDULE, LAYERS)
