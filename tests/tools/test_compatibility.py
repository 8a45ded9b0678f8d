"""`make compatibility`: what its report keeps, and that its groups hold every test."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.harness import machine
from tools.compatibility import environments, report, suite
from tools.make_wheel import ROOT


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "WORK", tmp_path)
    monkeypatch.setattr(report, "PATH", tmp_path / "report.json")
    return tmp_path


def build(folder: Path) -> None:
    (folder / "wheel").mkdir(exist_ok=True)
    (folder / "wheel" / "one.whl").touch()


def built(torch: str, **more: str) -> report.Row:
    return (
        report.row("build", torch, "3.10") | {"file": f"{torch}.whl", "torch": f"{torch}.0", "python": "3.10.1"} | more
    )


def test_a_later_run_goes_on_from_the_rows_of_the_same_wheel(folder):
    first = report.Report()
    build(folder)
    first.keep(report.row("wheel", "2.13", "3.12") | {"failed": "no such torch"})
    first.keep(report.row("wheel", "2.10", "3.13") | {"library": "8.0"})
    first.keep(built("2.11"))
    later = report.Report()
    assert later.built("2.11.0") and later.has("wheel", "2.10", "3.13")
    assert not (later.built("2.10.0") or later.has("wheel", "2.13", "3.12") or later.has("wheel", "2.10", "3.12"))
    later.keep(report.row("wheel", "2.13", "3.12") | {"library": "8.0"})
    later.keep(built("2.10"))
    rows = json.loads((folder / "report.json").read_text())["rows"]
    assert [row["asked"]["torch"] for row in rows] == ["2.10", "2.11", "2.10", "2.13"]
    assert all(report.good(row) for row in rows)
    assert later.content["wheel"]["file"] == "2.11.whl"  # the first that was built


def test_rows_of_other_sources_or_a_wheel_that_is_gone_are_forgotten(folder, monkeypatch):
    first = report.Report()
    build(folder)
    first.keep(built("2.10"))
    assert report.Report().rows
    (folder / "wheel" / "one.whl").unlink()
    assert not report.Report().rows
    build(folder)
    monkeypatch.setattr(machine, "sources", lambda: "others")
    assert not report.Report().rows and report.Report().wheel is None


def test_a_build_that_failed_is_not_the_wheel_and_is_tried_again(folder):
    kept = report.Report()
    kept.keep(built("2.10", failed="error: no such macro"))
    assert "wheel" not in kept.content and not kept.built("2.10.0")


def test_a_group_that_has_a_failed_test_is_tried_again(folder):
    kept = report.Report()
    kept.keep(report.row("suite", suite.TORCH, suite.PYTHON, "tests/ops") | {"suite": {"broken": ["tests.ops::a"]}})
    assert not kept.has("suite", suite.TORCH, suite.PYTHON, "tests/ops")


def test_groups_hold_every_test_once():
    held = [path for paths in suite.groups().values() for each in paths for path in files(ROOT / each)]
    assert sorted(held) == sorted((ROOT / "tests").rglob("test_*.py"))


def files(path: Path) -> list[Path]:
    return [path] if path.is_file() else list(path.rglob("test_*.py"))


def test_counts_and_names_of_a_run(tmp_path):
    (tmp_path / "test_it.py").write_text(
        "import pytest\ndef test_a(): pass\ndef test_b(): assert 0\n@pytest.mark.skip\ndef test_c(): pass\n"
    )
    junit = tmp_path / "junit.xml"
    command = [sys.executable, "-m", "pytest", "-q", f"--rootdir={tmp_path}", f"--junitxml={junit}", tmp_path]
    subprocess.run(command, capture_output=True)
    assert suite.outcome(junit) == {
        "tests": 3, "failures": 1, "errors": 0, "skipped": 1, "broken": ["test_it::test_b"],
    }  # fmt: skip


def test_a_command_that_fails_says_why():
    with pytest.raises(environments.FailedError, match="no such thing"):
        environments.run("sh", "-c", "echo no such thing >&2; exit 3")


def test_the_newest_python_of_a_minor_version_is_asked_for_its_own():
    version = f"{sys.version_info[0]}.{sys.version_info[1]}"
    found = environments.interpreter(version)
    assert found is None or f"Python {version}." in environments.run(found, "--version")
    assert environments.interpreter("3.1") is None
