"""What recorders make of a step before the maps, and of sequences that leave: as attention over everything says."""

import pytest
import torch

from amskv_kernels import ScaleSchedule
from amskv_kernels.calibrate import AttentionRecorder, LossRecorder, SimilarityRecorder

MAPS = ScaleSchedule([(1, 1), (2, 2), (3, 2)])
LAYERS, HEADS, KV_HEADS, PREFIX = 2, 4, 2, 5


def calls(prefix, leave_at=None, seed=0):
    """(step, layer) → q, k, v of four sequences, of two from a step on."""
    rng = torch.Generator().manual_seed(seed)
    steps = ([(-1, PREFIX)] if prefix else []) + list(enumerate(MAPS.tokens))
    return {
        (step, layer): tuple(
            torch.randn(2 if leave_at is not None and step >= leave_at else 4, n, heads, 64, generator=rng)
            for heads in (HEADS, KV_HEADS, KV_HEADS)
        )
        for step, n in steps
        for layer in range(LAYERS)
    }


def weights(found, step, layer):
    """Attention (B, H, n, N) of one call to all keys of its layer so far, and how many tokens each step has."""
    q = found[step, layer][0]
    earlier = [found[each][1][: len(q)] for each in sorted(found) if each[1] == layer and each[0] <= step]
    every = torch.cat(earlier, dim=1).repeat_interleave(HEADS // KV_HEADS, dim=2)
    scores = (0.3 * torch.einsum("bnhd,bmhd->bhnm", q, every)).softmax(-1).double()
    return scores, [k.shape[1] for k in earlier]


@pytest.mark.parametrize("prefix", [0, PREFIX])
@pytest.mark.parametrize("leave_at", [None, 1])
def test_scas_and_asi_leave_the_prefix_out_of_the_table_but_not_out_of_the_sum(prefix, leave_at):
    recorder = AttentionRecorder(MAPS, LAYERS, top=2, prefix=prefix)
    found = calls(prefix, leave_at)
    for (_, layer), qkv in found.items():
        recorder.observe(layer, *qkv, 0.3)
    assert recorder.images == 2
    scores = torch.tensor(recorder.scores(), dtype=torch.float64)
    for layer in range(LAYERS):
        for source in range(2):
            mass = 0
            for step in range(source + 1, 3):
                w, sizes = weights(found, step, layer)
                start = sum(sizes[: source + (prefix > 0)])
                mass = mass + w[:2, ..., start : start + MAPS.tokens[source]].sum(-1).mean((0, 2))
            by_head = mass.view(KV_HEADS, -1).mean(1) / (2 - source)
            torch.testing.assert_close(scores[layer, :, source], by_head, rtol=1e-5, atol=1e-7)
        w, sizes = weights(found, 2, layer)
        history, current = w[..., prefix : -sizes[-1]], w[..., -sizes[-1] :]
        asi = current.sum(-1).mean() * history.topk(2).values.sum(-1).mean()
        assert recorder.selectivity()[layer][2] == pytest.approx(float(asi), rel=1e-5)


@pytest.mark.parametrize("prefix", [0, PREFIX])
def test_losses_are_of_forgetting_maps_beside_the_prefix(prefix):
    recorder = LossRecorder(MAPS, LAYERS, prefix=prefix)
    found = calls(prefix, 2)
    for (_, layer), qkv in found.items():
        recorder.observe(layer, *qkv, 0.3)
    losses = recorder.losses()
    for layer in range(LAYERS):
        for step in (1, 2):
            w, sizes = weights(found, step, layer)
            q = found[step, layer][0]
            earlier = [found[each][2][: len(q)] for each in sorted(found) if each[1] == layer and each[0] <= step]
            v = torch.cat(earlier, dim=1).repeat_interleave(HEADS // KV_HEADS, dim=2).double()
            out = torch.einsum("bhnm,bmhd->bhnd", w, v)
            for source in range(step):
                start = sum(sizes[: source + (prefix > 0)])
                at = slice(start, start + MAPS.tokens[source])
                m = w[..., at].sum(-1, keepdim=True)
                moved = m * out - torch.einsum("bhnm,bmhd->bhnd", w[..., at], v[:, at])
                # Query heads of a KV head add up; means over sequences and queries.
                expected = moved.square().sum(-1).mean((0, 2)).view(KV_HEADS, -1).sum(1)
                gram = torch.from_numpy(losses.gram)[layer, :, step, source, source]
                torch.testing.assert_close(gram.double(), expected, rtol=1e-4, atol=1e-7)


def test_similarity_begins_with_the_maps():
    plain, behind = SimilarityRecorder(MAPS, LAYERS), SimilarityRecorder(MAPS, LAYERS, prefix=PREFIX)
    for (step, layer), qkv in calls(PREFIX).items():
        behind.observe(layer, *qkv, 1.0)
        if step >= 0:
            plain.observe(layer, *qkv, 1.0)
    assert behind.similarity() == plain.similarity()


def test_a_prefix_of_other_tokens_is_named():
    recorder = AttentionRecorder(MAPS, LAYERS, prefix=PREFIX)
    with pytest.raises(ValueError, match=r"q has shape \(4, 1, 4, 64\); step -1 takes \(B, 5, heads, D\)"):
        recorder.observe(0, *calls(0)[0, 0], 1.0)
    with pytest.raises(ValueError, match="prefix is -1; it must be a whole number ≥ 0"):
        LossRecorder(MAPS, LAYERS, prefix=-1)
