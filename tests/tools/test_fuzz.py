"""The fuzz: a short run finds nothing, planted faults are found, a run goes on where it stopped."""

import json

import pytest
import torch

from amskv_kernels import backend
from amskv_kernels.ops.backends import torch as torch_backend
from amskv_kernels.planning.plan import CachePlan
from tools.fuzz import __main__ as fuzz
from tools.fuzz.calls import NARROW, draw_call
from tools.fuzz.malformed import refused
from tools.fuzz.plans import judge_plan

SEED = 77 * fuzz.STRIDE  # not that of the long run


@pytest.mark.parametrize("name", fuzz.backends())
def test_random_calls(name):
    with backend(name):
        wrong = {i: found for i in range(400) if (found := fuzz.judge_call(SEED + i))}
    assert not wrong


def test_random_plans():
    assert not {i: found for i in range(200) if (found := judge_plan(SEED + i))}


def test_the_same_number_draws_the_same_call():
    for i in range(20):
        one, two = draw_call(i), draw_call(i)
        assert one.op == two.op
        for x, y in zip(one.args.values(), two.args.values(), strict=True):
            assert torch.equal(x.nan_to_num(7.0), y.nan_to_num(7.0)) if isinstance(x, torch.Tensor) else x == y


def test_the_interpreters_calls_meet_every_kernel_of_attn():
    attn = pytest.importorskip("amskv_kernels.ops.backends.triton.attn")
    names = ("q", "k", "v", "pages", "read_slots", "write_slots", "softmax_scale")
    met = set()
    for i in range(3000):
        call = draw_call(SEED + i, NARROW)
        if call.op == "attn" and call.args["q"].numel():
            launch = attn.plan_launch(*(call.args[name] for name in names))
            meta = launch.start._meta
            met.add((meta.get("HP", 1), meta["BM"], meta.get("FULL_FIRST"), launch.splits > 1))
    one = {(1, 16, False), (1, 32, False), (1, 64, False), (1, 128, True)}  # the tiles of the table for sm_80
    assert {kind[:3] for kind in met if kind[0] == 1 and not kind[3]} >= one
    assert {kind[0] for kind in met} == {1, 2, 4}
    assert any(kind[3] for kind in met)


FAULTS = {
    "a wrong value": lambda out, lse, pages: out.view(-1)[:1].add_(1.0),
    "a wrong lse": lambda out, lse, pages: lse.view(-1)[-1:].add_(1.0),
    "a byte of the pool": lambda out, lse, pages: pages.view(-1)[-1:].zero_(),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found(monkeypatch, fault):
    right = torch_backend.attn

    def attn(*args):
        out, lse = right(*args)
        FAULTS[fault](out, lse, args[3])
        return out, lse

    monkeypatch.setattr(torch_backend, "attn", attn)
    with backend("torch"):
        assert any(fuzz.judge_call(SEED + i) for i in range(20))


def test_a_call_that_is_taken_or_refused_badly_is_found(monkeypatch):
    call = draw_call(next(i for i in range(100) if draw_call(i).op == "attn"))
    assert refused(call) == "a malformed call is taken"
    call.args["softmax_scale"] = -1.0
    assert refused(call) is None
    monkeypatch.setattr("amskv_kernels.ops.attn", lambda **_: [][0])
    assert refused(call).startswith("IndexError is raised")


def test_a_wrong_plan_is_found(monkeypatch):
    right = CachePlan.read_slots
    monkeypatch.setattr(CachePlan, "read_slots", lambda self, step, layer: right(self, step, 0))
    assert any(judge_plan(SEED + i) for i in range(10))


def test_a_run_goes_on_where_it_stopped(tmp_path, monkeypatch, capsys):
    path = tmp_path / "fuzz.json"
    command = ["--backend", "torch", "--plans", "0", "--out", str(path), "--calls"]
    assert fuzz.main([*command, "6"]) == 0
    seen = []
    monkeypatch.setattr(fuzz, "judge_call", lambda number, sizes: seen.append(number))
    assert fuzz.main([*command, "9"]) == 0
    assert seen == [6, 7, 8]
    assert json.loads(path.read_text())["found"]["torch"]["done"] == 9
    assert fuzz.main([*command, "9", "--seed", "1"]) == 2
    assert "has other calls or another version in it" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["hopper", "nothing"])
def test_a_backend_that_serves_no_cpu_is_refused_before_a_call_is_drawn(capsys, tmp_path, name):
    out = tmp_path / "fuzz.json"
    assert fuzz.main(["--backend", name, "--calls", "3", "--plans", "0", "--out", str(out)]) == 2
    assert capsys.readouterr().err.startswith(f"--backend {name} serves no CPU here; these do: ")
    assert not out.exists()
