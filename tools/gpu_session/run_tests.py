"""GPU tests and checkers, a process for each kernel: one that hangs, dies or breaks its GPU context costs one test."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tools.gpu_session import records, supervise
from tools.gpu_session.session import ROOT, Session
from tools.gpu_session.supervise import died

TRITON, NATIVE = "tests/gpu/test_triton_gpu.py", "tests/gpu/test_native_gpu.py"
POLICIES = "tests/gpu/test_policies_gpu.py"
POISONED = 77  # the exit code of tests/gpu/conftest.py after a fault that every later call would meet again
RELEASE, TRAPS = "libamskv.so", "libamskv-traps.so"
MOST_FAULTS = 4  # hangs, deaths and broken contexts of a group: each costs a new process, which is most of 10 s
CHECKED_FACTOR = 2.5  # times a test's seconds: a checker makes a call hundreds of times slower
START_SECONDS = 90.0  # until the first test begins: imports, from a cold disk
HOPPER_FAILED = "an earlier Hopper group failed"
LEAST_SECONDS = 20.0  # a group that has less left is not begun


@dataclass(frozen=True)
class Group:
    """Tests that one process runs: a file, and pytest's -k expression in it."""

    name: str
    file: str
    chosen: str = ""
    kernel: str = ""
    library: str = RELEASE
    prefix: tuple[str, ...] = ()
    patience: float = 1.0

    def command(self, journal: Path) -> list[str]:
        """The process; it leaves out what the journal holds already."""
        chosen = ["-k", self.chosen] if self.chosen else []
        return [
            *self.prefix, sys.executable, "-m", "pytest", self.file, "-m", "gpu", "-p", "no:cacheprovider", *chosen,
            "--tb=short", f"--gpu-journal={journal}", f"--gpu-group={self.name}",
        ]  # fmt: skip


SMALL = "not test_first and not random and not large"
# The first three tell in a minute which kernels run right; then one kernel after the other, the surest first.
FIRST = (
    Group("first: triton", TRITON, "test_first", "triton"),
    Group("first: portable", NATIVE, "test_first and portable", "portable"),
    Group("first: hopper", NATIVE, "test_first and hopper", "hopper", TRAPS),
)
GROUPS = (
    *FIRST,
    Group("triton", TRITON, "not test_first", "triton"),
    Group("portable", NATIVE, "not hopper and not test_first", "portable"),
    Group("hopper: traps", NATIVE, f"hopper and {SMALL}", "hopper", TRAPS),
    Group("hopper: small", NATIVE, f"hopper and {SMALL}", "hopper"),
    Group("hopper: random", NATIVE, "hopper and random", "hopper"),
    Group("hopper: large", NATIVE, "hopper and large", "hopper"),
    Group("policies", POLICIES, "", "policies"),
)
CHECKED = tuple(
    Group(
        f"{tool}: {kernel}", NATIVE, f"{kernel} and test_first", kernel,
        prefix=("compute-sanitizer", "--tool", tool, "--error-exitcode", "9"), patience=CHECKED_FACTOR,
    )
    for tool in ("memcheck", "racecheck", "synccheck")
    for kernel in ("portable", "hopper")
)  # fmt: skip


def run_groups(session: Session, groups: Sequence[Group]) -> bool:
    """Every group in turn, all of them right; a Hopper kernel that failed is not tried further, since it may hang."""
    broken, complete = set[str](), True
    for group in groups:
        if reason := _why_not(session, group, broken):
            session.add({"group": group.name, "skipped": reason})
            session.say(f"{group.name:18} left out: {reason}")
            complete = complete and reason == HOPPER_FAILED
            continue
        if not run_group(session, group):
            broken.add(group.kernel)
    return complete and not broken


def _why_not(session: Session, group: Group, broken: set[str]) -> str | None:
    if group.kernel == "hopper" and "hopper" in broken:
        return HOPPER_FAILED
    if group.prefix and (program := supervise.missing(group.prefix)):
        return f"no {program} on this machine"
    if group.file == NATIVE and (reason := session.use_library(group.library)):
        return reason
    return None if session.left() > LEAST_SECONDS else "no time left"


def run_group(session: Session, group: Group) -> bool:
    """One group, in as many processes as its faults ask for; whether all passed."""
    started, faults, complete = time.monotonic(), 0, False
    while faults < MOST_FAULTS and session.left() > 0:
        watch = Watch(session.journal, group, group.patience * session.test_seconds)
        ending = session.run(group.command(session.journal), watch=watch.reason, folder=ROOT)
        if ending.code in (0, 1, 5):  # passed, failed, nothing left to run
            complete = True
            break
        if session.left() <= 0:
            break
        test = watch.under_way()
        if ending.code == POISONED:
            faults += 1
        elif test is not None:
            faults += 1
            outcome = {"outcome": "hung" if ending.code is None else "died", "why": ending.stopped or died(ending.code)}
            session.add({"group": group.name, "test": test, **outcome})
        else:  # a checker's own exit code, or a process that never came to its first test
            complete = watch.has_run()
            session.add({"group": group.name, "ended": ending.stopped or died(ending.code)})
            break
    return _conclude(session, group, complete, time.monotonic() - started)


def _conclude(session: Session, group: Group, complete: bool, seconds: float) -> bool:
    """The group's own row and line."""
    rows = [row for row in records.read(session.journal) if row.get("group") == group.name]
    tests = {row["test"]: row["outcome"] for row in rows if "test" in row}
    counts = {kind: sum(x == kind for x in tests.values()) for kind in sorted(set(tests.values()))}
    wrong = [f"{test} {outcome}" for test, outcome in tests.items() if outcome not in ("passed", "skipped")]
    wrong += [row["ended"] for row in rows if "ended" in row]
    result = "not all ran" if not complete else "WRONG" if wrong else "right" if counts.get("passed") else "none ran"
    session.add({"group": group.name, "result": result, "counts": counts, "seconds": round(seconds, 1)})
    said = ", ".join(f"{count} {kind}" for kind, count in counts.items()) or "no tests"
    slow = ", products serialised: right or wrong, but not fast" if session.serialised(group.library) else ""
    session.say(f"{group.name:18} {result} ({said}, {seconds:.0f} s{slow})" + (f": {wrong[0]}" if wrong else ""))
    return not wrong and complete


class Watch:
    """Reads a group's journal as it grows, and says when a test has run too long."""

    def __init__(self, journal: Path, group: Group, seconds: float) -> None:
        self.journal, self.group, self.seconds = journal, group, seconds
        self.before = len(records.read(journal))
        self.size, self.since, self.begun = -1, time.monotonic(), False

    def _rows(self) -> list[records.Row]:
        return [row for row in records.read(self.journal)[self.before :] if row.get("group") == self.group.name]

    def under_way(self) -> str | None:
        """The test that has begun and not ended."""
        rows = self._rows()
        return rows[-1]["begun"] if rows and "begun" in rows[-1] else None

    def has_run(self) -> bool:
        """Whether a test has ended."""
        return any("test" in row for row in self._rows())

    def reason(self) -> str | None:
        """Why the process should be stopped: nothing was written for longer than a start or a test may take."""
        size = self.journal.stat().st_size if self.journal.exists() else 0
        if size != self.size:
            self.size, self.since = size, time.monotonic()
            self.begun = self.begun or any("begun" in row for row in self._rows())
        limit = self.seconds if self.begun else START_SECONDS
        return f"silent for {limit:.0f} s" if time.monotonic() - self.since > limit else None
