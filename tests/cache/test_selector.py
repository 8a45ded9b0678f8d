"""Token policies: which tokens they keep, against independent NumPy transcriptions of the published procedures."""

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from amskv_kernels import CachePlan, Full, PagedKVCache, ScaleSchedule
from amskv_kernels.cache.selector import choose
from amskv_kernels.policies import H2O, PyramidKV, Recent, ScaleKV, SnapKV, TokenPolicy
from amskv_kernels.policies.base import Selection

SQUARE = ScaleSchedule([(1, 1), (2, 2), (4, 4), (6, 6), (8, 8), (12, 12)])
WIDE = ScaleSchedule([(1, 1), (2, 3), (4, 7), (5, 9), (8, 13), (10, 17)])
LAYERS, BATCH, HEADS, D = 3, 2, 2, 64


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def grid(h, w):
    """Row and column of the middle of each of 4 × 4 patches, as the released code places them."""
    ph, pw = h // 4, w // 4
    return [(i * ph + (ph - 1) // 2) * w + j * pw + (pw - 1) // 2 for i in range(4) for j in range(4)]


def pooled(score, kernel, how, outside):
    padded = np.concatenate([np.full(kernel // 2, outside), score, np.full(kernel // 2, outside)])
    return np.array([how(padded[i : i + kernel]) for i in range(len(score))])


def released_scores(q_raw, keys, held, size, kernel=5):
    """Released ScaleKV for one sequence and head: q_raw (n, D) of the current map, keys (held + n, D)."""
    window = grid(*size)
    at = [held + i for i in window]
    logits = q_raw[window] @ keys.T / np.sqrt(q_raw.shape[1])
    logits[:, at] = -np.inf
    score = pooled(logits.sum(0), kernel, np.max, -np.inf)
    score[at] = -np.inf
    return score, at


def scalekv_released(q_raw, keys, held, size, cap, kernel=5):
    score, at = released_scores(q_raw, keys, held, size, kernel)
    return sorted([*np.argsort(-score)[: cap - 16], *at])


def scalekv_paper(q, keys, held, size, cap, scale):
    """ScaleKV as its paper tells it."""
    window = grid(*size)
    at = [held + i for i in window]
    score = softmax(q[window] @ keys.T * scale).sum(0)
    score[at] = 0
    score = pooled(score, 5, np.mean, 0)
    score[at] = -np.inf
    return sorted([*np.argsort(-score)[: cap - 16], *at])


def snapkv(q, keys, held, size, cap, scale):
    """SnapKV: the last 16 queries vote."""
    n = size[0] * size[1]
    score = softmax(q[-16:] @ keys.T * scale).sum(0)[: held + n - 16]
    score = pooled(score, 5, np.mean, 0)
    return sorted([*np.argsort(-score)[: cap - 16], *range(held + n - 16, held + n)])


class Unpooled(ScaleKV):
    """Max-pooling makes neighbours tie, and which of them the cut spares is nobody's promise: here nothing ties."""

    @property
    def selection(self):
        return replace(super().selection, kernel=1)


class Simulation:
    """One layer's cache of one sequence and head in NumPy, keys in order; also of H2O's sums."""

    def __init__(self):
        self.keys, self.values, self.sums = np.empty((0, D)), np.empty((0, D)), np.empty(0)

    def step(self, policy, q, raw, k, v, size, cap, scale):
        held = len(self.keys)
        keys, values = np.concatenate([self.keys, k]), np.concatenate([self.values, v])
        self.sums = np.concatenate([self.sums, np.zeros(len(k))]) + softmax(q @ keys.T * scale).sum(0)
        out = softmax(q @ keys.T * scale) @ values
        if cap is None:
            keep = list(range(len(keys)))
        elif isinstance(policy, ScaleKV) and policy.mode == "released":
            keep = scalekv_released(raw, keys, held, size, cap, policy.selection.kernel)
        elif isinstance(policy, ScaleKV):
            keep = scalekv_paper(q, keys, held, size, cap, scale)
        elif isinstance(policy, H2O):
            recent = len(keys) - round(cap / 2)
            keep = sorted([*np.argsort(-self.sums[:recent])[: cap - round(cap / 2)], *range(recent, len(keys))])
        elif isinstance(policy, Recent):
            keep = [*range(policy.first), *range(len(keys) - cap + policy.first, len(keys))]
        else:
            keep = snapkv(q, keys, held, size, cap, scale)
        self.keys, self.values, self.sums = keys[keep], values[keep], self.sums[keep]
        return out


@pytest.mark.parametrize("schedule", [SQUARE, WIDE], ids=["square", "wide"])
@pytest.mark.parametrize(
    "policy",
    [
        Unpooled(40, drafters=((1,),)),
        ScaleKV(40, "paper", drafters=((0,), (0, 2))),
        SnapKV(40),
        PyramidKV(50),
        H2O(33),
        Recent(30),
        Recent(30, first=4),
    ],
    ids=str,
)
@pytest.mark.parametrize("page_size", [16, None])
def test_generation_equals_the_transcription(schedule, policy, page_size):
    rng = np.random.default_rng(3)
    plan = CachePlan.build(schedule, policy, LAYERS, page_size)
    held = policy.held(schedule, LAYERS)
    cache = PagedKVCache(plan, batch=BATCH, kv_heads=HEADS, head_dim=D, dtype=torch.float32)
    cache.pages.fill_(torch.nan)
    for _ in range(2):  # the second generation finds the first one's leftovers
        simulated = {(i, b, h): Simulation() for i in range(LAYERS) for b in range(BATCH) for h in range(HEADS)}
        for step, n in enumerate(schedule.tokens):
            for layer in range(LAYERS):
                q, k, v, raw = (rng.standard_normal((BATCH, n, HEADS, D)).astype(np.float32) for _ in range(4))
                after = held[step + 1][layer] if step + 1 < len(schedule) else None
                cap = after if after is not None and after < held[step][layer] + n else None
                # A projection by the identity makes any raw queries.
                cache.prepare(layer, torch.from_numpy(raw.reshape(BATCH, n, -1)), torch.eye(HEADS * D))
                out = cache.attend(layer, *(torch.from_numpy(x) for x in (q, k, v)), 0.3)
                for b in range(BATCH):
                    for h in range(HEADS):
                        expected = simulated[layer, b, h].step(
                            policy, q[b, :, h], raw[b, :, h], k[b, :, h], v[b, :, h], schedule.sizes[step], cap, 0.3
                        )
                        np.testing.assert_allclose(out[b, :, h], expected, rtol=2e-4, atol=2e-5)
        cache.reset()


@pytest.mark.parametrize(
    ("size", "held", "cap"), [((8, 8), 57, 40), ((12, 12), 40, 100), ((5, 9), 35, 30), ((16, 16), 265, 256)]
)
def test_released_choice_is_the_transcriptions_index_for_index(size, held, cap):
    rng = np.random.default_rng(0)
    selection, total, compared = ScaleKV(0.1).selection, held + size[0] * size[1], 0
    for _ in range(20):
        raw, keys = rng.standard_normal((total - held, D)), rng.standard_normal((total, D))
        score, _ = released_scores(raw, keys, held, size)
        ordered = np.sort(score)[::-1]
        if cap > 16 and ordered[cap - 17] == ordered[cap - 16]:
            continue  # pooled neighbours tie at the cut
        logits = raw[list(selection.observing(size))] @ keys.T / np.sqrt(D)
        always = torch.tensor(selection.always_kept(size, held, cap))
        keep = choose(torch.from_numpy(logits.sum(0))[None, None].clone(), always, cap, selection)
        assert keep[0, 0].tolist() == scalekv_released(raw, keys, held, size, cap)
        compared += 1
    assert compared >= 3


@pytest.mark.parametrize(("side", "expected"), [(8, [0, 2, 4, 6]), (20, [2, 7, 12, 17]), (5, [0, 1, 2, 3])])
def test_observers_stand_in_the_middle_of_their_patches(side, expected):
    rows = {i // side for i in Selection("grid").observing((side, side))}
    assert sorted(rows) == expected


def test_a_map_with_fewer_than_sixteen_patches_observes_with_what_it_has():
    assert Selection("grid").observing((2, 8)) == (0, 2, 4, 6, 8, 10, 12, 14)
    assert Selection("last").observing((2, 3)) == tuple(range(6))


def test_a_budget_of_everything_is_lossless():
    plan = CachePlan.build(SQUARE, SnapKV(1.0), 2)
    full = CachePlan.build(SQUARE, Full(), 2)
    assert plan.lossless
    assert plan.retained.tolist() == full.retained.tolist()
    assert plan.peak_tokens == full.peak_tokens


def test_released_mode_says_that_it_needs_raw_queries():
    plan = CachePlan.build(SQUARE, ScaleKV(40), 1)
    cache = PagedKVCache(plan, batch=1, kv_heads=1, head_dim=D, dtype=torch.float32)
    with pytest.raises(ValueError, match="call prepare"):
        for n in SQUARE.tokens:
            cache.attend(0, *torch.randn(3, 1, n, 1, D))


@dataclass(frozen=True)
class Counts(TokenPolicy):
    rows: tuple[tuple[int, ...], ...]

    @property
    def selection(self):
        return Selection("none")

    def held(self, schedule, num_layers):
        return self.rows


def test_tokens_that_are_not_there_cannot_be_held():
    with pytest.raises(
        ValueError, match="Counts wants 9 tokens in layer 0 after step 1; it holds 1 and the step brings 4"
    ):
        CachePlan.build(ScaleSchedule([(1, 1), (2, 2), (3, 3)]), Counts(((0,), (1,), (9,))), 1)


@pytest.mark.parametrize("policy", [ScaleKV(60), SnapKV(44), H2O(31), Counts(((0,), (1,), (5,), (0,), (9,), (9,)))])
@pytest.mark.parametrize("page_size", [16, 64])
def test_memory_and_pages_of_a_token_plan(policy, page_size):
    layers = 1 if isinstance(policy, Counts) else 4
    plan, held = CachePlan.build(SQUARE, policy, layers, page_size), policy.held(SQUARE, layers)
    assert plan.retained.tolist() == [sum(row) for row in held[1:]] + [0]
    owner = {}  # page -> layer
    for step in range(len(SQUARE)):
        for layer in range(layers):
            read = {int(s) >> 8: int(s) & 255 for s in plan.read_slots(step, layer)}
            assert sum(read.values()) == held[step][layer] == plan.read_rows(step, layer)
            assert all(owner[page] == layer for page in read)
            at = plan.compaction(step, layer)
            fresh = [int(s) >> 8 for s in (plan.write_slots(step, layer) if at is None else at.slots)]
            assert all(owner.get(page, layer) == layer for page in fresh)
            if at is not None:
                assert not set(fresh) & set(read)
            owner.update(dict.fromkeys(fresh, layer))
            assert plan.live_pages[step, layer] == len(owner) <= plan.pages
            if at is not None or step == len(SQUARE) - 1 or held[step + 1][layer] == 0:
                for page in read:
                    del owner[page]
    assert not owner
    moving = max(
        sum(held[step + 1][:layer] + held[step][layer:])
        + n
        + (held[step + 1][layer] if plan.compaction(step, layer) else 0)
        for step, n in enumerate(SQUARE.tokens[:-1])
        for layer in range(layers)
    )
    assert plan.peak_tokens >= moving


@pytest.mark.parametrize("policy", [ScaleKV(40), ScaleKV(40, "paper"), SnapKV(40), H2O(40), Recent(40)], ids=str)
def test_shapes_are_static_and_nothing_waits_for_the_device(policy):
    """Fake tensors have no values: whatever would read one on the host fails."""
    with FakeTensorMode():
        plan = CachePlan.build(SQUARE, policy, 2, 16)
        cache = PagedKVCache(plan, batch=BATCH, kv_heads=HEADS, head_dim=D, dtype=torch.bfloat16)
        for n in SQUARE.tokens:
            for layer in range(2):
                q, k, v = torch.empty(3, BATCH, n, HEADS, D, dtype=torch.bfloat16)
                cache.prepare(layer, torch.empty(BATCH, n, 9), torch.empty(HEADS * D, 9))
                out = cache.attend(layer, q, k, v)
                assert out.shape == (BATCH, n, HEADS, D)
