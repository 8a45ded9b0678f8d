"""What holds of `patch` whatever the family: wrappers, copies, compilers, lost handles, policies by name, costs."""

import copy
import functools
import io
import pickle

import numpy as np
import pytest
import torch
from families import FAMILIES
from torch import nn
from torch.distributed.fsdp import fully_shard

from amskv_kernels import AMSKV, Full, ScaleSchedule, SlidingWindow, patch, unpatch
from amskv_kernels.cache import OnlineKVCache

CLOSE = {"rtol": 0, "atol": 2e-4}


@pytest.fixture(params=FAMILIES)
def family(request):
    return FAMILIES[request.param]


def same(model, family, expected):
    torch.testing.assert_close(family.draw(model), expected, **CLOSE)


def hooked(module):
    """As accelerate's hooks do: the method stays on the module, a partial function takes its place."""
    calls = []

    def new_forward(module, *args, **kwargs):
        calls.append(module)
        return module._old_forward(*args, **kwargs)

    module._old_forward = module.forward
    module.forward = functools.update_wrapper(functools.partial(new_forward, module), module._old_forward)
    return calls


def test_a_hook_on_forward_is_called_through_and_kept(family):
    model = family.make()
    expected, attention = family.draw(model), family.attentions(model)[1]
    calls, wrapper = hooked(attention), attention.forward
    stock = attention._old_forward
    with patch(model, Full()) as patched:
        same(model, family, expected)
        assert len(calls) == len(family.schedule)
        assert patched.cache.step == len(family.schedule)
    assert vars(attention)["forward"] is wrapper
    assert attention._old_forward == stock
    calls.clear()
    assert torch.equal(family.draw(model), expected)
    assert len(calls) == len(family.schedule)


def test_a_hook_added_while_patched_outlives_the_patch(family):
    model = family.make()
    expected, attention = family.draw(model), family.attentions(model)[1]
    with patch(model, Full()):
        calls = hooked(attention)
        same(model, family, expected)
        assert len(calls) == len(family.schedule)
    assert torch.equal(family.draw(model), expected)
    assert len(calls) == 2 * len(family.schedule)


def test_a_wrapper_that_hides_the_stock_forward_comes_back(family):
    model = family.make()
    expected, attention = family.draw(model), family.attentions(model)[1]
    calls, stock = [], attention.forward
    attention.forward = wrapper = lambda *args, **kwargs: (calls.append(1), stock(*args, **kwargs))[1]
    with patch(model, Full()) as patched:
        same(model, family, expected)
        assert patched.cache.step == len(family.schedule)
        inside = attention.forward
    assert vars(attention)["forward"] is wrapper
    calls.clear()
    assert torch.equal(family.draw(model), expected)
    assert len(calls) == len(family.schedule)
    x = torch.randn(2, 1, 128)
    assert torch.equal(inside(x, *family.attends), stock(x, *family.attends))  # whoever kept ours gets the stock one


def test_a_compiled_attention_is_compiled_with_the_patch_and_without(family):
    model = family.make()
    expected, attention = family.draw(model), family.attentions(model)[1]
    compiled = torch.compile(attention, backend="eager")
    family.replace(model, 1, compiled)
    same(model, family, expected)
    with patch(model, Full()) as patched:
        same(model, family, expected)
        assert patched.cache.step == len(family.schedule)
    assert family.attentions(model)[1] is compiled
    same(model, family, expected)


class Wrapper(nn.Module):
    """As FSDP wraps: the module under a name of its own, attributes passed through."""

    def __init__(self, module):
        super().__init__()
        self._fsdp_wrapped_module = module

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self._fsdp_wrapped_module, name)

    def forward(self, *args, **kwargs):
        return self._fsdp_wrapped_module(*args, **kwargs)


def test_modules_inside_wrappers_are_patched(family):
    model = family.make()
    expected = family.draw(model)
    for layer, attention in enumerate(family.attentions(model)):
        family.replace(model, layer, Wrapper(attention))
    with patch(Wrapper(model), Full()) as patched:
        same(model, family, expected)
        assert patched.cache.step == len(family.schedule)
    assert torch.equal(family.draw(model), expected)


