"""The GPU session on a machine without one: commands that pass, fail, hang or are not there."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from tools import gpu_session
from tools.gpu_session import Step

PYTHON = (sys.executable, "-c")


@pytest.fixture
def kept(monkeypatch, tmp_path):
    """A project of its own, with one report."""
    reports = tmp_path / "project" / "tests" / "gpu-reports"
    reports.mkdir(parents=True)
    (reports / "gpu.json").write_text("{}")
    monkeypatch.setattr(gpu_session, "ROOT", tmp_path / "project")
    monkeypatch.setattr(gpu_session, "LEAST_SECONDS", 0.5)
    return tmp_path / "out"


def test_a_step_that_fails_does_not_stop_the_next(kept, capsys):
    wanted = [
        Step("broken", (*PYTHON, "print('why'); raise SystemExit(3)"), 60),
        Step("hangs", (*PYTHON, "import time; print('begun', flush=True); time.sleep(60)"), 2),
        Step("missing", ("no-such-checker", "x"), 60),
        Step("fine", (*PYTHON, "print('{left}')"), 61),
    ]
    found = [outcome.result for outcome in gpu_session.session(wanted, kept, 120)]
    assert found == ["exit code 3", "stopped after 2 s", "left out: no no-such-checker on this machine", "passed"]
    assert (kept / "broken.txt").read_text() == "why\n"
    assert (kept / "hangs.txt").read_text() == "begun\n"
    assert (kept / "fine.txt").read_text() == "60\n"
    assert (kept / "gpu.json").exists()
    assert "broken: exit code 3" in capsys.readouterr().out


def test_a_session_keeps_its_time(kept):
    wanted = [Step("hangs", (*PYTHON, "import time; time.sleep(60)"), 60), Step("late", (*PYTHON, "1"), 60)]
    found = [outcome.result for outcome in gpu_session.session(wanted, kept, 2)]
    assert found == ["stopped after 2 s", "left out: no time left"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="a machine without a GPU")
def test_gpu_tests_asked_for_without_a_gpu_fail():
    command = [sys.executable, "-m", "pytest", "tests/gpu/test_native_gpu.py", "-p", "no:cacheprovider"]
    asked, plain = (
        subprocess.run([*command, *more], cwd=gpu_session.ROOT, capture_output=True, text=True)
        for more in (["-m", "gpu"], [])
    )
    assert asked.returncode == 5
    assert "no GPU: -m gpu asks for the tests that need one" in asked.stdout + asked.stderr
    assert plain.returncode == 0
    assert "skipped" in plain.stdout


def test_every_step_names_what_there_is(monkeypatch, capsys):
    for step in gpu_session.steps():
        for part in step.command:
            if part.startswith("tests/") or part == "tests":
                assert (gpu_session.ROOT / part).exists()
    with pytest.raises(SystemExit):
        gpu_session.main(["--only", "everything"])
    assert "invalid choice: 'everything'" in capsys.readouterr().err
