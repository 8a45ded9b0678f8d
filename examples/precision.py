"""What bits are worth: the same images from the same seeds, everything kept in fewer bits, and policies in int8 pages.

    python -m examples.precision digits

Every row is compared with the full cache in fp32. int8 is drawn from int8 pages, what is below from a model of it: the
history read back as so many bits would give it, the current scale as it is. Bytes are of stock's accounting, 6 for an
element of K and one of V, as stock code has where a model computes in 16 bits. Rows are written as they are drawn; a
run that was cut off goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tabulate import tabulate
from tqdm import tqdm

from amskv_kernels import AMSKV, CachePlan, Full, Policy
from amskv_kernels.cli import console
from amskv_kernels.files import write_json
from amskv_kernels.models import Generation
from amskv_kernels.planning.layout import row_bytes
from amskv_kernels.planning.memory import STOCK_PAIR_BYTES
from amskv_kernels.policies import LeastLoss, Losses
from examples.contestants import measure
from examples.demo import machine
from examples.rounding import Rounded, four_bits
from examples.shootout import decibels, draw_with
from examples.subjects import NAMES, cache_for, subject
from examples.tables import scatter

SHARES = (0.20, 0.10, 0.05)  # of stock's bytes
EVERYTHING = "full"
INT8, HALF = "int8", "16 bits, not rounded"  # fp32 rows counted as two bytes an element: no worse than bf16


class Run(NamedTuple):
    """A row to draw.

    Attributes:
        policy, pages: for people.
        bits: of an element with its share of scales.
        share: of stock's bytes that are allowed; None where everything is kept.
        attention: makes what the model attends with, for a plan and labels.
        plan: None where none is needed.
    """

    policy: str
    pages: str
    bits: float
    share: float | None
    attention: Callable[[Any], Any]
    plan: CachePlan
    settings: str

    @property
    def key(self) -> tuple[Any, ...]:
        """What a row that was drawn before is known by."""
        return self.policy, self.pages, self.share, self.settings

    @property
    def retained_share(self) -> float:
        """Of stock's bytes, between steps."""
        tokens = self.plan.retained_tokens / self.plan.heads / self.plan.num_layers
        return tokens * 2 * self.bits / 8 / (self.plan.schedule.total * STOCK_PAIR_BYTES)


class Bench:
    """A model, and the images that everything is compared with."""

    def __init__(self, name: str, images: int, batch: int) -> None:
        self.subject, self.batch = subject(name), batch
        self.var, self.vae = self.subject.load("cpu")
        self.labels = self.subject.labels(images)
        self.full = self.draw(lambda labels: cache_for(self.var, self.plan(Full()), labels))

    def plan(self, policy: Policy) -> CachePlan:
        """The policy's plan."""
        config = self.var.config
        return CachePlan.build(config.schedule, policy, config.depth, kv_heads=config.num_heads)

    def draw(self, attention: Callable[[Any], Any]) -> Generation:
        """The images, from the shoot-out's seeds."""
        return draw_with(self.subject, self.var, self.vae, attention, self.labels, self.batch)[0]

    def runs(self, losses: Losses) -> Iterator[Run]:
        """Policies at equal bytes in int8 and in 16 bits, then everything kept in ever fewer bits."""
        config, full = self.var.config, self.plan(Full())
        eight = 8 * row_bytes(config.head_dim, 1) / config.head_dim
        pages = {INT8: (eight, torch.int8), HALF: (16.0, torch.float32)}
        paged = partial(cache_for, self.var)
        yield Run(EVERYTHING, INT8, eight, None, partial(paged, full, pages=torch.int8), full, "Full()")
        for share in SHARES:
            for kind, (bits, dtype) in pages.items():
                tokens = int(share * config.schedule.total * STOCK_PAIR_BYTES / (2 * bits / 8))
                for name, policy in contestants(config.schedule, config.depth, tokens, losses).items():
                    plan = self.plan(policy)
                    make = partial(paged, plan, pages=dtype)
                    yield Run(name, kind, bits, share, make, plan, repr(policy))
        stored = config.schedule.prefix / (len(config.schedule) - 1)
        for rounding in four_bits(config.head_dim, stored):
            yield Run(
                EVERYTHING, rounding.name, rounding.bits, None, lambda _, how=rounding: Rounded(how), full, "Full()"
            )  # fmt: skip

    def row(self, run: Run) -> dict[str, Any]:
        """A run's images beside the full cache's."""
        drawn = self.draw(run.attention)
        psnr = decibels(drawn.images, self.full.images)
        return {
            "policy": run.policy, "pages": run.pages, "bits": run.bits, "share": run.share,
            "retained_share": run.retained_share, "settings": run.settings,
            "same_tokens": float((drawn.tokens == self.full.tokens).float().mean()),
            "accuracy": self.subject.judge(drawn.images, self.labels, self.full.images)[0],
            "psnr_db": sum(psnr) / len(psnr), "psnr_each": psnr,
        }  # fmt: skip


