"""Measure the candidates for the tile table of `attn` on the GPU at hand, and print its lines.

    python -m tools.tune [--models var-d30 var-d36 infinity-2b] [--policy full] [--images 8 64] [--budget SECONDS]

Every distinct call of a generation is timed with every candidate in turn; one whose output is wrong, or that does not
fit the GPU, is out. The best of each number of rows is printed as a line for the tile table, and all timings go, a line
each as they are known, to benchmarks/results/tune-<gpu>.jsonl: the same command goes on where it stopped.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch
from tabulate import tabulate
from triton.runtime.errors import OutOfResources

from amskv_kernels.cli import console
from amskv_kernels.ops.backends.triton import attn
from amskv_kernels.ops.backends.triton.common import describe
from amskv_kernels.ops.backends.triton.tiles import Tile, attn_tile
from benchmarks.harness import machine
from benchmarks.harness.cases import Case, Group, groups
from benchmarks.harness.gate import Gate
from benchmarks.harness.inputs import CallInputs, Pool
from benchmarks.harness.measure import summary, timer_for
from benchmarks.harness.tasks import BROKEN_DEVICE, BrokenDeviceError, still_works
from tools.gpu_session import records

WIDE = [
    Tile(block_m, block_n, warps, stages, full_first)
    for block_m, block_n, warps in (
        (64, 32, 4), (64, 64, 4), (64, 128, 4), (128, 32, 8), (128, 64, 4), (128, 64, 8), (128, 128, 8),
    )
    for stages in (2, 3)
    for full_first in (False, True)
]  # fmt: skip
NARROW = [
    Tile(block_m, block_n, warps, stages, False)
    for block_m in (16, 32)
    for block_n in (32, 64)
    for warps in (2, 4)
    for stages in (2, 3)
]
PACKED = [
    Tile(16, 16, warps, 1, False, heads, registers)
    for heads, warps, registers in ((2, 2, None), (2, 4, None), (4, 4, None), (4, 4, 128), (4, 8, None), (8, 8, 128))
]


def candidates(rows: int, entries: int) -> list[Tile]:
    """What may serve a call: tiles not more than twice as high as it needs."""
    fitting = [tile for tile in NARROW + WIDE if tile.block_m < 2 * max(rows, 16) or tile.block_m == 16]
    return fitting + (PACKED if rows <= 16 and entries <= 4 else [])


def contestant(inputs: CallInputs, tile: Tile) -> list[Callable[[], object]]:
    """The calls of a group with a tile forced."""

    def call(i: int) -> torch.Tensor:
        (q, k, v), (read, write) = inputs.qkv[i], inputs.tables[i]
        with mock.patch.object(attn, "attn_tile", lambda *_: tile):
            return attn.attn(q, k, v, inputs.pool.pages, inputs.pool.arena, read, write, inputs.scale)[0]

    return [lambda i=i: call(i) for i in range(inputs.sets)]


def passing(inputs: CallInputs, tiles: list[Tile]) -> dict[Tile, list[Callable[[], object]]]:
    """The candidates that run and are right."""
    gate, found = Gate(inputs), {}
    for tile in tiles:
        calls = contestant(inputs, tile)
        try:
            gate.check(str(tile), calls[0]())
        except (OutOfResources, AssertionError, ValueError, RuntimeError) as error:
            print(f"out: {tile}: {type(error).__name__} {str(error)[:100]}", file=sys.stderr)
            still_works(str(tile), error)
            continue
        found[tile] = calls
    return found


def tune(case: Case, group: Group, pool: Pool, seconds: float) -> records.Row:
    """A row for one distinct call: every candidate's time, the best and the table's own."""
    timer = timer_for(pool.device)
    inputs = CallInputs(pool, group, estimate_us=50.0)
    height = group.n * case.shape.heads // case.shape.kv_heads
    entries = inputs.tables[0][0].shape[2]
    own = attn_tile(describe(pool.pages.device).arch, case.shape.head_dim, 2, height, entries)
    entrants = passing(inputs, list(dict.fromkeys([own, *candidates(height, entries)])))
    times = timer.run({str(tile): calls for tile, calls in entrants.items()}, seconds, 5, 50)
    medians = {name: summary(each)["median_us"] for name, each in times.items()}
    best = min(medians, key=medians.__getitem__)
    return {
        "case": case.name, "head_dim": case.shape.head_dim, "rows": height, "history": group.history,
        "entries": entries, "page_size": case.plan.page_size, "best": best, "best_us": round(medians[best], 2),
        "own": str(own), "own_us": round(medians[str(own)], 2) if str(own) in medians else None, "all": medians,
    }  # fmt: skip


def key(row: records.Row) -> tuple[object, ...]:
    """What makes a call another one."""
    return row["case"], row["rows"], row["history"]


def tune_all(cases: list[Case], path: Path, seconds: float, deadline: float) -> list[records.Row]:
    """Rows of every call that the file does not hold yet, as long as there is time; then all of the file's.

    Raises:
        BrokenDeviceError: a candidate broke the device; the file names the call, which is not tried again.
    """
    done = {key(row) for row in records.read(path) if "rows" in row}
    for case in cases:
        pool = None
        for group in groups((case.model, case.policy)):
            wanted = (case.name, group.n * case.shape.heads // case.shape.kv_heads, group.history)
            if wanted in done or time.monotonic() > deadline:
                continue
            pool = pool or Pool(case, "cuda")
            done.add(wanted)
            try:
                records.add(path, tune(case, group, pool, seconds))
            except BrokenDeviceError as error:
                records.add(path, {**dict(zip(("case", "rows", "history"), wanted, strict=True)), "broken": str(error)})
                raise
    return [row for row in records.read(path) if "best" in row]


def main() -> int:
    """Tune the cases asked for, print the lines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=["var-d30", "var-d36", "infinity-2b"])
    parser.add_argument("--policy", default="full")
    parser.add_argument("--images", nargs="*", type=int, default=[8, 64])
    parser.add_argument("--seconds", type=float, default=0.02, help="of measuring for each candidate and call")
    parser.add_argument("--budget", type=float, default=math.inf, help="begin no further call after so many seconds")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/tune-<gpu>.jsonl")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("tuning needs a GPU", file=sys.stderr)
        return 2
    facts = machine.describe("cuda")
    path = options.out or Path("benchmarks/results") / f"tune-{machine.slug(facts)}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    records.add(path, {"machine": facts, "commit": machine.commit(), "sources": machine.sources()})
    cases = [Case(model, options.policy, images) for model in options.models for images in options.images]
    try:
        rows = tune_all(cases, path, options.seconds, time.monotonic() + options.budget)
    except BrokenDeviceError as error:
        print(f"{error}; the same command goes on after it", file=sys.stderr)
        return BROKEN_DEVICE
    shown = ("case", "head_dim", "rows", "history", "page_size", "best", "best_us", "own_us")
    print(tabulate([[row[name] for name in shown] for row in rows], headers=shown))
    for row in rows:
        print(f'Line({row["rows"]}, {row["best"]}, "{row["best_us"]} µs, {row["case"]}, history {row["history"]}"),')
    return 0


if __name__ == "__main__":
    sys.exit(console.run(main))
