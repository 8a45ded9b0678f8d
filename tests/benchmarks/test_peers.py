"""Peers that are not installed are named with the reason; a user's own takes part by a file's name."""

import pytest
import torch

from benchmarks.__main__ import main
from benchmarks.harness import peers
from benchmarks.harness.cases import Case, groups
from benchmarks.harness.gate import EIGHT_BITS, Gate, WrongResultError
from benchmarks.harness.inputs import CallInputs, Pool, UnavailableError
from benchmarks.report import targets

CODE = """
import torch
def prepare(q, k, v, scale):
    return lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=scale)
number = 3
"""


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.setattr(peers, "_others", {})
    (tmp_path / "mine.py").write_text(CODE)
    return tmp_path / "mine.py"


def inputs() -> CallInputs:
    case = Case("var-d16", "full", 1, "fp32")
    return CallInputs(Pool(case, "cpu"), groups(("var-d16", "full"))[1])


def test_every_absent_peer_says_what_is_missing(monkeypatch):
    monkeypatch.setattr(peers, "find_spec", lambda name: None)
    reasons = {}
    for which in peers.PEERS:
        if which.package or which.name == "HeatKV":
            with pytest.raises(UnavailableError) as error:
                peers.peer(which, inputs())
            reasons[which.name] = str(error.value)
    assert reasons["FlashAttention-3"] == "flash_attn_interface is not installed"
    assert reasons["FlashAttention-4"] == "flash_attn.cute is not installed"
    assert "--peer 'HeatKV=FILE.py:FUNCTION'" in reasons["HeatKV"]


def test_a_package_within_one_that_is_not_there_is_not_installed():
    with pytest.raises(UnavailableError, match=r"no_such_package\.part is not installed"):
        peers.peer(peers.Peer("x", lambda dense: lambda: dense.q, package="no_such_package.part"), inputs())


def test_a_peer_of_the_users_own_is_measured_beside_the_others(file):
    peers.add(f"mine={file}:prepare")
    call = inputs()
    contestant = peers.line_up(call)["mine"]()
    expected = peers.line_up(call)["SDPA"]()
    assert torch.equal(contestant.output(contestant.calls[0]()), expected.output(expected.calls[0]()))
    peers.add(f"SDPA={file}:prepare")
    assert len([name for name in peers.line_up(call) if name == "SDPA"]) == 1


def test_int8_pages_take_part_and_are_held_to_their_own_rounding():
    call = inputs()
    gate, contestant = Gate(call), peers.eight_bit(call)
    assert len(contestant.calls) == call.sets
    out = contestant.output(contestant.calls[0]())
    found = gate.check("int8", out, contestant.rounded)
    assert 1e-4 < found < EIGHT_BITS
    with pytest.raises(WrongResultError, match="int8 is off by"):
        gate.check("int8", out)
    with pytest.raises(WrongResultError, match="int8 is off by"):
        gate.check("int8", out * 1.02, contestant.rounded)


@pytest.mark.parametrize("able", [["cuda", "triton", "torch"], ["hopper", "cuda", "torch"], ["cpu", "torch"]])
def test_int8_pages_run_by_every_kernel_that_has_them(monkeypatch, able):
    call = inputs()
    call.pool.device = "cpu" if "cpu" in able else "cuda"
    monkeypatch.setattr(peers, "backends", lambda device: (able[0], able))
    names = [name for name in peers.line_up(call) if "int8" in name]
    assert names == [f"amskv {name}, int8 pages" for name in able if name in ("cuda", "triton", "cpu")]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("mine", "a peer is at ''; it must be NAME=FILE.py:FUNCTION"),
        ("mine=none.py:prepare", "a peer is at 'none.py:prepare'; it must be NAME=FILE.py:FUNCTION"),
        ("mine=FILE:number", "has no function of that name"),
        ("mine=FILE:absent", "has no function of that name"),
    ],
)
def test_a_peer_that_cannot_be_is_refused_before_anything_runs(file, capsys, text, reason):
    with pytest.raises(SystemExit) as stop:
        main(["--device", "cpu", "plan", "--peer", text.replace("FILE", str(file))])
    assert stop.value.code == 2 and reason in capsys.readouterr().err


