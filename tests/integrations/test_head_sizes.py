"""Heads of sizes without kernels through `patch`, as Infinity layer32, layer40 and layer48 have them, by family."""

import checks
import families
import public_infinities
import public_relatives
import public_star
import public_var
import pytest
import test_infinitystar
import test_relatives
import torch

from amskv_kernels import AMSKV, H2O, Full, ScaleKV, patch
from amskv_kernels.models.infinity import InfinityConfig, InfinityStack

CASES = {**test_relatives.CASES, "InfinityStar": test_infinitystar.CASE}
# A size of each released model; the stand-ins of one family are the same code for all of them.
SIZES = dict(zip(CASES, (104, 112, 120, 104, 112, 120, 104), strict=True))


@pytest.fixture(params=CASES)
def family(request, monkeypatch):
    """A family's case, with heads of another size."""
    head_dim = SIZES[request.param]
    for module in (public_relatives, public_infinities, public_star):
        monkeypatch.setattr(module, "HEAD_DIM", head_dim)
        monkeypatch.setattr(module, "WIDTH", module.HEADS * head_dim)
    return CASES[request.param], head_dim


def test_full_is_stock_and_policies_are_masked_truth(family):
    case, head_dim = family
    assert checks.full_is_stock(case) < 1e-5
    if case is not test_infinitystar.CASE:  # its public class forgets by a rule of its own
        assert checks.policies_are_masks(case) < 1e-5
    model, seen = case.make(), []
    with patch(model, Full(), observe=lambda layer, *qkv: seen.append([each.shape[3] for each in qkv[:3]])) as patched:
        case.draw(model)
        assert f"head_dim={head_dim} in rows of 128" in repr(patched.cache)
    assert seen[0] == seen[-1] == [head_dim] * 3, "an observer gets heads as they are"


@pytest.mark.parametrize("l2_norm", [True, False])
def test_a_var_of_any_head_size(l2_norm):
    torch.manual_seed(7)
    model = public_var.VAR(attn_l2_norm=l2_norm, head_dim=72).eval()
    draw = families.FAMILIES["VAR"].draw
    expected = draw(model)
    with patch(model, Full()):
        torch.testing.assert_close(draw(model), expected, rtol=0, atol=2e-4)


@pytest.mark.parametrize("head_dim", [104, 112, 120])
def test_infinity_under_every_kind_of_cache_and_page(head_dim):
    torch.manual_seed(5)
    model = InfinityStack(InfinityConfig(layers=3, width=2 * head_dim, heads=2, chunks=3)).eval()
    draw = lambda: model.generate(families.prompts(width=2 * head_dim), families.SMALL)  # noqa: E731
    expected = draw()
    with patch(model, Full()):
        assert checks.difference(draw(), expected) < 1e-5
    with patch(model, Full(), pages="int8"):
        assert 0 < checks.difference(draw(), expected) < 0.05
    with patch(model, AMSKV.with_capacity(10**6, 10**6), online=True, theta=-1.0):
        assert checks.difference(draw(), expected) < 1e-5
    for policy in (H2O(1.0), ScaleKV(1.0, drafters=((0,),) * 2)):
        with patch(model, policy):
            assert checks.difference(draw(), expected) < 1e-5
    with patch(model, ScaleKV(0.4, drafters=((0,),) * 2)):
        assert torch.isfinite(draw()).all()
