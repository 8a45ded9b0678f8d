"""`make compatibility`: one wheel on every Python and torch that it is for, each pair in an environment of its own.

    python -m tools.compatibility [--torch 2.10 …] [--python 3.12 …] [--suite]

The library is built against every torch, on the first Python at hand that has it, and run there. The first wheel so
built, that of the oldest torch, is the one that is then run on every pair. Where a Python has no release of the newest
torch, its own newest counts. With --suite the tests that need no GPU run
on the packages of many GPU servers. Every row goes into tools/reports/compatibility.json as soon as it is known;
another run goes on from there while the sources are the same, and tries again what failed. README's table is made of
that file. Up to 15 GB of disk in build/compatibility, one torch at a time; some 20 GB of download in all.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from amskv_kernels.cli import console
from tools.compatibility.environments import WORK, Environment, FailedError, forget_downloads, interpreter
from tools.compatibility.report import NEWEST, PYTHONS, TORCHES, Report, Row, good, row
from tools.compatibility.suite import PYTHON, TORCH, try_suite
from tools.make_wheel import BUILD_NEEDS, audit_wheel, build


def try_pair(report: Report, base: Path, torch: str, python: str) -> None:
    """The wheel run beside this torch; before it, where that is the first pair with this torch, the library built."""
    if report.has("wheel", torch, python):
        return
    with Environment(base, f"python{python}-torch{torch}") as env:
        tried = row("wheel", torch, python)
        try:
            env.install("torch" if torch == NEWEST else f"torch=={torch}.*")
            tried |= env.facts()
            if not report.built(tried["torch"]):
                report.keep(try_build(report, env, torch, python))
            if report.wheel is None or not report.built(tried["torch"]):
                return
            tried |= {"library": env.smoke(report.wheel)} | env.facts()
        except FailedError as error:
            tried["failed"] = str(error)
        report.keep(tried)


def try_build(report: Report, env: Environment, torch: str, python: str) -> Row:
    """The library built against this torch, and run: the wheel to try, if it is the first."""
    tried = row("build", torch, python) | env.facts()
    try:
        env.install("numpy", *BUILD_NEEDS)
        wheel = build(WORK / ("wheel" if report.wheel is None else "built"), env.python)
        audit_wheel(wheel)
        return tried | {"file": wheel.name, "library": env.smoke(wheel)} | env.facts()
    except (FailedError, OSError, subprocess.CalledProcessError, SystemExit) as error:
        return tried | {"failed": str(error)}


def main(argv: Sequence[str] | None = None) -> int:
    """Try every pair asked for; 1 where something is known to fail."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--torch", nargs="*", choices=TORCHES, default=list(TORCHES))
    parser.add_argument("--python", nargs="*", choices=PYTHONS, default=list(PYTHONS))
    parser.add_argument("--suite", action="store_true", help=f"the tests too, on Python {PYTHON} and torch {TORCH}")
    options = parser.parse_args(argv)
    found = {version: path for version in options.python if (path := interpreter(version))}
    for version in set(options.python) - set(found):
        print(f"left out: no Python {version} on PATH or in pyenv", file=sys.stderr)
    report = Report()
    for torch in options.torch:
        for python, base in found.items():
            try_pair(report, base, torch, python)
        if options.suite and torch == TORCH and (suite_base := interpreter(PYTHON)):
            try_suite(report, suite_base)
        forget_downloads()
    return 0 if all(good(each) for each in report.rows) else 1


if __name__ == "__main__":
    sys.exit(console.run(main))
