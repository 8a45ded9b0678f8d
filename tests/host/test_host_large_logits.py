"""Logits up to the largest that fp32 scores hold: one fused multiply-add per score, and no weight lost."""

from __future__ import annotations

from dataclasses import replace

import cases
import hostlib
import large_logits
import pytest
import torch
from cases import Case

from amskv_kernels.ops import reference

PORTABLE = [(16, 2, 2, 1), (32, 4, 1, 1), (16, 2, 1, 3)]  # the last with split keys
HOPPER = [(64, 2), (128, 1)]
CASES = [Case(n=70, batch=1, history=(16,) * 12, plan=plan) for plan in PORTABLE]
CASES += [Case(n=150, batch=1, heads=1, kv_heads=1, history=(16,) * 12, hopper=tile) for tile in HOPPER]


def judge(module, case: Case, inputs: cases.Inputs, values: float) -> None:
    truth, truth_lse = reference.attn(*(x.clone() for x in inputs.tables), inputs.scale)
    cases.run(module, case, inputs, "eager")
    large_logits.check(inputs.out, inputs.lse, truth, truth_lse, values)


def spread(case: Case) -> cases.Inputs:
    inputs = cases.make(case)
    large_logits.enlarge(inputs.q, inputs.k, inputs.pages, case.seed)
    return inputs


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_rows_of_every_size(case, dtype):
    case = replace(case, dtype=dtype)
    inputs = spread(case)
    judge(hostlib.load(), case, inputs, float(inputs.v.abs().max()))


@pytest.mark.parametrize("value", [133120.0, -133120.0, 327680.0])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_equal_scores_stay_equal(case, value):
    """Queries and keys of one value: fp32 has no scores between them, so every key weighs the same."""
    inputs = cases.make(case)
    inputs.q.fill_(value), inputs.k.fill_(abs(value)), inputs.v.fill_(1)
    inputs.pages[:, 0][~inputs.pages[:, 0].isnan()] = abs(value)
    inputs.pages[:, 1][~inputs.pages[:, 1].isnan()] = 1
    judge(hostlib.load(), case, inputs, 1)


@pytest.mark.skipif(not hostlib.FUSES, reason="this CPU has no fused multiply-add")
@pytest.mark.parametrize("case", [CASES[0], CASES[-1]], ids=str)
def test_a_shift_off_by_its_rounding_does_not_pass(case, tmp_path):
    """As it was before, which a build without fused multiply-adds does not notice."""
    faulty = hostlib.load_with_fault("common/softmax.cuh", "kMaxShift = 0x1p28f", "kMaxShift = 0x1p127f", tmp_path)
    with pytest.raises(AssertionError):
        judge(faulty, case, spread(case), 8)
