"""What became faster or slower from A to B; exit code 1 if anything became slower, 2 without a comparison."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.harness import machine
from benchmarks.harness.measure import summary
from benchmarks.harness.peers import CONTIGUOUS, STOCK
from benchmarks.harness.peers import PEERS as OTHERS
from benchmarks.harness.results import read
from benchmarks.report.tables import duration, table

# Not ours, so not what a comparison of two versions of ours is about.
PEERS = {*(peer.name for peer in OTHERS), STOCK, CONTIGUOUS, "stock"}


@dataclass(frozen=True)
class Change:
    """One contestant's row in both results; `ratio` is B's median over A's."""

    key: str
    contestant: str
    before_us: float
    after_us: float
    apart: bool  # the two interquartile ranges do not meet

    @property
    def ratio(self) -> float:
        """B's median over A's."""
        return self.after_us / self.before_us


def times_of(row: dict[str, Any]) -> dict[str, dict[str, float]]:
    """What a row says of time, by contestant: of calls, of a cache's whole images, or of the planner."""
    found: dict[str, dict[str, float]] = dict(row.get("times", {}))
    images = row["caches"] if "caches" in row else {row["cache"]: row} if "seconds" in row else {}
    found |= {name: summary([1e6 * second for second in one["seconds"]]) for name, one in images.items()}
    if "plan_ms" in row:
        found["planner"] = summary([1e3 * row["plan_ms"]])
    return found


def changes(before: dict[str, Any], after: dict[str, Any], peers: bool = False) -> list[Change]:
    """All rows that both have, ours or the peers' as well."""
    old = {row["key"]: row for row in before["rows"]}
    found = []
    for row in after["rows"]:
        then = times_of(old.get(row["key"], {}))
        for name, b in times_of(row).items():
            a = then.get(name)
            if a is None or (name in PEERS and not peers):
                continue
            apart = a["q3_us"] < b["q1_us"] or b["q3_us"] < a["q1_us"]
            found.append(Change(row["key"], name, a["median_us"], b["median_us"], apart))
    return found


def slower(found: Sequence[Change], above: float) -> list[Change]:
    """Those that take more than `above` times as long, and not by spread alone; the worst first."""
    return sorted((c for c in found if c.apart and c.ratio > above), key=lambda c: -c.ratio)


def faster(found: Sequence[Change], above: float) -> list[Change]:
    """Those that the reverse holds for."""
    return sorted((c for c in found if c.apart and c.ratio < 1 / above), key=lambda c: c.ratio)


def render(title: str, found: Sequence[Change], most: int = 30) -> str:
    """A table of changes."""
    lines = [
        (c.key, c.contestant, duration(c.before_us), duration(c.after_us), f"{c.ratio:.2f}×") for c in found[:most]
    ]
    more = f"\n… and {len(found) - most} more" if len(found) > most else ""
    return f"{title}: {len(found)}\n\n{table(lines, ('row', 'contestant', 'A', 'B', 'B / A'), 'simple', 2)}{more}"


def main(argv: Sequence[str]) -> int:
    """Compare two files.

    Raises:
        UnreadableResultError: one of them is not a result.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks compare", description=__doc__)
    parser.add_argument("before", type=Path, metavar="A.json")
    parser.add_argument("after", type=Path, metavar="B.json")
    parser.add_argument("--above", type=float, default=1.05, help="times as long that count as slower (default 1.05)")
    parser.add_argument("--peers", action="store_true", help="compare the peers' times as well")
    arguments = parser.parse_args(argv)
    before, after = read(arguments.before), read(arguments.after)
    found = changes(before, after, arguments.peers)
    for name, result in (("A", before), ("B", after)):
        print(f"{name}  {result['commit'][:10]}  {machine.summary(result['machine'])}")
    if before["machine"] != after["machine"]:
        print("the machines differ: what follows compares them as well")
    if not found:
        print("no row in common")
        return 2
    worse, better = slower(found, arguments.above), faster(found, arguments.above)
    print(f"{len(found)} rows in common, {len(found) - len(worse) - len(better)} unchanged\n")
    for title, some in (("slower", worse), ("faster", better)):
        if some:
            print(render(title, some) + "\n")
    return 1 if worse else 0
