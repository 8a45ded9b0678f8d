"""What surrounds the ops: gradients, autocast, threads, aliases, missing arguments, empty calls, prepared calls."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from attn_cases import Case, make
from extra_cases import make_compact, make_qk, make_scores
from ragged_cases import Ragged, make_ragged

import amskv_kernels
from amskv_kernels import AMSKV, CachePlan, Full, PagedKVCache, ScaleSchedule, ops
from amskv_kernels.cache import OnlineKVCache
from amskv_kernels.ops import reference

HALF = torch.float16
NAMES = list(ops.SCHEMAS)


def calls(dtype: torch.dtype = torch.float32) -> dict[str, tuple[list, list[int]]]:
    """Arguments of every op, and where those stand that may require grad."""
    case = Case(n=6, heads=4, history=(16, 2), stored=(6,), dtype=dtype)
    attn = list(make(case))
    pages, *rest = make_compact(Case(n=5, history=(16, 3), stored=(5,), dtype=dtype), (9,))
    return {
        "attn": (attn, [0, 1, 2]),
        "attn_ragged": (list(make_ragged(Ragged((4, 1, 7), heads=4, dtype=dtype), 3)), [0, 1, 2]),
        "append": ([*attn[1:5], attn[6]], [0, 1]),
        "prepare_qk": ([make_qk((2, 5, 6, 2, 64), (), dtype)["qkv"], 2], [0]),
        "window_scores": ([*make_scores(case), "softmax"], [0, 1]),
        "compact": ([pages.nan_to_num(0), *rest], [3, 4]),
    }


def op_of(name: str) -> Callable:
    return getattr(torch.ops.amskv, name)


EACH_INPUT = [(name, index) for name, (_, indices) in calls().items() for index in indices]


@pytest.mark.parametrize(("name", "index"), EACH_INPUT)
def test_backward_is_refused(name, index):
    args = calls()[name][0]
    args[index] = args[index].clone().requires_grad_()
    with pytest.raises(RuntimeError, match="no backward"):
        op_of(name)(*args)
    with torch.no_grad():
        op_of(name)(*args)


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
@pytest.mark.parametrize("name", NAMES)
def test_backward_is_refused_when_compiled(name, backend):
    args, (index, *_) = calls()[name]
    args[index] = args[index].clone().requires_grad_()

    def step(x):
        found = op_of(name)(*args[:index], x * 2, *args[index + 1 :])
        found = found if isinstance(found, tuple) else (found,)
        return sum(y.sum() for y in found if y is not None) + x.sum()

    torch._dynamo.reset()
    with pytest.raises(RuntimeError, match="no backward"):
        torch.compile(step, backend=backend)(args[index]).backward()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("transform", ["grad", "vjp", "jvp"])
def test_function_transforms_are_refused(name, transform):
    args, (index, *_) = calls()[name]

    def step(x):
        found = op_of(name)(*args[:index], x, *args[index + 1 :])
        return (found[0] if isinstance(found, tuple) else found).sum()

    x = args[index]
    with pytest.raises(RuntimeError, match="no backward"):
        if transform == "grad":
            torch.func.grad(step)(x)
        elif transform == "vjp":
            torch.func.vjp(step, x)
        else:
            torch.func.jvp(step, (x,), (torch.ones_like(x),))


@pytest.mark.parametrize("name", NAMES)
def test_forward_mode_is_refused(name):
    args, (index, *_) = calls()[name]
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(args[index], torch.ones_like(args[index]))
        with torch.no_grad(), pytest.raises(RuntimeError, match="no backward"):
            op_of(name)(*args[:index], dual, *args[index + 1 :])


def test_the_cache_refuses_what_the_ops_refuse():
    plan = CachePlan.build(ScaleSchedule([(1, 1), (2, 2)]), Full(), 1)
    q, k, v = torch.randn(2, 1, 6, 64).split(2, dim=2)
    cache = PagedKVCache(plan, batch=2, kv_heads=2, head_dim=64, dtype=torch.float32)
    with pytest.raises(RuntimeError, match="no backward"):
        cache.attend(0, q, k, v.clone().requires_grad_())
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="no backward"):
        cache.attend(0, forward_ad.make_dual(q, q), k, v)
    with pytest.raises(RuntimeError, match="no backward"):
        torch.func.grad(lambda x: cache.attend(0, x, k, v).sum())(q)
    assert cache.step == 0


NONSENSE = {
    "no tensor": (0, None, None),
    "no head size": (0, lambda q: q[..., :0], None),
    "one dimension": (0, lambda q: q.flatten(), None),
    "no dimension": (0, lambda q: q.sum(), None),
    "five dimensions": (0, lambda q: q[None], None),
    "integers": (0, lambda q: q.int(), None),
    "elsewhere": (0, lambda q: q.to("meta"), None),
    "heads that do not divide": (0, lambda q: torch.cat([q, q[:, :, :1]], 2), None),
    "no heads": (0, lambda q: q[:, :, :0], None),
    "last stride": (0, lambda q: q.transpose(2, 3).contiguous().transpose(2, 3), None),
    "scale of text": (0, lambda q: q, "1"),
    "scale of nothing": (0, lambda q: q, 0.0),
    "scale that is none": (0, lambda q: q, float("nan")),
    "layer of text": ("x", lambda q: q, None),
    "layer that is none": (None, lambda q: q, None),
    "layer of floats": (0.5, lambda q: q, None),
}


@pytest.mark.parametrize("online", [False, True], ids=["planned", "online"])
@pytest.mark.parametrize("what", NONSENSE)
def test_nonsense_for_the_cache_is_one_clear_line(what, online):
    layer, change, scale = NONSENSE[what]
    schedule, sizes = ScaleSchedule([(1, 1), (2, 2)]), {"batch": 2, "kv_heads": 2, "head_dim": 64}
    cache: PagedKVCache | OnlineKVCache
    if online:
        policy = AMSKV.with_capacity(1, 5, condensed=0)
        cache = OnlineKVCache(schedule, 1, policy, 0.0, dtype=torch.float32, **sizes)
    else:
        cache = PagedKVCache(CachePlan.build(schedule, Full(), 1), dtype=torch.float32, **sizes)
    q, k, v = torch.randn(2, 1, 6, 64).split(2, dim=2)
    with pytest.raises((TypeError, ValueError)) as caught:
        cache.attend(layer, change(q) if change else None, k, v, scale)
    assert "\n" not in str(caught.value)
    assert cache.visible(0) == () if online else (cache.step == 0 and (cache.pages == 0).all())
    cache.attend(0, q, k, v)


def test_a_copied_cache_writes_into_its_own_pool():
    """The prepared calls of a cache hold its pool; a copy must make its own."""
    plan = CachePlan.build(ScaleSchedule([(1, 1), (2, 2), (3, 3)]), Full(), 1)
    cache = PagedKVCache(plan, batch=2, kv_heads=2, head_dim=64, dtype=torch.float32)
    steps = [torch.randn(2, n, 6, 64).split(2, dim=2) for n in plan.schedule.tokens]
    expected = [cache.attend(0, *step) for step in steps]
    cache.reset()
    twin = copy.deepcopy(cache)
    cache.pages.fill_(torch.nan)
    for step, want in zip(steps, expected, strict=True):
        torch.testing.assert_close(twin.attend(0, *step), want)
    assert cache.pages.isnan().all()


def everything(result: object) -> list[torch.Tensor]:
    return [x for x in (result if isinstance(result, tuple) else (result,)) if x is not None]


@pytest.mark.parametrize("dtype", [torch.float32, HALF, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_autocast_changes_nothing(name, dtype):
    plain, cast = calls(dtype)[name][0], calls(dtype)[name][0]
    expected = everything(op_of(name)(*plain))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = everything(op_of(name)(*cast))
        assert torch.is_autocast_enabled("cpu"), "on again afterwards"
    for x, y in zip(got, expected, strict=True):
        assert x.dtype == y.dtype
        assert torch.equal(x, y)
    for x, y in zip(plain, cast, strict=True):
        assert not isinstance(x, torch.Tensor) or torch.equal(x.nan_to_num(7.0), y.nan_to_num(7.0)), "the pool too"


def test_backends_and_debug_belong_to_their_thread():
    inside, leave, seen = threading.Barrier(2), threading.Barrier(2), {}

    def work(name: str, debug: bool) -> None:
        with amskv_kernels.backend(name), amskv_kernels.debug(debug):
            inside.wait(10)
            seen[name] = (ops.choose("attn", "cpu").reason, ops.dispatch.settings().debug)
            leave.wait(10)
        seen[name] += (ops.dispatch.settings(),)

    threads = [threading.Thread(target=work, args=each) for each in (("torch", True), ("auto", False))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert seen["torch"] == ("forced", True, ("auto", False))
    assert seen["auto"][0] != "forced"
    assert seen["auto"][1:] == (False, ("auto", False))
    assert ops.dispatch.settings() == ("auto", False)


def test_overlapping_settings_each_undo_their_own():
    first, second = amskv_kernels.backend("torch"), amskv_kernels.debug()
    first.__exit__(None, None, None)
    assert ops.dispatch.settings() == ("auto", True)
    second.__exit__(None, None, None)
    assert ops.dispatch.settings() == ("auto", False)


def test_nothing_is_registered_after_the_import():
    """A call of another thread must never find an op without its kernel."""
    before = {name: torch._C._dispatch_dump(f"amskv::{name}") for name in NAMES}
    with amskv_kernels.backend("torch"), amskv_kernels.debug():
        op_of("attn")(*calls()["attn"][0])
    ops.choose("attn", "cuda")
    assert {name: torch._C._dispatch_dump(f"amskv::{name}") for name in NAMES} == before


ROWS = [
    ("attn", "q"), ("attn", "k"), ("attn", "v"), ("append", "k"), ("append", "v"), ("compact", "k"), ("compact", "v"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "row"), ROWS)
def test_rows_within_the_pages_that_are_written_are_refused(name, row):
    """Views of the very page that is written: what is read would depend on when it is stored."""
    *_, pages, arena, read, write, scale = make(Case(n=6, batch=1, heads=1, kv_heads=1, stored=(6,)))
    page = int(arena[0, 0]) + (int(write[0, 0, 0]) >> 8)
    pages[page] = torch.randn(2, 16, 64)
    rows = dict(zip("qkv", torch.randn(3, 1, 6, 1, 64), strict=True))
    rows[row] = pages[page, 1 if row == "k" else 0, 3:9].view(1, 6, 1, 64)
    q, k, v = rows.values()
    args = {
        "attn": (q, k, v, pages, arena, read, write, scale),
        "append": (k, v, pages, arena, write),
        "compact": (pages, arena, read, k, v, torch.arange(6).view(1, 1, 6), write),
    }[name]
    before = pages.clone()
    with pytest.raises(ValueError, match=f"{row} shares memory with pages, which this call writes"):
        op_of(name)(*args)
    assert torch.equal(pages.view(torch.uint8), before.view(torch.uint8))


def test_rows_within_pages_that_are_only_read_are_fine():
    args = make(Case(n=6, batch=1, heads=1, kv_heads=1, history=(16,)))
    pages, arena, read = args[3], args[4], args[5]
    page = int(arena[0, 0]) + (int(read[0, 0, 0]) >> 8)
    rows = [pages[page, i, 2:8].view(1, 6, 1, 64) for i in (0, 0, 1)]
    expected, _ = reference.attn(*(x.clone() for x in rows), *args[3:])
    out, _ = torch.ops.amskv.attn(*rows, *args[3:])
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_missing_arguments_are_named(name):
    args = calls()[name][0]
    parameters = ops.__dict__[name].__annotations__
    for index, parameter in enumerate(list(parameters)[: len(args)]):
        for nonsense in (None, "x", [1]):
            if parameter in ("q_scale", "cos", "sin"):
                continue
            bad = [*args[:index], nonsense, *args[index + 1 :]]
            with pytest.raises((TypeError, ValueError), match=f"^{parameter} is "):
                ops.__dict__[name](*bad)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "prepare_qk"])  # without its one tensor no device
def test_the_raw_ops_name_a_tensor_that_is_none(name):
    """The dispatcher lets None pass for a tensor; anything else it refuses itself."""
    args = calls()[name][0]
    for index, parameter in enumerate(list(ops.__dict__[name].__annotations__)[: len(args)]):
        if isinstance(args[index], torch.Tensor):
            with pytest.raises(TypeError, match=f"^{parameter} is None; it must be a Tensor"), torch.no_grad():
                op_of(name)(*args[:index], None, *args[index + 1 :])


@pytest.mark.parametrize("name", NAMES)
def test_every_op_says_what_it_does(name):
    assert ops.__dict__[name].__doc__ == op_of(name).__doc__
    assert "Raises" in op_of(name).__doc__ or "errors as for `attn`" in op_of(name).__doc__


EMPTY = [
    {"batch": 0}, {"n": 0}, {"batch": 0, "n": 0}, {"batch": 0, "history": ()}, {"n": 0, "history": ()},
    {"batch": 0, "per_batch": True, "per_head": True}, {"batch": 0, "stored": (5,)}, {"history": (0, 0)},
]  # fmt: skip


def check_empty_calls(shape: dict) -> None:
    """Every op where there are no sequences, no tokens or no history, on the backend of the moment."""
    case = Case(**{"n": 5, "history": (16, 2), "dtype": HALF, **shape})
    args = make(case)
    out, lse = torch.ops.amskv.attn(*args)
    truth, truth_lse = reference.attn(*args)
    assert out.dtype == HALF
    torch.testing.assert_close((out.double(), lse.double()), (truth, truth_lse), rtol=1e-2, atol=1e-2)
    torch.ops.amskv.append(*args[1:5], args[6])
    scores = make_scores(case)
    for mode in ("softmax", "sum_logits"):
        found, truth = torch.ops.amskv.window_scores(*scores, mode), reference.window_scores(*scores, mode)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), truth, rtol=1e-2, atol=1e-2)
    pages, *rest = make_compact(case, (2,) if case.n or case.history else ())
    expected = pages.clone()
    reference.compact(expected, *rest)
    torch.ops.amskv.compact(pages, *rest)
    assert torch.equal(pages.view(torch.uint8), expected.view(torch.uint8))
    q, k = torch.ops.amskv.prepare_qk(torch.zeros(case.batch, case.n, 4, 64, dtype=HALF), 1)
    assert (q.shape, k.shape) == ((case.batch, case.n, 2, 64), (case.batch, case.n, 1, 64))


@pytest.mark.parametrize("shape", EMPTY, ids=str)
def test_empty_calls(shape):
    check_empty_calls(shape)
