"""What a patched attention costs before its kernels run: dispatcher calls, and graphs where blocks are compiled."""

from collections import Counter

import public_var
import pytest
import torch
from families import FAMILIES
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from amskv_kernels import Full, PagedKVCache, patch

CLOSE = {"rtol": 0, "atol": 2e-4}


@pytest.fixture(params=FAMILIES)
def family(request):
    return FAMILIES[request.param]


class Calls(TorchDispatchMode):
    """Counts what goes through the dispatcher."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.counts[str(function.overloadpacket)] += 1
        return function(*args, **(kwargs or {}))


def calls_of(model, family):
    attention, counted = family.attentions(model)[1], []
    forward = attention.forward

    def counting(*args, **kwargs):
        with Calls() as calls:
            out = forward(*args, **kwargs)
        counted.append(calls.counts)
        return out

    attention.forward = counting
    with torch.inference_mode():
        family.draw(model)
    del attention.forward
    return counted


# Two linears of four calls each (view, t, addmm, view), prepare_qk, and views: of qkv as heads, of v, of the output.
MOST_CALLS = 12


def test_an_attention_takes_few_dispatcher_calls_beside_the_cache(family, monkeypatch):
    attend = PagedKVCache.attend

    def uncounted(*args):
        with _disable_current_modes():
            return attend(*args)

    monkeypatch.setattr(PagedKVCache, "attend", uncounted)
    model = family.make()
    stock = calls_of(model, family)
    with patch(model, Full()):
        first, *steps = calls_of(model, family)
    for count in steps:
        assert count["amskv.prepare_qk"] == 1
        assert sum(count.values()) <= MOST_CALLS
    assert sum(first.values()) <= MOST_CALLS + 8  # bias and query length, once a generation
    assert min(sum(count.values()) for count in stock[1:]) > MOST_CALLS + 8


def graphs(model, draw):
    """A model's images with each of its blocks compiled, twice, and of how many graphs the blocks were made."""
    blocks = model.blocks if hasattr(model, "blocks") else model.unregistered_blocks
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for block in blocks:
        block.compile(backend="eager")
    with torch.no_grad(), torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        images = [draw(model), draw(model)]
    made = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for block in blocks:
        block._compiled_call_impl = None
    torch._dynamo.reset()
    return images, made


# A block is cut at its attentions, into 3 pieces in VAR and 6 in Infinity; each is compiled for one token and for many.
@pytest.mark.parametrize("steps", [5, 10])
def test_compiled_blocks_of_var_give_six_graphs_however_many_steps_and_layers(steps):
    torch.manual_seed(0)
    model = public_var.VAR(depth=9, patch_nums=tuple(range(1, steps + 1))).eval()
    expected = FAMILIES["VAR"].draw(model)
    with patch(model, Full()):
        got, made = graphs(model, FAMILIES["VAR"].draw)
    assert made <= 6
    for image in got:
        torch.testing.assert_close(image, expected, **CLOSE)


def test_compiled_blocks_of_infinity_give_a_dozen_graphs_however_many_scales():
    family = FAMILIES["Infinity"]
    model = family.make()
    expected = family.draw(model)
    with patch(model, Full()):
        got, made = graphs(model, family.draw)
    assert made <= 12
    for image in got:
        torch.testing.assert_close(image, expected, **CLOSE)
