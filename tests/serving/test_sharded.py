"""An engine over two processes: the images of one, half the pages in each, and an end to all when one dies."""

import os
import random
import signal
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from ranks import Ranks
from small_engines import SAMPLING, SCHEDULE, Unlike
from small_models import pair
from torch.distributed.device_mesh import DeviceMesh

from amskv_kernels.models.tensor_parallel import shard
from amskv_kernels.serving import CancelledError, ClosedError, Engine, ShardedEngine

SIZES = {"depth": 2, "embed_dim": 256, "num_heads": 4}
MEMORY = 3 * 2**20  # of all heads


def model():
    torch.manual_seed(3)
    return pair(SCHEDULE, **SIZES)


def arrivals(served, seed, count):
    """Requests at random ticks, some given up on the way: each one's tokens, None where it was given up."""
    rng, handles = random.Random(seed), []
    while len(handles) < count or any(not handle.done for handle in handles):
        for _ in range(min(count - len(handles), rng.choice((0, 0, 1, 2, 3)))):
            limits = {"guidance": rng.choice((0.0, 1.5, 3.0)), "top_k": rng.choice((0, 7)), "top_p": 0.9}
            handles.append(served.submit(rng.randrange(6), seed=rng.randrange(2**63), **limits))
        for handle in handles:
            if rng.random() < 0.05:
                handle.cancel()
        served.tick()
        assert served.load.used == served.load.planned <= served.load.units
    return [tokens_of(handle) for handle in handles]


def tokens_of(handle):
    try:
        return handle.result(0).tokens
    except CancelledError:
        return None


