"""Ticks of one mixture: the same calls on the same addresses, so a graph of one draws the next; nothing is kept."""

import pytest
import torch
from small_engines import SAMPLING, alone, engine
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from amskv_kernels.serving.batch import MOST_MIXTURES, groups_of


class Recording(TorchDispatchMode):
    """The calls that a tick makes, as a CUDA graph holds them: tensors by address, everything else by value."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        found = op(*args, **(kwargs or {}))
        self.calls.append((op, args, kwargs or {}, found))
        return found

    def replay(self):
        for op, args, kwargs, before in self.calls:
            for old, new in zip(tree_leaves(before), tree_leaves(op(*args, **kwargs)), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class Replays:
    """In place of `Graphs`: the first tick of a mixture is recorded, all others replay it."""

    def __init__(self):
        self.recordings, self.replayed = {}, 0

    def run(self, mixture, tick):
        if mixture in self.recordings:
            self.replayed += 1
            return self.recordings[mixture].replay()
        self.recordings[mixture] = Recording()
        with self.recordings[mixture]:
            tick()

    def clear(self):
        self.recordings.clear()


@pytest.mark.parametrize("policy", ["full", "sliding:1"])
def test_a_recorded_tick_draws_those_that_follow(policy):
    served = engine(policy, 2)
    served._model._graphs = Replays()
    handles = [served.submit(i % 6, seed=i, guidance=(0.0, 2.0)[i % 3 > 0], top_k=5 + i, top_p=0.9) for i in range(16)]
    while served.tick():
        pass
    assert served._model._graphs.replayed > 10
    for i, handle in enumerate(handles):
        own = alone(i % 6, i, policy, guidance=(0.0, 2.0)[i % 3 > 0], top_k=5 + i, top_p=0.9)
        assert torch.equal(handle.result(0).tokens, own.tokens[0])


def test_addresses_stay():
    served = engine(images=2)
    for i in range(30):
        served.submit(i % 6, seed=i, **SAMPLING)
    seen: dict[object, set] = {}
    run = served._model._graphs.run

    def watch(mixture, tick):
        tables = [mixture.places, mixture.conditions, *mixture.limits, mixture.read, mixture.write]
        fixed = [table.device for table in tables] + [mixture.source, mixture.position, mixture.other, mixture.starts]
        state = [served.pool.pages, served.pool.arena, served._model.fhat, served._model.tokens, served._model._layers]
        seen.setdefault(mixture, set()).add(tuple(x.data_ptr() for x in (*fixed, *state)))
        run(mixture, tick)

    served._model._graphs.run = watch
    while served.tick():
        pass
    assert served.load.ticks > 2 * len(seen) and all(len(addresses) == 1 for addresses in seen.values())


def test_a_tick_keeps_no_memory():
    served = engine(images=3)
    for i in range(40):
        served.submit(i % 6, seed=i, **SAMPLING)
    for _ in range(12):
        served.tick()
    kept = []
    for _ in range(10):
        before = served.load.drawn
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
            served.tick()
        ended, taken = served.load.drawn - before, [event.self_cpu_memory_usage for event in found.key_averages()]
        assert max(taken) > 0
        kept.append((sum(taken), ended))
    for size, ended in kept:  # an image that is done is given away
        assert size <= ended * (3 * 12 * 12 * 4 * 2 + served.config.schedule.total * 8 + 4096)


def test_mixtures_that_have_not_come_for_long_are_forgotten():
    served = engine(images=4)
    tokens, mixtures = served.plan.schedule.tokens, served._mixtures
    first = None
    for images in range(1, MOST_MIXTURES + 2):
        steps = torch.zeros(images, dtype=torch.int64).numpy()
        groups = groups_of(steps, steps == 0, tokens)
        found = mixtures.of(groups)
        assert mixtures.of(groups) is found
        first = first or groups
    assert len(mixtures._found) == MOST_MIXTURES
    again = mixtures.of(first)
    assert again.rows == 2 and len(mixtures._found) == MOST_MIXTURES
