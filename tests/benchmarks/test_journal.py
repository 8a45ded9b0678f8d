"""Rows of a run that was killed: none is lost but the one under way, which is not tried again."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rows import HEADER

from benchmarks.harness.results import DIED, Run, journal_of, read
from benchmarks.harness.tasks import BrokenDeviceError, Task, run_tasks

ROOT = Path(__file__).parents[2]
KILLED = """
import os, signal, sys
from pathlib import Path
from benchmarks.harness.results import Run
with Run(Path(sys.argv[1]), eval(sys.argv[2])) as run:
    for i in range(3):
        run.start(f"row {i}")
        if i == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        run.add(f"row {i}", {"suite": "cpu"})
        run.miss("gone", "why")
"""


def kill(path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED, str(path), repr(HEADER)], cwd=ROOT)
    assert done.returncode == -signal.SIGKILL


def test_a_killed_run_loses_the_row_under_way_alone(tmp_path):
    path, done = tmp_path / "run.json", []
    kill(path)
    assert json.loads(path.read_text())["rows"] == [], "the file is as it was at the start"
    with open(journal_of(path), "a") as journal:
        journal.write('{"row": {"key": "ha')
    assert [row["key"] for row in read(path)["rows"]] == ["row 0", "row 1"]
    assert read(path)["missing"] == {"gone": "why", "row 2": DIED}
    tasks = [Task(f"row {i}", 1, lambda i=i: done.append(i) or {"suite": "cpu"}) for i in range(4)]
    with Run(path, HEADER) as run:
        assert run_tasks(tasks, run, None, quiet=True) == (True, [])
    assert done == [3], "the row that killed its process is left alone"
    assert not journal_of(path).exists()
    assert json.loads(path.read_text())["missing"]["row 2"] == DIED


def test_a_journal_of_another_run_is_none_of_this_file(tmp_path):
    path = tmp_path / "run.json"
    kill(path)
    journal = journal_of(path).read_text()
    Run(path, HEADER, fresh=True).save()
    changed = json.loads(path.read_text()) | {"started": "2000-01-01T00:00:00+00:00"}
    path.write_text(json.dumps(changed))
    journal_of(path).write_text(journal)
    assert read(path)["rows"] == [] and read(path)["missing"] == {}


@pytest.mark.parametrize("broken", [False, True])
def test_a_failure_ends_the_process_only_where_it_broke_the_device(tmp_path, monkeypatch, broken):
    def synchronize():
        if broken:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)

    def fail():
        raise RuntimeError("launch failed")

    tasks, path = [Task("fails", 1, fail), Task("next", 1, lambda: {"suite": "cpu"})], tmp_path / "run.json"
    with Run(path, HEADER) as run:
        if not broken:
            assert run_tasks(tasks, run, None, quiet=True) == (True, ["fails"])
        else:
            with pytest.raises(BrokenDeviceError, match="fails broke the device: launch failed"):
                run_tasks(tasks, run, None, quiet=True)
    assert read(path)["missing"]["fails"] == (f"{DIED}: launch failed" if broken else "failed: launch failed")
    assert ("next" in {row["key"] for row in read(path)["rows"]}) is not broken
    with Run(path, HEADER) as run:
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
        run_tasks(tasks, run, None, quiet=True)
    assert "next" in {row["key"] for row in read(path)["rows"]}
    assert os.listdir(tmp_path) == ["run.json"]