@pytest.fixture
def mesh():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("when", ["before", "after"])
def test_sharded_modules_are_patched_and_undone(family, mesh, when):
    model = family.make()
    expected = family.draw(model)

    def shard():
        for attention in family.attentions(model):
            fully_shard(attention, mesh=mesh)

    if when == "before":
        shard()
    patched = patch(model, Full())
    if when == "after":
        shard()
    same(model, family, expected)
    assert patched.cache.step == len(family.schedule)
    patched.undo()
    assert torch.equal(family.draw(model), expected)
    with patch(model, Full()) as patched:
        same(model, family, expected)
        assert patched.cache.step == len(family.schedule)
    assert torch.equal(family.draw(model), expected)


def pickled(model):
    return pickle.loads(pickle.dumps(model))


def saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled, saved], ids=lambda f: f.__name__)
def test_copies_are_unpatched_and_have_their_own_weights(family, duplicate):
    model = family.make()
    expected = family.draw(model)
    patched = patch(model, SlidingWindow(1))
    mine = family.draw(model)
    assert not torch.allclose(mine, expected, **CLOSE)
    other = duplicate(model)
    assert torch.equal(family.draw(other), expected)
    assert [type(each) for each in other.modules()] == [type(each) for each in family.make().modules()]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(family.draw(other), expected)
    with patch(other, Full()):  # a patch of its own
        same(other, family, expected)
    patched.undo()
    assert torch.equal(family.draw(other), expected)


def test_a_copy_of_a_hooked_module_hooks_itself(family):
    model = family.make()
    expected = family.draw(model)
    hooked(family.attentions(model)[1])
    with patch(model, SlidingWindow(1)):
        other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(family.draw(other), expected)


def replicas(model, monkeypatch):
    """Those of `torch.nn.DataParallel`, two on the CPU."""
    from torch.nn.parallel import replicate

    module = __import__("sys").modules[replicate.__module__]
    monkeypatch.setattr(module, "_get_device_index", lambda device, *_: device)
    monkeypatch.setattr(
        module, "_broadcast_coalesced_reshape", lambda tensors, devices, detach=False: [
            [tensor.detach().clone() for tensor in tensors] for _ in devices
        ]
    )  # fmt: skip
    return replicate(model, [0, 1])


def test_replicas_run_their_own_weights_or_refuse(family, monkeypatch):
    attention = family.attentions(model := family.make())[0]
    x, mask = torch.randn(2, 4, 128), torch.zeros(1, 1, 4, 4)
    expected = attention(x, mask)
    with patch(model, Full()):
        family.draw(model)
        first, _ = replicas(attention, monkeypatch)
        with torch.no_grad():
            for parameter in attention.parameters():
                parameter.zero_()
        assert torch.equal(first(x, mask), expected)
        with pytest.raises(RuntimeError, match="without a cache of its own; patch a copy"):
            first.kv_caching(True)
        attention.kv_caching(True)
        with pytest.raises(RuntimeError, match="without a cache of its own; patch a copy"):
            first(x, *family.attends)


def test_a_lost_handle_is_undone(family):
    model = family.make()
    expected, before = family.draw(model), [(type(m), set(vars(m))) for m in model.modules()]
    patch(model, SlidingWindow(1))
    with pytest.raises(ValueError, match=r"model is patched already; undo\(\) that patch first, or call unpatch"):
        patch(model, Full())
    unpatch(model)
    unpatch(model)
    assert [(type(m), set(vars(m))) for m in model.modules()] == before
    assert torch.equal(family.draw(model), expected)
    patch(model, Full())
    unpatch(Wrapper(model))
    assert torch.equal(family.draw(model), expected)


