"""A GPU session, rehearsed without a GPU: what is left where what it runs fails, hangs or dies, or it is killed."""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import stand_ins
import torch

from tools.gpu_session import records, run_tests, supervise
from tools.gpu_session.__main__ import PHASES
from tools.gpu_session.run_suites import benchmark
from tools.gpu_session.session import LEAVE_SECONDS, Session

ROOT = Path(__file__).parents[2]
TRITON, NATIVE = run_tests.TRITON, run_tests.NATIVE
MOST_FILES, MOST_BYTES = 8, 16 << 20


@pytest.fixture
def tree(tmp_path):
    return stand_ins.build(tmp_path / "project")


def start(tree: Path, out: Path, *arguments: str) -> subprocess.Popen:
    """A session without network, git, make or any environment, in the clean folder."""
    command = ["env", "-i", f"PATH={tree / 'bin'}:/bin:/usr/bin", sys.executable, "-m", "tools.gpu_session",
               "--out", str(out), "--test-seconds", "5", *arguments]  # fmt: skip
    return subprocess.Popen(command, cwd=tree, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def check_files(out: Path) -> None:
    """Few and small enough to come back, and every line whole but, after a kill, the last."""
    files = [path for path in out.rglob("*") if path.is_file()]
    assert len(files) <= MOST_FILES, files
    for path in files:
        assert path.stat().st_size <= MOST_BYTES and re.fullmatch(r"[\w.-]+", path.name)
        if path.suffix == ".jsonl":
            lines = path.read_text().split("\n")
            for line in lines[:-1]:
                assert not line or isinstance(json.loads(line), dict)


def outcomes(journal: Path) -> dict[tuple[str, str], str]:
    return {(row["group"], row["test"]): row["outcome"] for row in records.read(journal) if "test" in row}


def alive(tree: Path) -> list[str]:
    """Commands of processes that work in the folder."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if (process / "cwd").resolve() == tree.resolve():
                found.append((process / "cmdline").read_text())
        except OSError:
            continue
    return found


def groups(journal: Path) -> dict[str, str]:
    return {row["group"]: row.get("result", row.get("skipped")) for row in records.read(journal) if "group" in row}


def check_tests(journal: Path, printed: str) -> None:
    """What the stand-ins did, each told as what it is."""
    found = outcomes(journal)
    triton = {test.split("::")[1]: outcome for (group, test), outcome in found.items() if group == "triton"}
    attn = {f"test_attn[{i}]": "passed" for i in range(20)}
    assert triton == {
        **attn, "test_hangs": "hung", "test_dies": "died", "test_breaks_the_context": "poisoned",
        "test_after_the_break": "passed", "test_fails": "failed",
    }  # fmt: skip
    assert Counter(outcome for (group, _), outcome in found.items() if group == "portable") == {"passed": 10}
    assert found["first: hopper", f"{NATIVE}::test_first_hopper"] == "passed"
    assert groups(journal) == {
        "first: triton": "right", "first: portable": "right", "first: hopper": "right", "triton": "WRONG",
        "portable": "right", "hopper: traps": "WRONG", "hopper: small": "an earlier Hopper group failed",
        "hopper: random": "an earlier Hopper group failed", "hopper: large": "an earlier Hopper group failed",
        "policies": "right",
    }  # fmt: skip
    rows = {row["test"]: row for row in records.read(journal) if row.get("group") == "triton" and "test" in row}
    assert "one is not two" in rows[f"{TRITON}::test_fails"]["why"]
    assert rows[f"{TRITON}::test_dies"]["why"] == "signal 11"
    assert rows[f"{TRITON}::test_after_the_break"]["measured"] == {"worst": 1.5}
    assert [line.split()[1] for line in printed.splitlines()[:3]] == ["triton", "portable", "hopper"]


def test_tests_killed_at_any_second_go_on_to_the_same_end(tree, tmp_path):
    rng, earlier, ran = random.Random(), [], tree / "ran.txt"
    for i in range(4):
        out = tmp_path / f"out{i}"
        ran.unlink(missing_ok=True)
        known = outcomes(tmp_path / f"out{i - 1}" / "tests.jsonl") if i else {}
        session = start(tree, out, "--phase", "tests", *earlier)
        if i == 3:
            printed, _ = session.communicate(timeout=120)
            assert session.returncode == 1
            break
        time.sleep(rng.uniform(0.2, 5))
        session.kill()
        session.wait()
        time.sleep(0.1)
        assert not alive(tree), "what a killed session ran does not outlive it"
        check_files(out)
        done = ran.read_text().splitlines() if ran.exists() else []
        kept = {name for name, outcome in known.items() if outcome in ("passed", "skipped")}
        written = [key for key in outcomes(out / "tests.jsonl") if key not in kept]
        assert len(written) >= len(done) - 1, "a kill loses one row"
        earlier = ["--from", str(out)] if (out / "tests.jsonl").exists() else []
    check_files(out)
    check_tests(out / "tests.jsonl", printed)


def test_every_other_phase_leaves_its_rows(tree, tmp_path):
    out = tmp_path / "out"
    printed = {}
    for phase in PHASES:
        if phase != "tests":
            session = start(tree, out / phase, "--phase", phase)
            printed[phase], _ = session.communicate(timeout=120)
            check_files(out / phase)
    for phase in ("quick", "image", "bench"):
        assert json.loads((out / phase / f"{phase}-result.json").read_text()) == {"rows": [0, 1]}
        starts = [row["code"] for row in records.read(out / phase / f"{phase}.jsonl") if "start" in row]
        assert starts == [-9, 0], "killed once, begun again"
    assert records.read(out / "tune" / "tune-result.jsonl") == [{"best": 1}]
    cases = [row for row in records.read(out / "profile" / "profile.jsonl") if "case" in row]
    assert {row["case"].split("/")[-1]: "metrics" in row for row in cases} == {
        "hopper": False,
        "triton": True,
        "cuda": True,
    }
    assert next(row["metrics"] for row in cases if "metrics" in row) == {"Duration": "12.5 us"}
    assert groups(out / "checkers" / "checkers.jsonl") == {
        "memcheck: portable": "right", "memcheck: hopper": "WRONG", "racecheck: portable": "WRONG",
        "racecheck: hopper": "an earlier Hopper group failed", "synccheck: portable": "right",
        "synccheck: hopper": "an earlier Hopper group failed",
    }  # fmt: skip


def test_an_earlier_run_of_other_sources_does_not_count(tree, tmp_path):
    earlier, out = tmp_path / "earlier", tmp_path / "out"
    earlier.mkdir()
    records.add(earlier / "profile.jsonl", {"phase": "profile", "sources": "other"})
    records.add(earlier / "profile.jsonl", {"case": "var-d30/full/64/triton", "metrics": {"Duration": "1 us"}})
    printed, _ = start(tree, out, "--phase", "profile", "--from", str(earlier)).communicate(timeout=60)
    assert "profile: the earlier run was of other sources, so it is begun anew" in printed
    metrics = {row["case"]: row["metrics"] for row in records.read(out / "profile.jsonl") if "metrics" in row}
    assert metrics["var-d30/full/64/triton"] == {"Duration": "12.5 us"}


def test_a_phase_keeps_its_time(tmp_path, capsys):
    session = Session("tests", tmp_path, LEAVE_SECONDS + 1.5)
    ending = session.run([sys.executable, "-c", "import time; print('begun', flush=True); time.sleep(600)"])
    assert ending.code is None and ending.stopped.startswith("stopped after")
    assert "begun" in session.log.read_text()
    assert not run_tests.run_groups(session, run_tests.GROUPS[-1:])
    assert groups(session.journal) == {"policies": "no time left"}
    assert not benchmark(session, ("--quick",))
    assert records.read(session.journal)[-1]["left out"] == "no time left"
    assert "left out: no time left" in capsys.readouterr().out


def test_a_log_does_not_grow_without_bound(tmp_path, monkeypatch):
    monkeypatch.setattr(supervise, "LOG_BYTES", 1000)
    session = Session("tests", tmp_path, 60)
    assert session.run([sys.executable, "-c", "for i in range(10000): print(i)"]).code == 0
    assert 500 < session.log.stat().st_size <= 1000


def test_a_torn_line_is_no_row_and_the_next_row_is_whole(tmp_path):
    journal = tmp_path / "a.jsonl"
    assert records.read(journal) == []
    records.add(journal, {"i": 1})
    with open(journal, "a") as file:
        file.write('{"i": 2, "half')
    assert records.read(journal) == [{"i": 1}]
    records.add(journal, {"i": 3})
    assert records.read(journal) == [{"i": 1}, {"i": 3}]


def test_arguments_that_cannot_be(tree, tmp_path):
    for arguments, reason in ((["--phase", "all"], "invalid choice: 'all'"), (["--from", "none"], "no such folder")):
        session = start(tree, tmp_path / "out", *arguments)
        printed, _ = session.communicate(timeout=60)
        assert session.returncode == 2 and reason in printed


@pytest.mark.skipif(torch.cuda.is_available(), reason="a machine without a GPU")
def test_gpu_tests_asked_for_without_a_gpu_fail():
    command = [sys.executable, "-m", "pytest", NATIVE, "-p", "no:cacheprovider"]
    asked, plain = (
        subprocess.run([*command, *more], cwd=ROOT, capture_output=True, text=True) for more in (["-m", "gpu"], [])
    )
    assert asked.returncode == 5
    assert "no GPU: -m gpu asks for the tests that need one" in asked.stdout + asked.stderr
    assert plain.returncode == 0
    assert "skipped" in plain.stdout


def test_every_gpu_test_has_one_group():
    """Each test is chosen once with the library that ships; a group that chooses none is a wrong expression."""
    command = [sys.executable, "-m", "pytest", "--collect-only", "-p", "no:cacheprovider", "tests/gpu"]
    lines = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.splitlines()
    every, counted = {line for line in lines if "::" in line}, Counter()
    for group in run_tests.GROUPS:
        tests = [test for test in every if test.startswith(group.file) and chooses(group.chosen, test)]
        assert tests, group
        if group.name != "hopper: traps":
            counted.update(tests)
    assert len(every) > 500 and set(counted) == every and set(counted.values()) == {1}


def chooses(expression: str, test: str) -> bool:
    """What -k does with a test's name."""
    words = re.sub(r"\w+", lambda m: m[0] if m[0] in ("and", "or", "not") else str(m[0] in test), expression)
    return eval(words or "True")
