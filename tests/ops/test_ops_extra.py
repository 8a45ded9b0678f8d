"""prepare_qk, window_scores and compact on the CPU, against fp64 and against the models' own arithmetic."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
import torch.nn.functional as functional
from attn_cases import Case
from extra_cases import (
    COMPACT_CASES,
    QK_PARTS,
    QK_SHAPES,
    SCORE_CASES,
    make_compact,
    make_qk,
    make_scores,
)

import amskv_kernels
from amskv_kernels import ScaleSchedule
from amskv_kernels.models.rope import rope2d_tables
from amskv_kernels.ops import reference

ops = torch.ops.amskv
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# Half a unit in the last place, and what fp32 leaves before it.
ROUNDING = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
MODES = pytest.mark.parametrize("mode", ["softmax", "sum_logits"])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", QK_SHAPES, ids=str)
@pytest.mark.parametrize("parts", QK_PARTS.values(), ids=QK_PARTS)
def test_prepare_qk_is_the_reference(parts, shape, dtype):
    arguments = make_qk(shape, parts, dtype)
    for x, truth in zip(ops.prepare_qk(**arguments), reference.prepare_qk(**arguments), strict=True):
        assert x.dtype == dtype
        assert x.is_contiguous()
        assert ((x.double() - truth).abs() <= ROUNDING[dtype] * truth.abs() + 2e-6).all()


def test_prepare_qk_is_vars_own_arithmetic():
    """F.normalize in fp32 under autocast, the scale clamped and exponentiated, then one cast."""
    qkv = torch.randn(2, 9, 3, 4, 64).half()
    scale_mul = torch.full((1, 4, 1, 1), 4.0).log() + torch.randn(1, 4, 1, 1)
    q, k, _ = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # B H n D
    scale = scale_mul.clamp_max(math.log(100)).exp()
    q, k = functional.normalize(q.float(), dim=-1).mul(scale), functional.normalize(k.float(), dim=-1)
    for name, apart in (("torch", 0.0), ("auto", 2.0**-10)):  # a native sum of squares may differ in its last place
        with amskv_kernels.backend(name):
            ours = ops.prepare_qk(qkv.flatten(2, 3), 4, scale.flatten(), None, None, True)
        for mine, theirs in zip(ours, (q, k), strict=True):
            torch.testing.assert_close(mine, theirs.half().transpose(1, 2), rtol=apart, atol=0)


def test_rope_is_infinitys_own_arithmetic():
    """Its grid of frequencies, looked up at the scale's positions on the last grid, on interleaved pairs."""
    schedule, scale, head_dim = ScaleSchedule([(1, 1), (3, 5), (8, 14)]), 1, 64
    half = head_dim // 2
    inv_freq = 1.0 / (10000.0 ** (torch.arange(0, half, 2, dtype=torch.int64).float() / half))
    freqs = torch.outer(torch.arange(32), inv_freq)
    grid = torch.cat([freqs[:, None].expand(-1, 32, -1), freqs[None].expand(32, -1, -1)], dim=-1)
    rows = (torch.arange(3) * (8 / 3)).round().int()
    columns = (torch.arange(5) * (14 / 5)).round().int()
    at = grid[rows[:, None], columns[None]].reshape(15, half)
    qkv = torch.randn(1, 15, 12, head_dim)
    q, k, _ = qkv.split(4, dim=2)
    expected = []
    for x in (functional.normalize(q, dim=-1, eps=1e-12), functional.normalize(k, dim=-1, eps=1e-12)):
        pairs = x.transpose(1, 2).reshape(1, 4, 15, half, 2)
        cos, sin = at.cos(), at.sin()
        turned = [cos * pairs[..., 0] - sin * pairs[..., 1], sin * pairs[..., 0] + cos * pairs[..., 1]]
        expected.append(torch.stack(turned, dim=-1).flatten(-2).transpose(1, 2))
    cos, sin = rope2d_tables(schedule, scale, head_dim)
    ours = ops.prepare_qk(qkv, 4, None, cos, sin, True)
    for mine, theirs in zip(ours, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-7)


