"""The Triton kernels on pages of eight bits, under their interpreter, against the quantised truth.

`test_triton` runs this file too in the child process that has the interpreter.
"""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import test_int8
import torch
from attn_cases import SPOILT, Case
from extra_cases import COMPACT_CASES, LARGE, SCORE_CASES, SMALL

from amskv_kernels.ops import quantise, reference
from amskv_kernels.ops.backends.triton.tiles import Tile

pytestmark = [
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1"),
    pytest.mark.usefixtures("forced"),
]
FLOATS = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_attn_of_small_steps(case):
    test_int8.check_attn(case, interpreted=True)


@pytest.mark.parametrize("case", LARGE, ids=str)
@pytest.mark.parametrize("arch", [80, 90])
def test_attn_with_the_tiles_of(on_gpu, arch, case):
    on_gpu(arch)
    test_int8.check_attn(case, interpreted=True)


@pytest.mark.parametrize("case", [LARGE[4], LARGE[7]], ids=str)
@pytest.mark.parametrize("tile", [Tile(16, 16, 4, 1), Tile(64, 128, 4, 1)], ids=str)
@FLOATS
def test_attn_with_full_tiles_first(monkeypatch, tile, case, dtype):
    from amskv_kernels.ops.backends.triton import attn

    monkeypatch.setattr(attn, "attn_tile", lambda *_: tile)
    test_int8.check_attn(replace(case, dtype=dtype), interpreted=True)


@pytest.mark.parametrize("case", [LARGE[2], LARGE[6], LARGE[7]], ids=str)
def test_attn_in_shares(on_gpu, monkeypatch, case):
    from amskv_kernels.ops.backends.triton import tiles

    on_gpu(90, 10_000)
    monkeypatch.setattr(tiles, "SHARE_TILES", 1)
    test_int8.check_attn(case, interpreted=True)


@FLOATS
@pytest.mark.parametrize("n", [3, 20])
def test_values_of_every_size(n, dtype):
    test_int8.check_sizes(n, dtype, interpreted=True)


@pytest.mark.parametrize("what", SPOILT)
@pytest.mark.parametrize("n", [3, 20])
def test_what_is_no_number_among_the_current_rows(what, n):
    test_int8.check_spoilt(Case(n=n, history=(16, 16, 3)), torch.float16, what)


@pytest.mark.parametrize("which", [0, 1], ids=["a key", "a value"])
@pytest.mark.parametrize("n", [3, 20])
def test_a_stored_row_that_holds_nan_spoils_its_own_head_alone(which, n):
    test_int8.check_stored_nan(which, n)


@pytest.mark.parametrize("case", [case for case in SMALL + LARGE if case.stored][::2], ids=str)
def test_append_is_the_reference(case):
    test_int8.check_append(case)


@pytest.mark.parametrize("mode", ["softmax", "sum_logits"])
@pytest.mark.parametrize("case", SCORE_CASES, ids=str)
def test_window_scores_are_the_reference(case, mode):
    test_int8.check_scores(case, mode)


@pytest.mark.parametrize(("case", "kept"), COMPACT_CASES, ids=str)
def test_compact_is_the_reference(case, kept):
    test_int8.check_compact(case, kept)


@FLOATS
@pytest.mark.parametrize("n", [4, 40])
def test_stores_round_to_the_very_bytes(dtype, n):
    """Ties, tiny rows, rows at the end of the range, zeros and rows that are no numbers, by packed heads and others."""
    x = torch.randn(n, 64) * 2.0 ** torch.randint(-20, 12, (n, 1))
    x[0] = torch.arange(64) + 0.5
    x[0, 63] = 127
    x[1], x[2, 3], x[3, 3] = 0, torch.nan, -torch.inf
    if dtype == torch.float32:
        x[-1] *= quantise.LEAST_ROW / x[-1].abs().max() * 0.999
    case = Case(n=n, batch=1, heads=1, kv_heads=1, stored=(16,) * (n // 16) + (n % 16,), dtype=dtype)
    q, _, _, pages, arena, read, write, scale, scales = test_int8.make_eight_bit(case)
    k = x.to(dtype).view(1, n, 1, 64)
    expected, expected_scales = pages.clone(), scales.clone()
    reference.append(k, k.flip(3), expected, arena, write, expected_scales)
    torch.ops.amskv.attn(q, k, k.flip(3), pages, arena, read, write, scale, scales)
    assert torch.equal(pages, expected)
    assert torch.equal(scales.view(torch.int32), expected_scales.view(torch.int32))