def contestants(schedule: Any, layers: int, tokens: int, losses: Losses) -> dict[str, Policy]:
    """Those of the shoot-out that lead it."""
    found: dict[str, Policy] = {
        "LeastLoss": LeastLoss(tokens, losses), "LeastLoss, heads": LeastLoss(tokens, losses, "head"),
    }  # fmt: skip
    with suppress(ValueError):  # too few tokens for its condensed scales
        found["AMS-KV, calibrated"] = AMSKV.for_budget(schedule, layers, tokens, losses=losses)
    return found


def everything(rows: Sequence[dict[str, Any]], style: str = "simple") -> str:
    """What bits are worth with everything kept, the most first."""
    kept = sorted((row for row in rows if row["share"] is None), key=lambda row: (-row["bits"], -row["psnr_db"]))
    lines = [
        (row["pages"], f"{row['bits']:.2f}", f"{row['retained_share']:.1%}", *_quality(row)) for row in kept
    ]  # fmt: skip
    headers = ("held as", "bits", "of stock's bytes", "PSNR, dB (95 %)", "same tokens", "recognised")
    return _table(lines, headers, 1, style)


def at_equal_bytes(rows: Sequence[dict[str, Any]], style: str = "simple") -> str:
    """What int8 pages are worth to a policy: the best first at each share."""
    found = sorted((row for row in rows if row["share"] is not None), key=lambda row: (-row["share"], -row["psnr_db"]))
    lines = [
        (f"{row['share']:.0%}", row["policy"], row["pages"], f"{row['retained_share']:.1%}", *_quality(row))
        for row in found
    ]
    headers = ("allowed", "policy", "pages", "of stock's bytes", "PSNR, dB (95 %)", "same tokens", "recognised")
    return _table(lines, headers, 3, style)


def _quality(row: dict[str, Any]) -> tuple[str, str, str]:
    psnr = f"{row['psnr_db']:.2f} ± {1.96 * scatter(row['psnr_each']):.2f}"
    return psnr, f"{row['same_tokens']:.1%}", f"{row['accuracy']:.1%}"


def _table(lines: list[Any], headers: tuple[str, ...], names: int, style: str) -> str:
    align = ["left"] * names + ["right"] * (len(headers) - names)
    return tabulate(lines, headers=headers, tablefmt=style, disable_numparse=True, colalign=align)


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=NAMES)
    parser.add_argument("--images", type=int, default=100, help="a row (default 100)")
    parser.add_argument("--batch", type=int, default=20, help="images at once (default 20)")
    parser.add_argument("--out", type=Path, help="folder to write to (default demo-out and the model's name)")
    args = parser.parse_args(argv)
    path = (args.out or Path("demo-out") / args.model) / "precision.json"
    bench = Bench(args.model, args.images, args.batch)
    setup = {"images": args.images, "batch": args.batch, "sampling": bench.subject.sampling}
    before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    known = before.get("rows", []) if all(before.get(key) == value for key, value in setup.items()) else []
    done = {(row["policy"], row["pages"], row["share"], row["settings"]): row for row in known}
    losses = measure(bench.subject, bench.var, bench.vae, torch.device("cpu")).losses
    rows = []
    for run in tqdm(list(bench.runs(losses)), unit="row", desc="drawing", disable=None):
        rows.append(done.get(run.key) or bench.row(run))
        done[run.key] = rows[-1]
        write_json(path, {"machine": machine(), **setup, "rows": list(done.values())})
    write_json(path, {"machine": machine(), **setup, "rows": rows})
    print(f"\n{everything(rows)}\n\n{at_equal_bytes(rows)}\n\nfigures   {path}")


if __name__ == "__main__":
    sys.exit(console.run(main))
