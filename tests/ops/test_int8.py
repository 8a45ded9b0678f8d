"""Pages of eight bits: the rounding itself, every op against the quantised truth, every message."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from zlib import crc32

import numpy as np
import pytest
import torch
from attn_cases import SPOILT, Case, eight_bit, exact, make, make_eight_bit, most_error, same_kinds
from extra_cases import COMPACT_CASES, LARGE, SCORE_CASES, SMALL, make_compact, make_scores
from hypothesis import given
from hypothesis import strategies as st

import amskv_kernels
from amskv_kernels.ops import choose, reference
from amskv_kernels.ops.checks import DTYPES, PlannedAttn
from amskv_kernels.ops.prepared import prepare_attn
from amskv_kernels.ops.quantise import LEAST_ROW, dequantise, quantise

ops = torch.ops.amskv
FLOATS = pytest.mark.parametrize("dtype", DTYPES, ids=str)
GRID = pytest.mark.parametrize("case", SMALL + LARGE, ids=str)


def magnitudes(dtype: torch.dtype) -> st.SearchStrategy[list[float]]:
    """Rows of any numbers of a dtype, most of them of one size."""
    most = torch.finfo(dtype).max
    row = st.lists(st.floats(-most, most, width=32), min_size=1, max_size=16)
    return st.one_of(row, st.lists(st.floats(-1, 1, width=32), min_size=1, max_size=16))


@FLOATS
@given(data=st.data())
def test_a_row_comes_back_within_half_a_step(dtype, data):
    x = torch.tensor(data.draw(magnitudes(dtype))).to(dtype).nan_to_num()
    rows, scale = quantise(x)
    assert (rows.dtype, scale.dtype) == (torch.int8, torch.float32)
    most = x.double().abs().max()
    if most < LEAST_ROW:
        assert scale == 0
        assert (rows == 0).all()
        return
    assert scale == most.float() / 127
    assert rows.abs().max() == 127, "the largest takes the whole range, and −128 is not in it"
    # Beside half a step, what the division's rounding can move a number that stands between two steps.
    apart = (x.double() - rows.double() * scale.double()).abs()
    assert (apart <= scale.double() * (0.5 + 127 * 2.0**-23)).all()


def test_rounding_is_numpys_half_to_even():
    x = torch.cat([torch.arange(-127, 127) + 0.5, torch.tensor([127.0])])
    rows, scale = quantise(x)
    assert scale == 1
    np.testing.assert_array_equal(rows.numpy(), np.rint(x.numpy()))


@FLOATS
def test_what_is_no_number_stays_in_its_row(dtype):
    x = torch.randn(6, 64, dtype=dtype)
    x[1, 3], x[2, 3], x[3, 3], x[4] = torch.nan, torch.inf, -torch.inf, 0
    rows, scale = quantise(x)
    assert scale.isnan().tolist() == [False, True, True, True, False, False]
    assert (rows[1:5] == 0).all()
    assert scale[4] == 0
    back = dequantise(rows, scale)
    assert back[1:4].isnan().all()
    assert ((back - x)[[0, 5]].abs() <= 0.51 * scale[[0, 5], None]).all()


@pytest.mark.parametrize("most", [2.0**-24, 65504.0])
def test_fp16s_least_and_largest_rows_keep_their_bits(most):
    x = torch.full((64,), most, dtype=torch.float16)
    torch.testing.assert_close(dequantise(*quantise(x)), x.float(), rtol=2.0**-22, atol=0)


@GRID
def test_attn_is_the_reference(case):
    check_attn(case)


def check_attn(case: Case, interpreted: bool = False) -> None:
    """`attn` of the backend of the moment, on int8 pages, against the quantised truth; pool and scales to the byte.

    Triton's interpreter truncates to bf16 where a GPU rounds: twice the error.
    """
    args = make_eight_bit(case, seed=crc32(str(case).encode()))
    pages, scales = args[3].clone(), args[-1].clone()
    truth, truth_lse = reference.attn(*args[:3], pages, *args[4:-1], scales)
    slack = 4 if interpreted and case.dtype == torch.bfloat16 else 2
    limit = most_error(exact(args), truth, slack)
    out, lse = ops.attn(*args)
    assert out.dtype == case.dtype
    assert out.is_contiguous()
    assert (out.double() - truth).abs().max() <= limit
    assert (lse.double() - truth_lse).abs().max() < (3e-2 if case.dtype != torch.float32 and not interpreted else 2e-5)
    assert torch.equal(args[3], pages)
    assert torch.equal(args[-1].view(torch.int32), scales.view(torch.int32)), "every scale, NaN included"


@FLOATS
@pytest.mark.parametrize("n", [3, 20])
def test_values_of_every_size(n, dtype):
    check_sizes(n, dtype)


def check_sizes(n: int, dtype: torch.dtype, interpreted: bool = False) -> None:
    """Values up to fp16's largest under weights of nothing, beside small ones that are heard."""
    q, k, v, pages, arena, read, write, scale, scales = make_eight_bit(Case(n=n, history=(16, 9), dtype=dtype), seed=4)
    q, k, v = torch.ones_like(q), torch.zeros_like(k), v / 1024
    pages[:, 0], scales[:, 0] = 0, 0
    pages[:, 0, 1::2], scales[:, 0, 1::2] = -127, 8 / 127  # every other key: a score of −64
    scales[:, 1, 1::2] *= 65504 / 127 / scales[:, 1, 1::2].nan_to_num(1)
    scales[:, 1, ::2] /= 1024
    args = (q, k, v, pages, arena, read, write, scale, scales)
    truth, _ = reference.attn(*args[:3], pages.clone(), *args[4:-1], scales.clone())
    out, _ = ops.attn(*args)
    assert truth.abs().max() < 1e-2
    bits = {torch.float32: 18, torch.float16: 8, torch.bfloat16: 6 if interpreted else 7}[dtype]
    assert (out.double() - truth).abs().max() <= 2.0**-bits * truth.abs().max()


