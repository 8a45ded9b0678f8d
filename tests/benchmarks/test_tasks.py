"""Runs of many rows: interrupted, continued, failed."""

import time

import pytest
import torch
from rows import HEADER

from benchmarks.harness.gate import WrongResultError
from benchmarks.harness.inputs import UnavailableError
from benchmarks.harness.results import Run, read
from benchmarks.harness.tasks import Task, run_tasks


def tasks_of(run_log, count=4, fail_at=None):
    def make(i):
        if i == fail_at:
            raise KeyboardInterrupt
        run_log.append(i)
        return {"suite": "cpu", "times": {}}

    return [Task(f"row {i}", 1.0, lambda i=i: make(i)) for i in range(count)]


def test_an_interrupted_run_leaves_a_valid_file_and_goes_on(tmp_path):
    path, done = tmp_path / "run.json", []
    with pytest.raises(KeyboardInterrupt), Run(path, HEADER) as run:
        run_tasks(tasks_of(done, fail_at=2), run, None, quiet=True)
    assert [row["key"] for row in read(path)["rows"]] == ["row 0", "row 1"]
    assert read(path)["finished"] is None
    with Run(path, HEADER) as run:
        run.begin(["cpu"], [])
        assert run_tasks(tasks_of(done), run, None, quiet=True) == (True, [])
        run.finish(["cpu"])
    assert done == [0, 1, 2, 3]
    assert read(path)["finished"]
    assert read(path)["done"] == ["cpu"]


def test_a_suite_that_is_done_is_measured_anew_and_leaves_others_alone(tmp_path):
    path, done = tmp_path / "run.json", []
    with Run(path, HEADER) as run:
        run_tasks(tasks_of(done, 2), run, None, quiet=True)
        run.finish(["cpu"])
    with Run(path, HEADER) as run:
        run.begin(["image"], ["a picture"])
        run.add("a picture", {"suite": "image"})
        run.finish(["image"])
    with Run(path, HEADER) as run:
        run.begin(["cpu"], ["row 0", "row 1"])
        run_tasks(tasks_of(done, 2), run, None, quiet=True)
        run.finish(["cpu"])
    assert done == [0, 1, 0, 1]
    assert {row["key"] for row in read(path)["rows"]} == {"row 0", "row 1", "a picture"}
    assert read(path)["done"] == ["cpu", "image"]


@pytest.mark.parametrize("change", [{"sources": "d00d"}, {"quick": True}, {"machine": {"device": "cuda"}}])
def test_other_sources_or_another_machine_start_anew(tmp_path, change):
    with Run(tmp_path / "run.json", HEADER) as run:
        run.add("row", {"suite": "cpu"})
    with Run(tmp_path / "run.json", {**HEADER, **change}) as run:
        assert "row" not in run
    assert not list(tmp_path.glob(".*"))


def test_a_deadline_stops_between_rows(tmp_path):
    done = []
    with Run(tmp_path / "run.json", HEADER) as run:
        complete, _ = run_tasks(tasks_of(done), run, time.monotonic() - 1, quiet=True)
    assert not complete
    assert not done


def test_failures_are_named(tmp_path):
    def fail(error):
        raise error

    errors = {
        "wrong": WrongResultError("off"),
        "gone": UnavailableError("not here"),
        "large": torch.OutOfMemoryError("x"),
    }
    tasks = [Task(key, 1.0, lambda error=error: fail(error)) for key, error in errors.items()]
    with Run(tmp_path / "run.json", HEADER) as run:
        assert run_tasks(tasks, run, None, quiet=True) == (True, ["wrong"])
    assert read(tmp_path / "run.json")["missing"] == {"wrong": "wrong result: off", "gone": "not here", "large": "x"}
