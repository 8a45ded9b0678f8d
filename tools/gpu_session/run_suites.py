"""Benchmarks, tile candidates and profiles: each keeps its own rows, and is begun again where a call ended it."""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterator
from pathlib import Path

from tools.gpu_session import records, supervise
from tools.gpu_session.session import Session
from tools.gpu_session.supervise import died

MOST_STARTS = 5  # a call that kills its process is named in the results and not made again
LEAST_SECONDS = 30.0  # what a start takes before its first row: imports, ceilings
# Model, policy, images, backend: the last step of each, by each kernel that serves it.
PROFILED = tuple(
    (model, "full", images, backend)
    for model, images in (("var-d30", 64), ("var-d36", 16), ("infinity-2b", 2))
    for backend in ("hopper", "triton", "cuda")
)
PROFILE_SECONDS = 75.0  # ncu replays a kernel some 40 times; most of it is Python's start and the inputs
# A metric of --set full that a row keeps: what binds the kernel, and what its warps wait for.
KEPT = ("Duration", "Throughput", "Registers", "Shared Memory", "Occupancy", "Stall", "Hit Rate", "Active", "Elapsed",
        "Spill", "Bank Conflict", "IPC", "Frequency")  # fmt: skip
NCU = ("ncu", "--clock-control", "none", "--set", "full", "--csv", "--page", "details", "--kernel-name", "regex:attn",
       "--launch-skip", "2", "--launch-count", "1")  # fmt: skip


def benchmark(session: Session, arguments: tuple[str, ...]) -> bool:
    """`python -m benchmarks` into OUT/PHASE-result.json, again and again until it is done or the time is."""
    result = session.out / f"{session.phase}-result.json"
    return _until_done(session, ("benchmarks", *arguments, "--no-docs", "--out", str(result)))


def tune(session: Session) -> bool:
    """`python -m tools.tune` into OUT/tune-result.jsonl."""
    return _until_done(session, ("tools.tune", "--out", str(session.out / "tune-result.jsonl")))


def _until_done(session: Session, command: tuple[str, ...]) -> bool:
    for start in range(1, MOST_STARTS + 1):
        left = session.left()
        if left < LEAST_SECONDS:
            session.add({"start": start, "left out": "no time left"})
            break
        budget = str(int(left - LEAST_SECONDS / 2))
        ending = session.run([sys.executable, "-m", *command, "--budget", budget])
        session.add({"start": start, "code": ending.code, "stopped": ending.stopped, "seconds": ending.seconds})
        if ending.code in (0, 1, 2):  # done, or out of time; the same with wrong results; does not run like this at all
            session.say(f"{session.phase}: " + ("done" if ending.code == 0 else f"exit code {ending.code}"))
            return ending.code == 0
        session.say(f"{session.phase}: {ending.stopped or died(ending.code)}")
    return False


def profile(session: Session) -> bool:
    """One ncu run a case, so that a kill costs one; a row holds what its CSV says of the kernel."""
    if program := supervise.missing(NCU):
        session.add({"skipped": f"no {program} on this machine"})
        session.say(f"profile left out: no {program} on this machine")
        return True
    done = {row["case"] for row in records.read(session.journal) if "metrics" in row}
    right = True
    for case in PROFILED:
        name = "/".join(map(str, case))
        if name in done:
            continue
        if session.left() < LEAST_SECONDS:
            session.say(f"{name}: no time left")
            break
        table = session.out / "profile-now.csv"
        program = [sys.executable, "-m", "tools.gpu_session.one_call", *map(str, case)]
        ending = session.run([*NCU, "--log-file", str(table), *program], PROFILE_SECONDS)
        metrics = dict(_metrics(table))
        table.unlink(missing_ok=True)
        row = {"case": name, "metrics": metrics} if metrics else {"case": name, "failed": ending.stopped or ending.code}
        session.add(row)
        session.say(f"{name}: {metrics.get('Duration', 'no profile')}")
        right = right and bool(metrics)
    return right


def _metrics(table: Path) -> Iterator[tuple[str, str]]:
    """Name and value of what is kept of ncu's CSV; lines before its header are the program's."""
    if not table.exists():
        return
    lines = table.read_text(encoding="utf-8", errors="replace").splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), len(lines))
    for row in csv.DictReader(lines[start:]):
        name, value = row.get("Metric Name"), row.get("Metric Value")
        if name and value and any(part in name for part in KEPT):
            yield name, f"{value} {row.get('Metric Unit') or ''}".strip()