@pytest.mark.parametrize("case", [case for case in SMALL + LARGE if case.stored], ids=str)
def test_append_is_the_store_of_attn(case):
    check_append(case)


def check_append(case: Case) -> None:
    """`append` of the backend of the moment against the reference, to the byte."""
    _, k, v, pages, arena, _, write, _, scales = make_eight_bit(case, seed=7)
    expected, expected_scales = pages.clone(), scales.clone()
    reference.append(k, v, expected, arena, write, expected_scales)
    ops.append(k, v, pages, arena, write, scales)
    assert torch.equal(pages, expected)
    assert torch.equal(scales.view(torch.int32), expected_scales.view(torch.int32))


def test_the_current_scale_is_not_rounded():
    """The rows that a call stores come from eight bits in the next call only."""
    q, k, v, pages, arena, _, write, scale, scales = make_eight_bit(Case(n=5, stored=(5,)))
    none = write[..., :0].contiguous()
    out, _ = ops.attn(q, k, v, pages, arena, none, write, scale, scales)
    exactly, _ = ops.attn(q, k, v, torch.zeros_like(pages, dtype=k.dtype), arena, none, none, scale)
    torch.testing.assert_close(out, exactly, rtol=0, atol=1e-6)
    later, _ = ops.attn(q, k * 1e-9, v * 0, pages, arena, write, none, scale, scales)  # stored rows and five of nothing
    assert later.abs().max() > 1e-3


@pytest.mark.parametrize("what", SPOILT)
@FLOATS
@pytest.mark.parametrize("case", [Case(n=3, history=(5,)), Case(n=40, history=(16,) * 9)], ids=str)
def test_what_is_no_number_among_the_current_rows(case, dtype, what):
    check_spoilt(case, dtype, what)


def check_spoilt(case: Case, dtype: torch.dtype, what: str) -> None:
    """NaN and infinities of the current rows do what they do without int8 pages."""
    args = make_eight_bit(replace(case, dtype=dtype), seed=2)
    args = (*SPOILT[what](*args[:3]), *args[3:])
    truth, truth_lse = reference.attn(*args[:3], args[3].clone(), *args[4:-1], args[-1].clone())
    out, lse = ops.attn(*args)
    assert same_kinds(out, truth)
    assert same_kinds(lse, truth_lse)
    torch.testing.assert_close(out.double(), truth, rtol=1e-2, atol=1e-2, equal_nan=True)


@pytest.mark.parametrize("which", [0, 1], ids=["a key", "a value"])
def test_a_stored_row_that_holds_nan_spoils_its_own_head_alone(which):
    check_stored_nan(which, 20)


def check_stored_nan(which: int, n: int) -> None:
    """A row of NaN in the pages of the first sequence and head: its out alone, and of a key its lse."""
    args = make_eight_bit(Case(n=n, history=(16, 9), heads=4))
    pages, arena, read, scales = args[3], args[4], args[5], args[-1]
    page = int(arena[0, 0]) + (int(read[0, 0, 1]) >> 8)
    scales[page, which, 4], pages[page, which, 4] = torch.nan, 0
    truth, truth_lse = reference.attn(*args[:3], pages.clone(), *args[4:-1], scales.clone())
    assert truth.isnan().any(-1).sum() == 2 * n
    out, lse = ops.attn(*args)
    assert same_kinds(out, truth)
    assert same_kinds(lse, truth_lse)


