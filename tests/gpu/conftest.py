"""Tests that need a GPU: `pytest -m gpu`; the run leaves tests/gpu-reports/<gpu>.json."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from amskv_kernels.files import write_json

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent)]  # attn_cases, extra_cases
_measured: dict[str, object] = {}
_outcomes: dict[str, str] = {}


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


def pytest_runtest_logreport(report):
    if HERE.name in Path(report.nodeid.split("::")[0]).parts and (report.when == "call" or report.outcome != "passed"):
        _outcomes[report.nodeid.split("::", 1)[1]] = report.outcome


def pytest_sessionfinish(session):
    if not torch.cuda.is_available() or not _outcomes:
        return
    name = torch.cuda.get_device_name()
    folder = HERE.parent / "gpu-reports"
    folder.mkdir(exist_ok=True)
    counts = {kind: sum(x == kind for x in _outcomes.values()) for kind in sorted(set(_outcomes.values()))}
    report = {
        "gpu": name, "capability": torch.cuda.get_device_capability(), "devices": torch.cuda.device_count(),
        "torch": torch.__version__, "triton": _version("triton"), "cuda": torch.version.cuda,
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"),
        "commit": _output("git", "rev-parse", "HEAD"), "changed": bool(_output("git", "status", "--porcelain")),
        "counts": counts, "not_passed": {k: v for k, v in _outcomes.items() if v != "passed"}, "measured": _measured,
    }  # fmt: skip
    path = folder / (re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") + ".json")
    write_json(path, report, ensure_ascii=False)


def _version(package: str) -> str | None:
    try:
        return __import__(package).__version__
    except ImportError:
        return None


def _output(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, cwd=HERE).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
