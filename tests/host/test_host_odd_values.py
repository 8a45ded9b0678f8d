"""NaN and infinities in the CUDA kernels: they spoil the rows they stand in and no other, split keys included."""

from __future__ import annotations

import cases
import hostlib
import pytest
import torch
from attn_cases import SPOILT, same_kinds, spoilt
from cases import Case

from amskv_kernels.ops import reference

PLANS = {
    "portable": {"plan": (16, 2, 1, 1)},
    "split": {"plan": (16, 1, 1, 3), "history": (16,) * 7 + (3,)},
    "hopper": {"hopper": (64, 2), "n": 70},
}


@pytest.mark.parametrize("what", SPOILT)
@pytest.mark.parametrize("plan", PLANS)
def test_what_is_no_number_spoils_its_own_rows(plan, what):
    case = Case(**{"n": 20, "batch": 1, "packed": False, **PLANS[plan]})
    inputs = cases.make(case)
    args = spoilt((*inputs.tables, inputs.scale), what)
    inputs.q, inputs.k, inputs.v, inputs.pages = args[:4]
    truth, truth_lse = reference.attn(*args[:3], args[3].clone(), *args[4:])
    cases.run(hostlib.load(), case, inputs, "eager")
    assert same_kinds(inputs.out, truth)
    assert same_kinds(inputs.lse, truth_lse)
    torch.testing.assert_close(inputs.out.double(), truth, rtol=3e-2, atol=3e-2, equal_nan=True)