def test_rope_tables_name_a_wrong_scale_and_head():
    schedule = ScaleSchedule([(1, 1), (2, 2)])
    with pytest.raises(ValueError, match="scale is 2; schedule custom has scales 0 … 1"):
        rope2d_tables(schedule, 2, 64)
    with pytest.raises(ValueError, match="head_dim is 66; it must be a multiple of 4"):
        rope2d_tables(schedule, 0, 66)


def test_a_zero_row_stays_zero():
    q, k = ops.prepare_qk(torch.zeros(1, 2, 3, 64), 1, None, None, None, True)
    assert (q == 0).all()
    assert (k == 0).all()


@MODES
@pytest.mark.parametrize("case", SCORE_CASES, ids=str)
def test_window_scores_are_the_reference(case, mode):
    arguments = make_scores(case)
    scores, truth = ops.window_scores(*arguments, mode), reference.window_scores(*arguments, mode)
    assert scores.dtype == torch.float32
    assert torch.equal(scores.isneginf(), truth.isneginf())
    torch.testing.assert_close(scores.double(), truth, rtol=1e-5, atol=2e-5)


def test_summed_probabilities_sum_to_the_window():
    case = Case(n=20, history=(16, 5), heads=4, kv_heads=2)
    scores = ops.window_scores(*make_scores(case, window=6), "softmax")
    assert scores.nan_to_num(neginf=0).sum(-1) == pytest.approx(torch.full((2, 2), 12.0), rel=1e-5)


@pytest.mark.parametrize(("case", "kept"), COMPACT_CASES, ids=str)
def test_compact_is_the_reference(case, kept):
    pages, arena, src_slots, k, v, keep, dst_slots = make_compact(case, kept)
    expected = pages.clone()
    reference.compact(expected, arena, src_slots, k, v, keep, dst_slots)
    for indices, name in product((keep, keep.int()), ("auto", "torch")):
        ours = pages.clone()
        with amskv_kernels.backend(name):
            ops.compact(ours, arena, src_slots, k, v, indices, dst_slots)
        assert torch.equal(ours.view(torch.uint8), expected.view(torch.uint8)), "every byte, NaN included"


def test_scores_choose_what_compact_keeps():
    """The two ops count keys alike: keep the best, and attention over the kept rows is attention over those keys."""
    case, kept = Case(n=10, history=(16, 7), heads=2, kv_heads=2), (16, 4)
    pages, arena, src_slots, k, v, _, dst_slots = make_compact(case, kept)
    window = torch.randn(2, 4, 2, 64)
    scores = ops.window_scores(window, k, pages, arena, src_slots, 0.125)
    keep = scores.topk(20).indices.sort().values
    ops.compact(pages, arena, src_slots, k, v, keep, dst_slots)
    chosen = scores.gather(2, keep)
    again = ops.window_scores(window, k[:, :0], pages, arena, dst_slots, 0.125, "sum_logits")
    logits = ops.window_scores(window, k, pages, arena, src_slots, 0.125, "sum_logits").gather(2, keep)
    assert chosen.isfinite().all()
    torch.testing.assert_close(again[~again.isneginf()].view(2, 2, 20), logits)


def prepare_errors():
    qkv, table = torch.zeros(1, 2, 4, 64), torch.zeros(2, 32)
    yield "heads", ValueError, "kv_heads is 2; the 4 heads of qkv", lambda: ops.prepare_qk(qkv, 2)
    yield "one table", ValueError, "cos and sin must be given together", lambda: ops.prepare_qk(qkv, 1, None, table)
    yield "table dtype", TypeError, "cos is torch.float64", lambda: ops.prepare_qk(qkv, 1, None, table.double(), table)
    yield (
        "table shape",
        ValueError,
        r"sin has shape \(3, 32\)",
        lambda: ops.prepare_qk(qkv, 1, None, table, torch.zeros(3, 32)),
    )
    yield (
        "scale shape",
        ValueError,
        r"q_scale has shape \(3\); it must be \(2,\)",
        lambda: ops.prepare_qk(qkv, 1, torch.zeros(3)),
    )
    yield "eps", ValueError, "eps is -1.0", lambda: ops.prepare_qk(qkv, 1, None, None, None, True, -1.0)


