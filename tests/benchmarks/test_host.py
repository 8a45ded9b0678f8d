"""The host suite: its rows are there without a GPU, and its table says what they are."""

import pytest

from amskv_kernels.ops.backends import library
from benchmarks.harness.cases import Case
from benchmarks.report import tables
from benchmarks.suites import host


def test_a_backend_of_the_cpu_is_measured():
    row = host.attend_row("torch")
    assert row["us"] > 0
    assert row["up_to"] == "the end of a call of one token"


@pytest.mark.skipif(library.why_not_loaded() is not None, reason=str(library.why_not_loaded()))
def test_the_library_is_measured_up_to_its_kernel():
    row = host.attend_row("cpu")
    assert row["us"] > 0
    assert row["up_to"] == "the kernel"


def test_triton_is_measured_up_to_its_launch():
    """Compiled for a GPU that is not there; the launch is a stub, and no kernel runs."""
    pytest.importorskip("triton")
    row = host.attend_row("triton")
    assert row["us"] > 0
    assert row["up_to"] == "the launch"


def test_a_module_behind_a_kernel_makes_few_dispatcher_calls():
    row = host.dispatch_row(Case("var-d16", "full", 1, "fp32"), "cpu")
    assert row["stock"] > 0
    assert row["backend"] == "torch" or row["ours"] < row["stock"] / 2


def test_the_table_has_both_kinds():
    rows = [
        {"suite": "host", "kind": "attend", "backend": "triton", "up_to": "the launch", "us": 14.25},
        {"suite": "host", "kind": "dispatches", "model": "var-d16", "backend": "torch", "ours": 7.0, "stock": 29.4},
    ]
    text = tables.hosts({"rows": rows}, "simple")
    assert "the launch" in text
    assert "14.2 µs" in text
    assert "29.4" in text
