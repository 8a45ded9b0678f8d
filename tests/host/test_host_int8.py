"""The CUDA kernels on int8 pages, executed on the CPU: attention to what bytes stand for, and stores to the byte."""

from __future__ import annotations

import copy
from dataclasses import replace

import cases
import hostlib
import pytest
import torch
from attn_cases import SPOILT, same_kinds
from cases import Case

from amskv_kernels.ops import reference
from amskv_kernels.ops.quantise import quantise

TILES = {64: 32, 96: 16, 128: 32}  # the rows per warp that a head size has
ROWS = [1, 4, 9, 16, 17, 31, 32, 33, 64, 65, 100, 129, 169, 256]
FLOATS = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
HEAD_DIMS = pytest.mark.parametrize("head_dim", TILES)


def check(case: Case) -> None:
    cases.check(hostlib.load(), replace(case, int8=True))


@pytest.mark.parametrize("n", ROWS)
def test_token_counts(n):
    check(Case(n=n, batch=1, history=(16, 16, 3)))


@FLOATS
@HEAD_DIMS
@pytest.mark.parametrize("n", [5, 70])
def test_head_dims_and_dtypes(n, head_dim, dtype):
    check(Case(n=n, head_dim=head_dim, dtype=dtype))


@FLOATS
@HEAD_DIMS
@pytest.mark.parametrize("teams", [(1, 1), (1, 4), (2, 2), (3, 1), (4, 1)], ids=str)
def test_every_team(head_dim, teams, dtype):
    plan = (TILES[head_dim], *teams, 1)
    check(Case(n=37, batch=1, kv_heads=3, heads=3, head_dim=head_dim, history=(16, 16, 7) * 3, plan=plan, dtype=dtype))


@HEAD_DIMS
@pytest.mark.parametrize("splits", [2, 3, 5])
def test_split_keys(head_dim, splits):
    check(Case(n=21, batch=1, head_dim=head_dim, history=(16,) * 16, plan=(TILES[head_dim], 1, 2, splits)))


@pytest.mark.parametrize("page_size", [16, 32, 64, 128])
@pytest.mark.parametrize("history", [(), (1,), (16,), (7, 16, 0, 2), (16,) * 9])
def test_pages(page_size, history):
    filled = tuple(page_size if rows == 16 else rows for rows in history)
    check(Case(n=20, batch=1, page_size=page_size, history=filled))


@pytest.mark.parametrize("n", [1, 16, 40])
@pytest.mark.parametrize("heads, kv_heads", [(2, 1), (6, 2), (8, 1)])
def test_grouped_heads(heads, kv_heads, n):
    check(Case(n=n, heads=heads, kv_heads=kv_heads, batch=1))


@pytest.mark.parametrize("page_size", [16, 64])
@pytest.mark.parametrize("n", [1, 11, 12, 60, 130])
def test_page_growing_in_place(n, page_size):
    check(Case(n=n, page_size=page_size, grow=5, batch=1))


def test_entries_of_every_head_and_strides():
    check(Case(n=33, per_head=True, packed=False, history=(16, 5, 1, 12)))


def test_no_key_of_one_part():
    check(Case(n=3, batch=1, history=(0,) * 12 + (4,), plan=(32, 1, 1, 4)))


@pytest.mark.parametrize("seed", range(24))
def test_random_calls(seed):
    check(cases.random_case(seed, [1, 2, 9, 16, 30, 64, 81, 100, 144], [64, 96, 128]))


@FLOATS
@HEAD_DIMS
@pytest.mark.parametrize("grow", [0, 3])
def test_append(head_dim, grow, dtype):
    case = Case(n=75, head_dim=head_dim, page_size=32, grow=grow, per_head=True, int8=True, dtype=dtype)
    check_append(case, cases.make(case))


def check_append(case: Case, inputs: cases.Inputs) -> None:
    truth = copy.deepcopy(inputs)
    reference.append(*truth.tables[1:5], truth.write, truth.page_scales)
    cases.append(hostlib.load(), case, inputs, "lazy")
    assert cases.same(inputs.pages, truth.pages)
    assert cases.same(inputs.page_scales, truth.page_scales)


@FLOATS
def test_elements_are_rounded_as_the_reference_does(dtype):
    """Of bf16 every row there is, of fp16 those of an eighth of the largest."""
    case, inputs = cases.rows_to_round(dtype, 128)
    check_append(case, inputs)


@FLOATS
def test_rows_of_every_kind_are_stored_as_the_reference_does(dtype):
    """Zeros, the least and the largest numbers, NaN and infinities, each among other rows."""
    case = Case(n=40, batch=1, packed=False, int8=True, dtype=dtype, history=())
    inputs, info = cases.make(case), torch.finfo(dtype)
    for i, value in enumerate([0.0, -0.0, info.smallest_normal / 2**4, info.tiny, info.max, -info.max]):
        inputs.k[0, i, 0], inputs.v[0, 10 + i, 1] = value, value
    for i, value in enumerate([torch.nan, torch.inf, -torch.inf, info.max, info.tiny]):
        inputs.k[0, 20 + i, 0, 3], inputs.v[0, 30 + i, 1, 60] = value, value
    if dtype is torch.bfloat16:  # rows about the least that has a scale
        inputs.k[0, 27:30, 1] *= torch.tensor([1.4e-36, 1.6e-36, 1e-37])[:, None] / inputs.k[0, 27:30, 1].abs().amax()
    check_append(case, inputs)


