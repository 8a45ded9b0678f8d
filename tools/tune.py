"""Measure the candidates for the tile table of `attn` on the GPU at hand, and print its lines.

    python -m tools.tune [--models var-d30 var-d36 infinity-2b] [--policy full] [--images 8 64]

Every distinct call of a generation is timed with every candidate in turn; one whose output is wrong, or that does not
fit the GPU, is out. The best of each number of rows is printed as a line for `amskv_kernels/triton_ops/tiles.py`, and
all timings go to benchmarks/results/tune-<gpu>.json.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch
from tabulate import tabulate
from triton.runtime.errors import OutOfResources

from amskv_kernels.cli import console
from amskv_kernels.files import write_json
from amskv_kernels.ops.backends.triton import attn
from amskv_kernels.ops.backends.triton.common import describe
from amskv_kernels.ops.backends.triton.tiles import Tile, attn_tile
from benchmarks.harness import machine
from benchmarks.harness.cases import Case, groups
from benchmarks.harness.gate import Gate
from benchmarks.harness.inputs import CallInputs, Pool
from benchmarks.harness.measure import summary, timer_for

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
            continue
        found[tile] = calls
    return found


def tune(case: Case, device: str, seconds: float) -> list[dict[str, object]]:
    """A row for each distinct call: every candidate's time, the best and the table's own."""
    pool, timer, rows = Pool(case, device), timer_for(device), []
    for group in groups((case.model, case.policy)):
        inputs = CallInputs(pool, group, estimate_us=50.0)
        height = group.n * case.shape.heads // case.shape.kv_heads
        entries = inputs.tables[0][0].shape[2]
        own = attn_tile(describe(pool.pages.device).arch, case.shape.head_dim, 2, height, entries)
        entrants = passing(inputs, list(dict.fromkeys([own, *candidates(height, entries)])))
        times = timer.run({str(tile): calls for tile, calls in entrants.items()}, seconds, 5, 50)
        medians = {name: summary(each)["median_us"] for name, each in times.items()}
        best = min(medians, key=medians.__getitem__)
        rows.append({
            "case": case.name, "head_dim": case.shape.head_dim, "rows": height, "history": group.history,
            "entries": entries, "page_size": case.plan.page_size, "best": best, "best_us": round(medians[best], 2),
            "own": str(own), "own_us": round(medians[str(own)], 2) if str(own) in medians else None, "all": medians,
        })  # fmt: skip
    return rows


def main() -> int:
    """Tune the cases asked for, print and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=["var-d30", "var-d36", "infinity-2b"])
    parser.add_argument("--policy", default="full")
    parser.add_argument("--images", nargs="*", type=int, default=[8, 64])
    parser.add_argument("--seconds", type=float, default=0.02, help="of measuring for each candidate and call")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("tuning needs a GPU", file=sys.stderr)
        return 1
    cases = [Case(model, options.policy, images) for model in options.models for images in options.images]
    rows = [row for case in cases for row in tune(case, "cuda", options.seconds)]
    shown = ("case", "head_dim", "rows", "history", "page_size", "best", "best_us", "own_us")
    print(tabulate([[row[name] for name in shown] for row in rows], headers=shown))
    for row in rows:
        print(f'Line({row["rows"]}, {row["best"]}, "{row["best_us"]} µs, {row["case"]}, history {row["history"]}"),')
    facts = machine.describe("cuda")
    path = Path("benchmarks/results") / f"tune-{machine.slug(facts)}.json"
    write_json(path, {"machine": facts, "commit": machine.commit(), "rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(console.run(main))
