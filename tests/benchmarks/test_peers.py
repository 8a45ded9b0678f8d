"""Peers that are not installed are named with the reason; a user's own takes part by a file's name."""

import pytest
import torch

from benchmarks.__main__ import main
from benchmarks.harness import peers
from benchmarks.harness.cases import Case, groups
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