@FLOATS
@pytest.mark.parametrize("what", SPOILT)
@pytest.mark.parametrize("splits", [1, 3])
def test_what_is_no_number_among_the_current_rows(what, splits, dtype):
    """NaN and infinities do what they do without int8 pages, and are stored as NaN."""
    case = Case(n=20, batch=1, packed=False, history=(16,) * 7 + (3,), plan=(32, 1, 1, splits), int8=True, dtype=dtype)
    inputs = cases.make(case)
    inputs.q *= 0.125  # or a weight that fp16 has as 0 makes NaN of an infinity
    inputs.q, inputs.k, inputs.v = SPOILT[what](inputs.q, inputs.k, inputs.v)
    check_kinds(case, inputs)


@FLOATS
@pytest.mark.parametrize("which", [0, 1], ids=["a key", "a value"])
def test_a_stored_row_of_nan_spoils_its_own_head_alone(which, dtype):
    case = Case(n=20, batch=1, heads=3, kv_heads=3, int8=True, dtype=dtype)
    inputs = cases.make(case)
    page = int(inputs.arena[0, 1]) + (int(inputs.read[0, 0, 1]) >> 8)
    inputs.page_scales[page, which, 4], inputs.pages[page, which, 4] = torch.nan, 0
    check_kinds(case, inputs)
    assert inputs.out.isnan().any(-1).sum() == 20


def check_kinds(case: Case, inputs: cases.Inputs) -> None:
    truth = copy.deepcopy(inputs)
    out, lse = reference.attn(*truth.call)
    cases.run(hostlib.load(), case, inputs, "lazy")
    assert same_kinds(inputs.out, out)
    assert same_kinds(inputs.lse, lse)
    torch.testing.assert_close(inputs.out.double(), out, rtol=3e-2, atol=3e-2, equal_nan=True)
    assert cases.same(inputs.pages, truth.pages)
    assert cases.same(inputs.page_scales, truth.page_scales)


@FLOATS
@pytest.mark.parametrize("size", [2.0**-20, 2.0**-9, 1.0, 2.0**9, 30000.0])
def test_values_of_every_size_keep_their_accuracy(size, dtype):
    """A weight times a scale may leave fp16's range, the product of both with the bytes does not."""
    case = Case(n=9, batch=1, int8=True, dtype=dtype, history=(16,) * 6, stores=False)
    inputs = cases.make(case)
    values = torch.rand(inputs.pages[:, 1].shape, generator=torch.Generator().manual_seed(3)) * size
    named = ~inputs.page_scales[:, 1].isnan()
    rows, scales = quantise(values)
    inputs.pages[:, 1], inputs.page_scales[:, 1] = rows, scales.where(named, torch.nan)
    inputs.v.mul_(0).add_(size / 2)
    out, _ = reference.attn(*copy.deepcopy(inputs).call)
    cases.run(hostlib.load(), case, inputs, "eager")
    info = torch.finfo(dtype)
    assert ((inputs.out.double() - out).abs() <= 2 * info.eps * max(size, info.smallest_normal)).all()


KERNEL, KEYS, ROUNDING = "portable/attn.cuh", "portable/int8_keys.cuh", "common/int8.cuh"
WRONG = "out: more than twice the error"
FAULTS = [
    pytest.param(
        KERNEL, "registers.multiply(scales, team", "registers.multiply(scales + Tile::kScaleBytes, team", WRONG,
        id="a value's scale for a key's",
    ),
    pytest.param(
        KERNEL, "cp_async_wait<Tile::kStages - 2>();", "cp_async_wait<Tile::kStages - 1>();",
        r"reads bytes of the copy issued at portable/int8_keys\.cuh", id="rows widened before they are there",
    ),
    pytest.param(KEYS, "store_shared_4(scale, bits_of(1));", "", WRONG, id="no scale for the current rows"),
    pytest.param(ROUNDING, "scale *= float_of((254 << 23) - power);", "", WRONG, id="a power of two taken twice"),
    pytest.param(ROUNDING, "+ kWhole)", "- 0.5f + kWhole)", "pages differ from the reference's", id="truncated"),
]  # fmt: skip


@pytest.mark.parametrize("file, text, replacement, message", FAULTS)
def test_planted_fault_is_caught(tmp_path, file, text, replacement, message):
    case = Case(n=40, batch=1, history=(16,) * 8 + (3,), dtype=torch.float16, int8=True)  # a tile of pages and new rows
    cases.check(hostlib.load(), case)
    faulty = hostlib.load_with_fault(file, text, replacement, tmp_path)
    with pytest.raises((RuntimeError, AssertionError), match=message):
        cases.check(faulty, case)
