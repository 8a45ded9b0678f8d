"""Pages of int8 in the library's CPU kernels: what is rounded how, and what is no number, in every instruction set."""

import re

import pytest
import torch
from attn_cases import SPOILT, Case, make, make_eight_bit, same_kinds
from hypothesis import given, settings
from hypothesis import strategies as st
from test_cpu import DTYPES, IN_EVERY_SET, check, copied, ops, pytestmark  # noqa: F401
from torch import Tensor

from amskv_kernels.ops import choose, reference
from amskv_kernels.ops.quantise import LEAST_ROW, dequantise, quantise


def stored(x: Tensor, instruction_set: str) -> tuple[Tensor, Tensor]:
    """The bytes and scales (n, D), (n,) that `append` keeps of rows (n, D), as K and as V."""
    n, head_dim = x.shape
    pages, scales = torch.full((-(-n // 128), 2, 128, head_dim), 99, dtype=torch.int8), torch.full((1,), torch.nan)
    scales = scales.expand(pages.shape[:3]).contiguous()
    slots = torch.tensor([[[i << 8 | min(128, n - 128 * i) for i in range(len(pages))]]], dtype=torch.int32)
    rows, arena = x[None, :, None], torch.zeros(1, 1, dtype=torch.int32)
    ops.append_cpu(rows, rows, pages, arena, slots, scales, instruction_set)
    (k, v), (k_scales, v_scales) = pages.transpose(0, 1).flatten(1, 2), scales.transpose(0, 1).flatten(1)
    assert torch.equal(k, v)
    assert torch.equal(k_scales.view(torch.int32), v_scales.view(torch.int32))
    assert not k[n:].any()
    assert not k_scales[n:].any()
    return k[:n], k_scales[:n]


def check_rounding(x: Tensor, instruction_set: str) -> None:
    """To the bit as `quantise`, and within half a scale of what went in."""
    rows, scales = stored(x, instruction_set)
    expected_rows, expected_scales = quantise(x)
    assert torch.equal(scales.view(torch.int32), expected_scales.view(torch.int32))
    assert torch.equal(rows, expected_rows)
    kept = scales > 0
    apart = (x[kept].double() - rows[kept].double() * scales[kept, None].double()).abs()
    # Beside half a step, what the division's rounding can move a number that stands between two steps.
    assert (apart <= scales[kept, None].double() * (0.5 + 127 * 2.0**-23)).all()


@IN_EVERY_SET
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_rows_of_any_bits_are_rounded_as_torch_rounds_them(instruction_set, data):
    """Any bits are mostly rows of NaN or of one large number: others have exponents near each other."""
    rng = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    dtype, head_dim = data.draw(st.sampled_from(DTYPES)), data.draw(st.sampled_from([64, 96, 128]))
    shape = (data.draw(st.integers(1, 140)), head_dim)
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    limits = torch.iinfo(bits)
    wild = torch.randint(limits.min, limits.max + 1, shape, generator=rng, dtype=torch.int64).to(bits).view(dtype)
    size = 2.0 ** torch.randint(-140, 120, (shape[0], 1), generator=rng).double()
    tame = (torch.randn(shape, generator=rng, dtype=torch.float64) * size).to(dtype)
    check_rounding(torch.where(torch.rand(shape[0], 1, generator=rng) < 0.2, wild, tame), instruction_set)


@IN_EVERY_SET
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_at_every_edge(dtype, instruction_set):
    most = torch.finfo(dtype).max
    half = (torch.arange(128) - 64 + 0.5).tolist()  # between two steps, if the largest is 127
    edges = [
        [0.0], [-0.0], [most], [-most, 1], [LEAST_ROW], [LEAST_ROW * (1 - 2**-23)], [LEAST_ROW, 2.0**-126], [1e-45],
        [torch.nan, 1], [1, torch.inf], [-torch.inf, 0], [torch.inf, torch.nan], [2.0**-24, 2.0**-25], [127, *half],
        [-127, *half], [127, -126.5, 63.5, -63.5],
    ]  # fmt: skip
    rows = torch.zeros(len(edges), 128, dtype=torch.float64)
    for row, values in zip(rows, edges, strict=True):
        row[: len(values[:128])] = torch.tensor(values[:128])
    for turned in (rows, rows.flip(1), rows.roll(37, 1)):  # a vector's every lane
        check_rounding(turned.to(dtype), instruction_set)


@IN_EVERY_SET
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("what", SPOILT)
def test_what_is_no_number_spoils_its_own_rows(what, dtype, instruction_set):
    """Among the current rows, which are stored, and then read from their pages."""
    for case in (Case(n=3, history=(5,), stored=(3,)), Case(n=40, history=(16,) * 9, stored=(16, 16, 8), heads=4)):
        args = make_eight_bit(Case(**{**vars(case), "dtype": dtype}), seed=2)
        args = (*SPOILT[what](*args[:3]), *args[3:])
        check_kinds(args, instruction_set)
        stored_rows = args[6]  # written just now: they are the history of a call with other current rows
        fresh = make_eight_bit(Case(**{**vars(case), "dtype": dtype}), seed=3)[:3]
        none = stored_rows[..., :0].contiguous()
        check_kinds((*fresh, *args[3:5], stored_rows, none, *args[7:]), instruction_set)


def check_kinds(args: tuple, instruction_set: str) -> None:
    """NaN and infinities where the reference has them, numbers near its numbers, and the same bytes stored."""
    expected = copied(args)
    truth, truth_lse = reference.attn(*expected)
    out, lse = ops.attn_cpu(*args, instruction_set=instruction_set)
    assert same_kinds(out, truth)
    assert same_kinds(lse, truth_lse)
    torch.testing.assert_close(out.double(), truth, rtol=1e-2, atol=1e-2, equal_nan=True)
    assert torch.equal(args[3], expected[3])
    assert torch.equal(args[8].view(torch.int32), expected[8].view(torch.int32))


@IN_EVERY_SET
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("which", [0, 1], ids=["a key", "a value"])
def test_a_row_of_nan_in_the_pages_spoils_its_own_head_alone(which, dtype, instruction_set):
    args = make_eight_bit(Case(n=20, history=(16, 9), heads=4, dtype=dtype))
    page = int(args[4][0, 0]) + (int(args[5][0, 0, 1]) >> 8)
    args[8][page, which, 4], args[3][page, which, 4] = torch.nan, 0
    check_kinds(args, instruction_set)
    out, _ = ops.attn_cpu(*args, instruction_set=instruction_set)
    assert out.isnan().any(-1).sum() == 2 * 20


@IN_EVERY_SET
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scales_of_every_size_in_one_history(dtype, instruction_set):
    """Rows whose scales are powers of two apart, those of zeros among them: each counts with its own."""
    args = make_eight_bit(Case(n=70, history=(64, 64, 9), page_size=64, dtype=dtype), seed=5)
    scales = args[8]
    powers = torch.randint(-20, 1, scales.shape, generator=torch.Generator().manual_seed(1))
    scales *= torch.where(powers == -20, 0.0, 2.0**powers)
    check(args, instruction_set)


@IN_EVERY_SET
def test_pages_at_any_address(instruction_set):
    args = make_eight_bit(Case(n=33, history=(16, 7), stored=(16, 16, 1), head_dim=96), seed=6)
    room = torch.zeros(args[3].numel() + 3, dtype=torch.int8)[3:].view(args[3].shape)
    check((*args[:3], room.copy_(args[3]), *args[4:]), instruction_set)


@IN_EVERY_SET
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_current_scale_is_not_rounded(dtype, instruction_set):
    """With no history, pages of eight bits change no bit of the output; what is stored stands in them all the same."""
    case = Case(n=70, stored=(64, 6), page_size=64, heads=4, dtype=dtype)
    rounded, plain = make_eight_bit(case, seed=7), make(case, seed=7)
    for x, y in zip(*(ops.attn_cpu(*args, instruction_set=instruction_set) for args in (rounded, plain)), strict=True):
        assert torch.equal(x, y)
    page = int(plain[4][0, 0]) + (int(plain[6][0, 0, 1]) >> 8)
    kept, exactly = dequantise(rounded[3][page], rounded[8][page])[:, :6], plain[3][page][:, :6].float()
    assert ((kept - exactly).abs() <= 0.51 * rounded[8][page][:, :6, None]).all()
    assert not torch.equal(kept, exactly)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_library_serves_int8_pages_where_there_is_no_gpu(dtype):
    for op in ("attn", "append"):
        assert choose(op, "cpu", dtype, torch.int8).backend == "cpu"


REFUSED = {
    "none": (lambda s: None, "page_scales is None; pages of Char need the scale of every row"),
    "dtype": (lambda s: s.half(), "page_scales is Half; it must be Float"),
    "device": (lambda s: s.to("meta"), "page_scales is on another device than pages"),
    "shape": (lambda s: s[:, :1], "page_scales has shape (20, 1, 16); it must be (num_pages, 2, page_size)"),
    "strides": (lambda s: s.transpose(0, 2).contiguous().transpose(0, 2), "page_scales is not contiguous; it must be"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_scales_are_named_before_anything_is_written(name):
    change, message = REFUSED[name]
    *args, scales = make_eight_bit(Case(n=6, heads=4, history=(16, 2), stored=(6,)))
    before, bad = args[3].clone(), change(scales)
    for call in (lambda: ops.attn_cpu(*args, bad), lambda: ops.append_cpu(*args[1:5], args[6], bad)):
        with pytest.raises(ValueError, match=re.escape(message)):
            call()
    assert torch.equal(args[3], before)


def test_scales_of_other_pages_and_rows_within_scales_are_refused():
    args = make(Case(n=6, stored=(6,)))
    with pytest.raises(ValueError, match="page_scales is given for pages of Float; only pages of Char have scales"):
        ops.attn_cpu(*args, torch.ones(args[3].shape[:3]))
    q, k, v, pages, arena, read, write, scale, _ = make_eight_bit(Case(n=2, batch=1, heads=1, kv_heads=1, stored=(2,)))
    scales = torch.zeros(pages.shape[0], 2, 16)
    inside = torch.zeros(1, 2, 1, 64).set_(scales.untyped_storage(), 0, (1, 1, 1, 64), (64, 64, 64, 1))
    with pytest.raises(ValueError, match="k shares memory with page_scales, which this call writes"):
        ops.attn_cpu(q[:, :1], inside, v[:, :1], pages, arena, read, write - 1, scale, scales)
    with pytest.raises(ValueError, match="v shares memory with page_scales, which this call writes"):
        ops.append_cpu(k[:, :1], inside, pages, arena, write - 1, scales)
