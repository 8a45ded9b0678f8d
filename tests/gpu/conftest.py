"""Tests that need a GPU: `pytest -m gpu`; the run leaves tests/gpu-reports/<gpu>.jsonl, a line as each test ends.

Another journal is named with --gpu-journal: tests that it holds are left out, so that a new process goes on where one
ended. A test that breaks the GPU's context ends the process, since every later call would fail: its exit code says so.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import torch

from benchmarks.harness import machine
from tools.gpu_session import records
from tools.gpu_session.run_tests import POISONED

HERE = Path(__file__).resolve().parent
_measured: dict[str, object] = {}


def pytest_addoption(parser):
    parser.addoption("--gpu-journal", type=Path, help="append outcomes here, and leave out tests that it holds")
    parser.addoption("--gpu-group", default="all", help="the name under which outcomes are kept")


def pytest_configure(config):
    """The journal: the one named, or a new report of this GPU where the GPU tests are asked for."""
    if not torch.cuda.is_available() or config.option.collectonly:
        return
    path = config.getoption("--gpu-journal", None)
    if path is None:
        if config.option.markexpr != "gpu":
            return
        path = HERE.parent / "gpu-reports" / f"{machine.slug(machine.describe('cuda'))}.jsonl"
        path.parent.mkdir(exist_ok=True)
        path.unlink(missing_ok=True)
    config.pluginmanager.register(Journal(path, config.getoption("--gpu-group", "all")), "gpu-journal")


def pytest_collection_modifyitems(config, items):
    if config.option.markexpr == "gpu" and not config.option.collectonly and not torch.cuda.is_available():
        pytest.exit("no GPU: -m gpu asks for the tests that need one, and this torch sees none", returncode=5)
    skip = pytest.mark.skip(reason="needs an NVIDIA GPU")
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if not torch.cuda.is_available():
                item.add_marker(skip)


@pytest.fixture
def measured():
    """Numbers for the report, by name."""
    return _measured


class Journal:
    """Writes a row when a test begins and when it ends, and watches over the GPU's context."""

    def __init__(self, path: Path, group: str) -> None:
        self.path, self.group = path, group

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items):
        held = {row["test"] for row in records.read(self.path) if row.get("group") == self.group and "test" in row}
        items[:] = [item for item in items if item.nodeid not in held and HERE in item.path.parents]
        commit, changed = machine.commit()
        facts = {"machine": machine.describe("cuda"), "commit": commit, "changed": changed}
        records.add(self.path, {"group": self.group, **facts, "sources": machine.sources(), "left": len(items)})

    def pytest_runtest_logstart(self, nodeid):
        records.add(self.path, {"group": self.group, "begun": nodeid, "at": time.time()})

    def pytest_runtest_logreport(self, report):
        if report.when != "call" and report.outcome == "passed":
            return
        row = {"group": self.group, "test": report.nodeid, "outcome": report.outcome, "seconds": report.duration}
        if report.failed:
            row["why"] = records.end_of(str(report.longrepr))
        if _measured:
            row["measured"] = dict(_measured)
            _measured.clear()
        if not report.failed or _usable():
            records.add(self.path, row)
            return
        records.add(self.path, row | {"outcome": "poisoned"})
        print(f"\n{row['why']}\n{report.nodeid} broke the GPU's context", flush=True)
        os._exit(POISONED)


def _usable() -> bool:
    """Whether the context takes another call."""
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True