def sharded_arrivals(mesh, policy, seed, count):
    var, vae = model()
    served = ShardedEngine(shard(var, mesh), vae, policy, memory=MEMORY // 2)
    found = arrivals(served, seed, count) if served.first else served.follow()
    served.drain()
    return found, served.pool.nbytes, served.pool.used, served.load.drawn, served._model.tokens


@pytest.mark.parametrize("policy", ["full", "ams-kv:60"])
def test_images_are_those_of_one_process(two_ranks, policy):
    whole = Engine(*model(), policy, memory=MEMORY)
    expected = arrivals(whole, 7, 14)
    (found, *first, tokens), (none, *other, other_tokens) = two_ranks.run(sharded_arrivals, policy, 7, 14)
    assert none is None and first == other == [whole.pool.nbytes / 2, 0, whole.load.drawn]
    assert torch.equal(tokens, other_tokens)
    for own, one in zip(found, expected, strict=True):
        assert own is one is None or torch.equal(own, one)
    assert sum(one is not None for one in expected) >= 7 and None in expected


def idle_then_one(mesh):
    """In the engine's thread, through a pause of several beats."""
    var, vae = model()
    ShardedEngine.beat = 0.05
    with ShardedEngine(shard(var, mesh), vae, "full", memory=MEMORY) as served:
        if not served.first:
            served.follow()
            return None
        time.sleep(0.3)
        return served.submit(2, seed=5, **SAMPLING).result(100).tokens


def test_the_thread_of_the_first_process_keeps_the_others_going(two_ranks):
    with Engine(*model(), "full", memory=MEMORY) as whole:
        expected = whole.submit(2, seed=5, **SAMPLING).result(100).tokens
    found, none = two_ranks.run(idle_then_one)
    assert torch.equal(found, expected) and none is None


def refusals(mesh):
    var, vae = model()
    said = {}
    for name, make in {
        "whole": lambda: ShardedEngine(var, vae, "full", memory=MEMORY),
        "sharded": lambda: Engine(shard(var, mesh), vae, "full", memory=MEMORY),
        "heads": lambda: ShardedEngine(var, vae, Unlike(), memory=MEMORY),
        "tokens": lambda: ShardedEngine(var, vae, "h2o:50", memory=MEMORY),
    }.items():
        with pytest.raises(ValueError) as refused:
            make()
        said[name] = str(refused.value)
    with pytest.MonkeyPatch.context() as patched, pytest.raises(ValueError) as refused:
        patched.setattr(dist, "get_backend_config", lambda group: "cuda:nccl")
        ShardedEngine(var, vae, "full", memory=MEMORY)
    said["backends"] = str(refused.value)
    served = ShardedEngine(var, vae, "full", memory=MEMORY)
    with pytest.raises(RuntimeError) as refused:
        served.follow() if served.first else served.submit(0)
    served.drain() if served.first else served.follow()
    return said, str(refused.value)


def test_wrong_uses_are_named(two_ranks):
    (first, following), (other, submitting) = two_ranks.run(refusals)
    assert (
        first
        == other
        == {
            "whole": "var is not sharded; an Engine draws with it, or shard it first",
            "sharded": "var is sharded over 2 processes; a ShardedEngine draws with it",
            "heads": first["heads"],
            "tokens": first["tokens"],
            "backends": "var's mesh speaks over cuda:nccl; an engine's words go over the CPU: let it be made by "
            "torch.distributed.init_process_group('cpu:gloo,cuda:nccl')",
        }
    )
    assert "policy is a Unlike, which tells heads apart" in first["heads"]
    assert "serving runs policies that keep whole scales" in first["tokens"]
    assert following == "this process is the first, which takes the requests; the others follow"
    assert submitting == "another process of this sharded model takes the requests, the first; follow() it"


def test_one_process_is_an_engine(two_ranks):
    found = two_ranks.run(drawn_by_the_first_alone)[0]
    with Engine(*model(), Unlike(), memory=MEMORY) as whole:
        assert torch.equal(found, whole.submit(2, seed=5, **SAMPLING).result(100).tokens)


def drawn_by_the_first_alone(mesh):
    alone = DeviceMesh("cpu", [0])
    if mesh.get_local_rank():
        return None
    var, vae = model()
    with ShardedEngine(shard(var, alone), vae, Unlike(), memory=MEMORY) as served:
        return served.submit(2, seed=5, **SAMPLING).result(100).tokens


def one_says_nothing(mesh):
    var, vae = model()
    served, said = ShardedEngine(shard(var, mesh), vae, "full", memory=MEMORY), None
    if not served.first:
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=1), mesh.get_group())
        with pytest.raises(RuntimeError) as failed:
            served.follow()
        said = str(failed.value)
    return said


def test_a_process_that_says_nothing_is_taken_for_dead():
    ranks = Ranks(2)
    try:
        assert "imed out" in ranks.run(one_says_nothing)[1]
    finally:
        ranks.close()


def one_dies(mesh, victim):
    """In the middle of an image, while others wait."""
    var, vae = model()
    served, told = ShardedEngine(shard(var, mesh), vae, "full", memory=MEMORY, max_images=1), []
    served.when_lost = lambda: told.append(str(served.lost))
    if mesh.get_local_rank() == victim:
        var.head.register_forward_pre_hook(lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    if not served.first:
        served.follow()
    handles = [served.submit(i, seed=i, **SAMPLING) for i in range(3)]
    while served.tick():
        pass
    said = []
    for handle in handles:
        with pytest.raises(RuntimeError) as failed:
            handle.result(0)
        said.append(str(failed.value))
    with pytest.raises(ClosedError):
        served.submit(0, **SAMPLING)
    served.close()
    return said, told, served.load.failed, served.pool.used


@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_that_dies_leaves_no_other_hanging(victim):
    ranks = Ranks(2)
    try:
        ranks.begin(one_dies, victim)
        found = ranks.results()
        assert found[victim] is None
        if victim == 0:
            assert isinstance(found[1], RuntimeError)
        else:
            said, told, failed, used = found[0]
            assert said == told * 3 and failed == 3 and used == 0
    finally:
        ranks.close()
