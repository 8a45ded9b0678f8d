"""`make compatibility`: one wheel on every Python and torch that it is for, each pair in an environment of its own.

    python -m tools.compatibility [--torch 2.10 …] [--python 3.12 …] [--suite]

The library is built against every torch, on the first Python at hand that has it, and run there. The first wheel so
built, that of the oldest torch, is the one that is then run on every pair. With --suite the tests that need no GPU run
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
from tools.compatibility.report import NEWEST, PYTHONS, TORCHES, Report, good, row
from tools.compatibility.suite import PYTHON, TORCH, try_suite
from tools.make_wheel import BUILD_NEEDS, audit_wheel, build


def try_pair(report: Report, base: Path, torch: str, python: str) -> None:
    """What is not yet known of this pair: whether the library builds against this torch, and whether the wheel runs."""
    todo = [] if report.has("build", torch) else ["build"]
    todo += [] if report.has("wheel", torch, python) else ["wheel"]
    if not todo:
        return
    with Environment(base, f"python{python}-torch{torch}") as env:
        for kind in todo:
            tried = row(kind, torch, python)
            try:
                env.install("torch" if torch == NEWEST else f"torch=={torch}.*")
                tried |= env.facts()
                wheel = report.wheel
                if kind == "build":
                    env.install(*BUILD_NEEDS)
                    wheel = build(WORK / ("wheel" if wheel is None else "built"), env.python)
                    audit_wheel(wheel)
                    tried["file"] = wheel.name
                if wheel is None:
                    raise FailedError("no wheel was built")
                tried["library"] = env.smoke(wheel)
            except (FailedError, OSError, subprocess.CalledProcessError, SystemExit) as error:
                tried["failed"] = str(error)
            report.keep(tried)


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