def score_errors():
    scores = make_scores(Case(n=3, history=(5,)))
    yield "mode", ValueError, "mode is 'max'", lambda: ops.window_scores(*scores, "max")
    yield "no window", ValueError, "q_window has no queries", lambda: ops.window_scores(scores[0][:, :0], *scores[1:])
    for scale in (1e300, 1e-300):
        yield (
            "scale", ValueError, "finite and above 0, in fp32", lambda s=scale: ops.window_scores(*scores[:5], s)
        )  # fmt: skip
    yield (
        "window dtype",
        TypeError,
        "q_window is torch.float16",
        lambda: ops.window_scores(scores[0].half(), *scores[1:], "softmax"),
    )
    yield (
        "window heads",
        ValueError,
        "q_window has 3 heads",
        lambda: ops.window_scores(torch.zeros(2, 5, 3, 64), *scores[1:], "softmax"),
    )


def compact_errors():
    pages, arena, src, k, v, keep, dst = make_compact(Case(n=5, history=(16, 3), stored=(5,)), (9,))
    call = ops.compact
    yield "keep dtype", TypeError, "keep is torch.float32", lambda: call(pages, arena, src, k, v, keep.float(), dst)
    yield "keep shape", ValueError, "keep has shape", lambda: call(pages, arena, src, k, v, keep[:1], dst)
    yield (
        "keep count",
        ValueError,
        "dst_slots name 9 rows; they must name the 8",
        lambda: call(pages, arena, src, k, v, keep[..., :8].contiguous(), dst),
    )
    yield (
        "keep range",
        ValueError,
        "keep holds 99; the keys have indices 0 … 36",
        lambda: call(pages, arena, src, k, v, torch.full_like(keep, 99), dst),
    )
    yield (
        "keep absent",
        ValueError,
        "keep holds 19, a row that src_slots do not name",
        lambda: call(pages, arena, src, k, v, torch.full_like(keep, 19), dst),
    )
    yield "keep order", ValueError, "keep does not ascend", lambda: call(pages, arena, src, k, v, keep.flip(-1), dst)
    yield (
        "overlap",
        ValueError,
        "is in src_slots and in dst_slots",
        lambda: call(pages, arena, dst.clone(), k, v, torch.arange(9).expand(2, 2, 9).contiguous(), dst),
    )


@pytest.mark.parametrize(
    ("name", "kind", "message", "call"),
    [*prepare_errors(), *score_errors(), *compact_errors()],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_mistakes_are_named(name, kind, message, call):
    with pytest.raises(kind, match=message):
        call()


def test_nothing_to_do_is_nothing():
    q, k = ops.prepare_qk(torch.zeros(0, 3, 4, 64), 1)
    assert q.shape == (0, 3, 2, 64)
    assert k.shape == (0, 3, 1, 64)
    pages, arena, src, k, v, keep, dst = make_compact(Case(n=5, history=(16,)), ())
    before = pages.clone()
    ops.compact(pages, arena, src, k, v, keep, dst)
    assert torch.equal(pages.view(torch.uint8), before.view(torch.uint8))


def opcheck_calls():
    for parts in QK_PARTS.values():
        arguments = make_qk((2, 5, 6, 2, 64), parts, torch.float16)
        yield ops.prepare_qk, (arguments.pop("qkv"), arguments.pop("kv_heads")), arguments
    for mode in ("softmax", "sum_logits"):
        yield ops.window_scores, (*make_scores(SCORE_CASES[1]), mode), {}
    pages, *rest = make_compact(*COMPACT_CASES[1])
    yield ops.compact, (pages.nan_to_num(0), *rest), {}


@pytest.mark.parametrize(("op", "args", "kwargs"), [*opcheck_calls()], ids=lambda x: getattr(x, "__name__", ""))
def test_opcheck(op, args, kwargs):
    torch.library.opcheck(op.default, args, kwargs)


def test_compiled_in_one_graph_with_a_dynamic_batch():
    def step(qkv, q_scale, pages, arena, slots):
        q, k = ops.prepare_qk(qkv, 2, q_scale, None, None, True)
        return ops.window_scores(q, k, pages, arena, slots, 1.0)

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch in (2, 3):
        case = Case(batch=batch, n=6, history=(16, 3))
        _, _, pages, arena, slots, _ = make_scores(case)
        arguments = (torch.randn(batch, 6, 6, 64), torch.rand(2) + 0.5, pages, arena, slots)
        torch.testing.assert_close(compiled(*arguments), step(*arguments))