@pytest.mark.parametrize("mode", ["softmax", "sum_logits"])
@pytest.mark.parametrize("case", SCORE_CASES, ids=str)
def test_window_scores_are_the_reference(case, mode):
    check_scores(case, mode)


def check_scores(case: Case, mode: str) -> None:
    """`window_scores` of the backend of the moment on int8 pages."""
    q, k, pages, *rest = make_scores(case)
    pages, scales = eight_bit(pages)
    args = (q, k, pages, *rest, mode, scales)
    scores, truth = ops.window_scores(*args), reference.window_scores(*args)
    assert torch.equal(scores.isneginf(), truth.isneginf())
    torch.testing.assert_close(scores.double(), truth, rtol=1e-5, atol=3e-5)


@pytest.mark.parametrize(("case", "kept"), COMPACT_CASES, ids=str)
@pytest.mark.parametrize("name", ["auto", "torch"])
def test_compact_is_the_reference(case, kept, name):
    with amskv_kernels.backend(name):
        check_compact(case, kept)


def check_compact(case: Case, kept: tuple[int, ...]) -> None:
    """`compact` of the backend of the moment: bytes and scales moved as they are, current rows rounded once."""
    pages, *rest = make_compact(case, kept)
    pages, scales = eight_bit(pages)
    expected, expected_scales = pages.clone(), scales.clone()
    reference.compact(expected, *rest, expected_scales)
    ops.compact(pages, *rest, scales)
    assert torch.equal(pages, expected)
    assert torch.equal(scales.view(torch.int32), expected_scales.view(torch.int32))


def test_a_moved_row_is_not_rounded_again():
    """Bytes that `quantise` would never give back, as the largest is not 127, survive the move."""
    case, kept = Case(n=5, history=(16, 7)), (9,)
    pages, arena, src, k, v, keep, dst = make_compact(case, kept)
    pages, scales = eight_bit(pages)
    pages //= 3
    keep = torch.arange(9).expand(2, 2, 9).contiguous()  # all from the first page
    before = pages.clone()
    ops.compact(pages, arena, src, k, v, keep, dst, scales)
    for b, h in np.ndindex(2, 2):
        first, to = (int(arena[b, h]) + (int(table[0, 0, 0]) >> 8) for table in (src, dst))
        assert torch.equal(pages[to, :, :9], before[first, :, :9])
        assert torch.equal(scales[to, :, :9], scales[first, :, :9])
        assert not pages[to, :, 9:].any()
        assert not scales[to, :, 9:].any()


@FLOATS
def test_a_prepared_call_is_the_raw_one(dtype):
    case = Case(n=6, history=(16, 2), stored=(6,), heads=4, dtype=dtype)
    args = make_eight_bit(case)
    args[4].copy_(torch.arange(4, dtype=torch.int32).view(2, 2) * 5)  # a plan's arenas stand in order
    filled, scales = args[3].clamp(-127, 127), args[-1].nan_to_num(0.01)
    args = (*args[:3], filled, *args[4:-1], scales)
    twin = (*args[:3], filled.clone(), *args[4:-1], scales.clone())
    expected, _ = ops.attn(*args)
    planned = PlannedAttn(*twin[3:7], case.n, dtype, twin[-1])
    torch.testing.assert_close(prepare_attn(planned)(*twin[:3], twin[7]), expected)
    kept = torch.ones(filled.shape[:3], dtype=torch.bool)
    for first, slot in product(args[4].flatten().tolist(), args[6].flatten().tolist()):
        kept[first + (slot >> 8), :, slot & 255 :] = slot == 0  # a cache's calls may leave these as they were
    assert torch.equal(twin[3][kept], args[3][kept])
    assert torch.equal(twin[-1][kept], args[-1][kept])
    for wrong in ({"dtype": torch.float64}, {"pages": filled.double()}):
        bad = planned._replace(**wrong)
        with pytest.raises(TypeError, match=r"is torch.float64; it must be"):
            prepare_attn(bad)(*(x.to(bad.dtype) for x in twin[:3]), twin[7])


GOOD = Case(n=6, heads=4, history=(16, 2), stored=(6,))
BAD_SCALES = {
    "none": (lambda s: None, ValueError, "page_scales is None; pages of torch.int8 need the scale of every row"),
    "dtype": (lambda s: s.half(), TypeError, "page_scales is torch.float16; it must be torch.float32"),
    "device": (lambda s: s.to("meta"), ValueError, "page_scales is on meta; it must be on cpu, as pages"),
    "shape": (
        lambda s: s[:, :1],
        ValueError,
        r"page_scales has shape \(20, 1, 16\); it must be \(num_pages, 2, page_size\) = \(20, 2, 16\)",
    ),
    "rank": (lambda s: s[..., None], ValueError, r"page_scales has shape \(20, 2, 16, 1\)"),
    "strides": (
        lambda s: s.transpose(0, 2).contiguous().transpose(0, 2),
        ValueError,
        r"page_scales has strides \(1, 20, 40\); it must be contiguous",
    ),
}


