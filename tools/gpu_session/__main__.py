"""`python -m tools.gpu_session --phase PHASE --out DIR`: one phase, in a command that ends within nine minutes.

    tests     which kernels run right, within the first minute; then every GPU test, a process for each kernel
    quick     the short benchmark          profile   ncu on the largest calls, clocks left alone
    bench     every kernel benchmark       checkers  compute-sanitizer on a few tests of each kernel
    image     whole images                 tune      candidates for the tile table

Nothing is installed or fetched, and no git or make is asked for: `make gpu-pack` made what is needed beforehand, in
build/gpu-pack. A phase writes OUT/PHASE.jsonl and OUT/PHASE.log, a benchmark and tune a result beside them, and every
row as soon as it is known, so that a kill costs one. `--from DIR` goes on with an earlier run's files. Without --phase
all phases run in turn, in the order of their worth, each with its own time.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from amskv_kernels.cli import console
from tools.gpu_session.run_suites import benchmark, profile, tune
from tools.gpu_session.run_tests import CHECKED, GROUPS, run_groups
from tools.gpu_session.session import ROOT, TEST_SECONDS, Session

PHASES: dict[str, Callable[[Session], bool]] = {
    "tests": lambda session: run_groups(session, GROUPS),
    "quick": lambda session: benchmark(session, ("--quick",)),
    "image": lambda session: benchmark(session, ("image",)),
    "bench": lambda session: benchmark(session, ("kernel", "module", "plan")),
    "profile": profile,
    "tune": tune,
    "checkers": lambda session: run_groups(session, CHECKED),
}
SECONDS = 540.0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the phases asked for; 1 where something is wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.gpu_session", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--phase", choices=tuple(PHASES), nargs="+", default=list(PHASES), metavar="PHASE")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu-session")
    parser.add_argument("--from", dest="earlier", type=Path, help="a folder with an earlier run's files")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for each phase (default: nine minutes)")
    parser.add_argument("--test-seconds", type=float, default=TEST_SECONDS, help="a test's longest silence")
    options = parser.parse_args(argv)
    if options.earlier is not None and not options.earlier.is_dir():
        parser.error(f"--from is {options.earlier}; there is no such folder")
    right = True
    for phase in options.phase:
        session = Session(phase, options.out.resolve(), options.seconds, options.earlier, options.test_seconds)
        if not session.manifest:
            session.say("no build/gpu-pack here: the library of this checkout serves (make gpu-pack)")
        if phase not in ("tests", "checkers") and (reason := session.use_library("libamskv.so")):
            session.say(reason)
        right = PHASES[phase](session) and right
        session.add({"ended": True})
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(console.run(main))