def result(device: str, name: str, rows: list[dict]) -> dict:
    return {"machine": {"device": device, "name": name}, "rows": rows, "file": "x.json"}


def test_targets_of_hopper_take_both_gpus_and_the_cpus_their_own():
    by_name = {target.what: target for target in targets.TARGETS}
    rate = by_name["last step of VAR-256 (n 256, 680 keys, D 64)"]
    times = {"amskv": {"tflop_s": 451.0, "median_us": 1.0}}
    row = {"suite": "kernel", "model": "var-d30", "policy": "full", "dtype": "bf16", "step": 9, "times": times}
    for name, met in (("NVIDIA H100 80GB HBM3", True), ("NVIDIA H200", True), ("NVIDIA L4", None)):
        found = targets.verdict(rate, [result("cuda", name, [row])])
        assert (found[0].met if found else None) is met
    sdpa = by_name["CPU, each step with n ≥ 64, `full`, over SDPA on ready keys"]
    ratios = ((16, 0.1), (64, 1.2), (256, 0.9))
    rows = [{"suite": "cpu", "policy": "full", "n": n, "ratios": {"SDPA": x}} for n, x in ratios]
    assert targets.verdict(sdpa, [result("cpu", "any", rows)])[0] == targets.Verdict("least 0.90× of 2 rows", False)
    assert targets.verdict(sdpa, [result("cpu", "any", rows[:2])])[0].met


def test_targets_of_the_cpu_judge_early_steps_the_last_one_bf16_and_the_host():
    by_name = {target.what: target for target in targets.TARGETS}

    def row(dtype: str, step: int, n: int, us: float, share: float = 0.5) -> dict:
        times = {"amskv": {"median_us": us, "share_of_roof": share}, "SDPA": {"median_us": 10.0 * n}}
        case = {"model": "any", "policy": "full", "images": 1, "dtype": dtype}
        return {"suite": "cpu", **case, "step": step, "n": n, "layers": 2, "times": times}

    def verdict(what: str, *rows: dict) -> targets.Verdict:
        return targets.verdict(by_name[what], [result("cpu", "any", list(rows))])[0]

    early = "CPU, each step with n < 64, `full`"
    assert verdict(early, row("fp32", 0, 1, 24.0), row("fp32", 1, 4, 79.0), row("fp32", 2, 64, 1e6)).met
    assert verdict(early, row("fp32", 0, 1, 50.0)) == targets.Verdict("at most 2.00 of that in 1 rows", False)
    last = "CPU, the last step, `full`"
    steps = (row("fp32", 1, 4, 9.0, 0.3), row("fp32", 2, 9, 9.0, 0.7), row("bf16", 2, 9, 9.0, 0.6))
    assert verdict(last, *steps) == targets.Verdict("least 60% of 2 cases", True)
    assert not verdict(last, *steps, row("bf16", 3, 16, 9.0, 0.59)).met
    assert verdict(
        "CPU, attention of a whole image in bf16 over fp32", row("fp32", 0, 1, 4.0), row("bf16", 0, 1, 5.0)
    ) == (targets.Verdict("at most 1.25× of 1 cases", False))
    eight_bit = "CPU, each step in fp32, int8 pages over fp32 pages"
    both = [row(dtype, 1, 4, 8.0) for dtype in ("fp32", "fp32", "bf16")]
    for each, us in zip(both, (8.0, 10.0, 80.0), strict=True):
        each["times"]["amskv cpu, int8 pages"] = {"median_us": us}
    assert verdict(eight_bit, *both, row("fp32", 0, 1, 1.0)) == targets.Verdict("at most 1.25× of 2 rows", False)
    assert verdict(eight_bit, both[0]).met
    what = "host time of a call up to its kernel, native and Triton"
    triton, cpu = (
        {"suite": "host", "kind": "attend", "backend": name, "up_to": end, "us": us}
        for name, end, us in (("triton", "the launch", 26), ("cpu", "the kernel", 9.9))
    )
    assert verdict(what, triton, cpu) == targets.Verdict("9.9 and 26.0 µs", False)
    whole = cpu | {"up_to": "the end of a call of one token"}
    assert targets.verdict(by_name[what], [result("cpu", "any", [triton, whole])]) is None
