"""What must hold of a patched model of any family, for stand-ins and for clones of the public code alike."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from amskv_kernels import AMSKV, Full, Policy, Sink, SlidingWindow, patch
from amskv_kernels.policies.around import Around
from amskv_kernels.schedule import ScaleSchedule

POLICIES = (SlidingWindow(1), Sink(1, 1), AMSKV(condensed=0, local=1, demanding_local=2, demanding_layers=(1,)))


class Case(NamedTuple):
    """A small model of a family.

    Attributes:
        make: a model; the same weights each time.
        draw: what it draws.
        layers: its self-attentions, in order.
        blocks: what a user compiles.
        around: the maps, and what stands around them.
        hide: makes one self-attention see but what a function of the step shows.
        close: the largest difference, relative, between two ways to round.
    """

    make: Callable[[], nn.Module]
    draw: Callable[[nn.Module], Tensor]
    layers: Callable[[nn.Module], list[nn.Module]]
    blocks: Callable[[nn.Module], list[nn.Module]]
    around: Around
    hide: Callable[[nn.Module, Callable[[int], tuple[int, ...]]], None] | None = None
    close: float = 1e-4

    def visible(self, policy: Policy, layer: int, step: int) -> tuple[int, ...]:
        """Steps that a layer reads at a step of the whole generation."""
        at = self.around.step(step)
        shown = () if at < 0 else policy.visible(self.around.maps, layer, at)
        return self.around.scales(shown, layer, step)


def difference(one: Tensor, other: Tensor) -> float:
    """The largest, over the size of what is compared with."""
    return float((one - other).abs().max() / other.abs().max())


@contextmanager
def forgetful(case: Case, model: nn.Module, policy: Policy):
    """The model's own attention, which forgets what the policy does not show: its cache loses those rows."""
    attentions = case.layers(model)
    for layer, attention in enumerate(attentions):
        (case.hide or forget)(attention, lambda step, layer=layer: case.visible(policy, layer, step))
    yield
    for attention in attentions:
        for name in ("forward", "kv_caching"):
            vars(attention).pop(name, None)


def narrow(attention: nn.Module, visible: Callable[[int], tuple[int, ...]]) -> None:
    """For an attention that is told what it may see: it is told less."""
    forward = attention.forward

    def narrowed(x, mask, function, turns, sizes, scale, info, *more):
        if isinstance(scale, int):
            seen = [each for each in info[scale]["ref_sids"] if each + 1 in visible(scale + 1)]
            info = {**info, scale: {"ref_sids": seen}}
        return forward(x, mask, function, turns, sizes, scale, info, *more)

    attention.forward = narrowed


def forget(attention: nn.Module, visible: Callable[[int], tuple[int, ...]]) -> None:
    """For an attention that concatenates: its cache loses the rows of what is not to be seen."""
    forward, kv_caching, counts, held = attention.forward, attention.kv_caching, [], []

    def caching(enable):
        counts.clear(), held.clear()
        kv_caching(enable)

    def forgetting(x, *args, **kwargs):
        step, shown = len(counts), visible(len(counts))
        if attention.caching and attention.cached_k is not None and held:
            kept = [torch.full((n,), each in shown) for each, n in held]
            rows = torch.cat(kept)
            attention.cached_k, attention.cached_v = attention.cached_k[:, :, rows], attention.cached_v[:, :, rows]
            held[:] = [(each, n) for each, n in held if each in shown]
        before = 0 if attention.cached_k is None else attention.cached_k.shape[2]
        out = forward(x, *args, **kwargs)
        counts.append(x.shape[1])
        after = 0 if attention.cached_k is None else attention.cached_k.shape[2]
        if after > before:
            held.append((step, after - before))
        return out

    attention.forward, attention.kv_caching = forgetting, caching


def full_is_stock(case: Case) -> float:
    """The difference that Full() makes, twice over the same cache."""
    model = case.make()
    expected = case.draw(model)
    with patch(model, Full()) as patched:
        first = case.draw(model)
        cache = patched.cache
        again = case.draw(model)
        assert patched.cache is cache and torch.equal(first, again)
    return difference(first, expected)


def policies_are_masks(case: Case) -> float:
    """The largest difference to the model's own attention, made to forget; each policy must show in the images."""
    model, largest = case.make(), 0.0
    stock = case.draw(model)
    for policy in POLICIES:
        with patch(model, policy):
            got = case.draw(model)
        with forgetful(case, model, policy):
            expected = case.draw(model)
        assert difference(expected, stock) > 1e-3, f"{policy} does not show"
        largest = max(largest, difference(got, expected))
    return largest


def undo_leaves_nothing(case: Case) -> None:
    """An undone model is as it was, bit for bit."""
    model = case.make()
    expected = case.draw(model)
    before = [(type(module), set(vars(module))) for module in model.modules()]
    with patch(model, SlidingWindow(1)):
        assert not torch.equal(case.draw(model), expected)
    assert [(type(module), set(vars(module))) for module in model.modules()] == before
    assert torch.equal(case.draw(model), expected)


def copies_are_their_own(case: Case, pickles: bool = True) -> None:
    """Copies of a patched model are unpatched, have weights of their own and can be patched."""
    for duplicate in (copy.deepcopy, *([lambda pair: pickle.loads(pickle.dumps(pair))] if pickles else [])):
        model = case.make()
        expected = case.draw(model)
        with patch(model, SlidingWindow(1), observe=lambda *call: None) as patched:
            case.draw(model)
            other, handle = duplicate((model, patched))
            assert "(undone)" in repr(handle) and handle.cache is None and "KVCache(" in repr(patched)
            handle.undo()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.zero_()
            assert torch.equal(case.draw(other), expected)
            with patch(other, Full()):
                assert difference(case.draw(other), expected) < case.close


def compiled_graphs(case: Case) -> int:
    """Of how many graphs the compiled blocks of a patched model are made, drawing twice."""
    model = case.make()
    expected = case.draw(model)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for block in case.blocks(model):
        block.compile(backend="eager")
    with patch(model, Full()), torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        for _ in range(2):
            assert difference(case.draw(model), expected) < case.close
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    torch._dynamo.reset()
    return graphs


def around_of(schedule: ScaleSchedule, **what) -> Around:
    """No prefix unless told."""
    return Around(schedule, **{"prefix": 0, **what})