@pytest.mark.parametrize("name", BAD_SCALES)
def test_bad_scales_are_named_by_every_op_before_anything_is_written(name):
    change, kind, message = BAD_SCALES[name]
    q, k, v, pages, arena, read, write, scale, scales = make_eight_bit(GOOD)
    keep = torch.arange(6).expand(2, 2, 6).contiguous()
    before, bad = pages.clone(), change(scales)
    for call in (
        lambda: ops.attn(q, k, v, pages, arena, read, write, scale, bad),
        lambda: ops.append(k, v, pages, arena, write, bad),
        lambda: ops.window_scores(q, k, pages, arena, read, scale, "softmax", bad),
        lambda: ops.compact(pages, arena, read, k, v, keep, write, bad),
        lambda: amskv_kernels.ops.attn(q, k, v, pages, arena, read, write, scale, bad),
    ):
        with pytest.raises(kind, match=message):
            call()
    assert torch.equal(pages, before)


def test_scales_of_other_pages_are_refused():
    args = make(GOOD)
    with pytest.raises(
        ValueError, match=r"page_scales is given for pages of torch.float32; only pages of torch.int8 have scales"
    ):
        ops.attn(*args, torch.ones(args[3].shape[:3]))
    with pytest.raises(TypeError, match=r"pages is torch.float16; it must be torch.float32, as k, or torch.int8"):
        ops.attn(*args[:3], args[3].half(), *args[4:])


def test_rows_within_the_scales_that_are_written_are_refused():
    q, k, v, pages, arena, read, write, scale, _ = make_eight_bit(Case(n=2, batch=1, heads=1, kv_heads=1, stored=(2,)))
    scales = torch.zeros(pages.shape[0], 2, 16)
    inside = torch.zeros(1, 2, 1, 64).set_(scales.untyped_storage(), 0, (1, 1, 1, 64), (64, 64, 64, 1))
    for name, args in {"k": (q[:, :1], inside, v[:, :1]), "q": (inside, k[:, :1], v[:, :1])}.items():
        with pytest.raises(ValueError, match=f"{name} shares memory with page_scales, which this call writes"):
            ops.attn(*args, pages, arena, read, write - 1, scale, scales)
    q, k, v = (x[:, :1] for x in (q, k, v))
    planned = PlannedAttn(pages, arena, read, write - 1, 1, torch.float32, scales)
    assert planned.takes(q, k, v, scale)
    assert not planned.takes(q, inside, v, scale)
    assert not scales.any()


@pytest.mark.parametrize("case", [GOOD, SMALL[0], SMALL[8]], ids=str)
def test_opcheck(case):
    q, k, v, pages, arena, read, write, scale, scales = make_eight_bit(case)
    scales.nan_to_num_(0.5)  # opcheck compares with ==
    torch.library.opcheck(ops.attn.default, (q, k, v, pages, arena, read, write, scale, scales))
    torch.library.opcheck(ops.append.default, (k, v, pages, arena, write, scales))
    torch.library.opcheck(ops.window_scores.default, (q, k, pages, arena, read, scale, "softmax", scales))
    if case is GOOD:
        keep = torch.arange(6).expand(2, 2, 6).contiguous()
        torch.library.opcheck(ops.compact.default, (pages, arena, read, k, v, keep, write, scales))


def test_compiles_into_one_graph_and_writes_pages_and_scales():
    def step(q, k, v, pages, arena, read, write, scale, scales):
        out, lse = ops.attn(q * 2, k, v, pages, arena, read, write, scale, scales)
        return out + 1, lse, pages + 0, scales.nan_to_num()

    args, twin = make_eight_bit(GOOD), make_eight_bit(GOOD)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for got, want in zip(compiled(*args), step(*twin), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert torch.equal(args[3], twin[3])
    assert torch.equal(args[-1].nan_to_num(), twin[-1].nan_to_num())


def test_a_backend_says_which_pages_it_takes():
    assert choose("attn", "cpu", torch.bfloat16, torch.int8).backend in ("cpu", "torch")
    for name, module in amskv_kernels.ops.dispatch.BACKENDS.items():
        assert set(module.DTYPES) <= set(module.PAGE_DTYPES), name