@pytest.mark.parametrize(
    "policy",
    ["full", lambda schedule: SlidingWindow(len(schedule)), lambda _: "full", "scalekv:100"],
    ids=["text", "function", "function to text", "tokens"],
)
def test_a_policy_by_name_or_by_function_is_made_for_the_schedule_at_hand(family, policy):
    model = family.make()
    expected = family.draw(model)
    with patch(model, policy) as patched:
        same(model, family, expected)
        assert patched.plan.schedule == family.schedule


def test_a_policy_string_is_the_policy(family):
    model = family.make()
    with patch(model, AMSKV.for_saving(family.schedule, 3, 0.75)):
        expected = family.draw(model)
    with patch(model, "ams-kv:75"):
        assert torch.equal(family.draw(model), expected)


@pytest.mark.parametrize("theta", [-100.0, 100.0])
def test_the_online_mode_decides_as_it_goes(family, theta):
    model = family.make()
    policy = AMSKV.with_capacity(9, 40)
    with patch(model, policy, online=True, theta=theta) as patched:
        got = family.draw(model)
        assert isinstance(patched.cache, OnlineKVCache)
        assert patched.plan is None
        assert set(patched.cache.demanding_layers) == (set() if theta < 0 else {0, 1, 2})
        cache = patched.cache
        assert torch.equal(family.draw(model), got)
        assert patched.cache is cache
    table = tuple((0.0,) * len(family.schedule) for _ in range(3))  # so that every layer turns, or none does
    with patch(model, AMSKV.with_capacity(9, 40, similarity=table, theta=theta)):
        torch.testing.assert_close(family.draw(model), got, **CLOSE)


def test_the_online_mode_takes_the_policys_own_theta_and_refuses_others(family):
    model = family.make()
    table = tuple((0.0,) * len(family.schedule) for _ in range(3))
    own = AMSKV.with_capacity(9, 40, similarity=table, theta=-1.0)
    with patch(model, own, online=True) as patched:
        family.draw(model)
        assert patched.cache.theta == -1.0
    for arguments, kind, message in (
        ({"policy": AMSKV.with_capacity(9, 40), "online": True}, ValueError, "theta is None; the online mode needs"),
        ({"policy": Full(), "online": True, "theta": 0.0}, TypeError, r"policy is Full\(\); the online mode needs"),
        ({"policy": Full(), "theta": 0.0}, ValueError, "theta is 0.0; it means something to online=True alone"),
    ):
        with pytest.raises(kind, match=message), patch(model, **arguments):
            family.draw(model)


@pytest.mark.parametrize("online", [False, True], ids=["planned", "online"])
def test_pages_of_eight_bits_change_the_image_little(family, online):
    model = family.make()
    expected = family.draw(model)
    policy = AMSKV.with_capacity(2000, 4000) if online else Full()
    with patch(model, policy, pages="int8", online=online, theta=-100.0 if online else None) as patched:
        found = family.draw(model)
        pool = patched.cache._pool._pool if online else patched.cache.pages
        assert pool.dtype == torch.int8
    error = (found - expected).float().square().mean().sqrt()
    assert 0 < error < 0.02 * expected.float().std(), "eight bits, not none, and not garbage"
    with pytest.raises(ValueError, match="pages is 'int4'; it must be 'int8', or None for the model's own dtype"):
        patch(model, Full(), pages="int4")
    same(model, family, expected)


def test_patch_nums_may_be_numpys():
    family = FAMILIES["VAR"]
    model = family.make()
    expected = family.draw(model)
    for numbers in (np.array(model.patch_nums), tuple(np.array(model.patch_nums)), [np.int32(p) for p in (1, 2, 3, 5)]):
        model.patch_nums = numbers
        with patch(model, Full()) as patched:
            same(model, family, expected)
            assert patched.plan.schedule == ScaleSchedule([(p, p) for p in (1, 2, 3, 5)])


def test_weights_changed_between_generations_count(family):
    model = family.make()
    with patch(model, Full()):
        family.draw(model)
        with torch.no_grad():
            for attention in family.attentions(model):
                attention.q_bias.mul_(-1)
                attention.scale_mul_1H11.sub_(1)
        got = family.draw(model)
    torch.testing.assert_close(got, family.draw(model), **CLOSE)
