"""`python -m tools.gpu_session`: all that a GPU can tell of this project, within a given time.

Tests first, since a figure of a wrong kernel is none; then the short benchmark, the profile of the largest calls, the
checkers, the tile candidates, and the whole benchmark in what time is left. Every step's output is kept in a file of
its own, a step that fails or takes too long does not stop the next, and reports and results are copied beside them.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from tabulate import tabulate

from amskv_kernels.cli import console

ROOT = Path(__file__).parent.parent
KEPT = ("tests/gpu-reports", "benchmarks/results", "tools/reports")
LEAST_SECONDS = 20.0  # a step that has less left is not begun
CHECKED = "tests/gpu/test_native_gpu.py"
CHECKED_CASES = "not large and not random"  # a checker makes a call hundreds of times slower


class Step(NamedTuple):
    """A command and the most seconds it may take; "{left}" in it stands for the seconds left."""

    name: str
    command: tuple[str, ...]
    seconds: float


class Outcome(NamedTuple):
    """How a step ended."""

    name: str
    result: str
    seconds: float


def steps() -> list[Step]:
    """What a session does, in order of worth."""
    python = (sys.executable, "-m")
    checkers = [
        Step(
            tool,
            ("compute-sanitizer", "--tool", tool, "--error-exitcode", "1", *python, "pytest", CHECKED, "-k",
             CHECKED_CASES),
            240,
        )
        for tool in ("memcheck", "racecheck", "synccheck")
    ]  # fmt: skip
    profile = ("ncu", "--set", "full", "--kernel-name", "regex:attn", "--launch-count", "40", "--csv")
    return [
        Step("tests", (*python, "pytest", "-m", "gpu", "tests"), 540),
        Step("benchmark-quick", (*python, "benchmarks", "--quick"), 300),
        Step("profile", (*profile, *python, "pytest", CHECKED, "-k", "large and not bits"), 180),
        *checkers,
        Step("tiles", (*python, "tools.tune"), 240),
        Step("benchmark", (*python, "benchmarks", "--budget", "{left}"), 3600),
    ]


def run(step: Step, out: Path, left: float) -> Outcome:
    """One step, its output in `out`."""
    if shutil.which(step.command[0]) is None:
        return Outcome(step.name, f"left out: no {step.command[0]} on this machine", 0.0)
    limit = min(step.seconds, left)
    if limit < LEAST_SECONDS:
        return Outcome(step.name, "left out: no time left", 0.0)
    budget = str(int(max(limit - LEAST_SECONDS, 1)))
    started = time.monotonic()
    with open(out / f"{step.name}.txt", "w", encoding="utf-8") as log:
        try:
            code = subprocess.run(
                [part.replace("{left}", budget) for part in step.command],
                cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, timeout=limit,
            ).returncode  # fmt: skip
            result = "passed" if code == 0 else f"exit code {code}"
        except subprocess.TimeoutExpired:
            result = f"stopped after {limit:.0f} s"
    return Outcome(step.name, result, time.monotonic() - started)


def session(wanted: Sequence[Step], out: Path, seconds: float) -> list[Outcome]:
    """All steps that fit into `seconds`; `out` gets their outputs, the reports and the results."""
    out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + seconds
    outcomes = []
    for step in wanted:
        outcomes.append(run(step, out, end - time.monotonic()))
        print(f"{step.name}: {outcomes[-1].result}", flush=True)
        for folder in KEPT:
            for path in (ROOT / folder).glob("*.*"):
                shutil.copy(path, out / path.name)
    return outcomes


def main(argv: Sequence[str] | None = None) -> int:
    """Run, and print what came of it; 1 where a step failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu-session")
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--only", nargs="*", choices=[step.name for step in steps()], help="these steps alone")
    options = parser.parse_args(argv)
    wanted = [step for step in steps() if options.only is None or step.name in options.only]
    outcomes = session(wanted, options.out, 60 * options.minutes)
    print(f"\n{tabulate(outcomes, headers=('step', 'result', 'seconds'), floatfmt='.0f')}\n\nin {options.out}")
    return 1 if any(o.result.startswith(("exit", "stopped")) for o in outcomes) else 0


if __name__ == "__main__":
    sys.exit(console.run(main))
