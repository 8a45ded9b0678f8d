"""How many images a pool holds when they are at different steps: exact arithmetic, worked out where it is shown.

`python -m benchmarks.report.staggering` draws the picture of docs/serving.md.
"""

from __future__ import annotations

import sys
from collections import deque
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from amskv_kernels import CachePlan, parse_policy
from amskv_kernels.cli import console
from amskv_kernels.cli.plots import new_figure, save
from amskv_kernels.serving.admission import PAIR, Admission
from amskv_kernels.serving.units import PlanUnits
from amskv_kernels.shapes import ModelShape

GIB = 2**30
MEMORY = 8 * GIB
BF16_BYTES = 2
CASES = (("var-d16", "full"), ("var-d16", "ams-kv:75"), ("var-d30", "full"), ("var-d30", "ams-kv:75"),
         ("var-d30", "sliding:1"), ("var-d36", "full"), ("var-d36", "ams-kv:75"))  # fmt: skip
SHOWN = ("var-d30", "full")
GENERATIONS = 5  # of the picture
PICTURE = Path(__file__).parents[2] / "docs" / "images" / "serving-pool.png"


class Filling(NamedTuple):
    """Images with guidance in a pool while many wait, tick by tick."""

    units: int
    curve: tuple[int, ...]  # units of one image at every step
    inside: list[int]
    held: list[int]  # units

    @property
    def lockstep(self) -> int:
        """Images that begin together."""
        return self.units // max(self.curve)

    @property
    def steps(self) -> int:
        """Of an image."""
        return len(self.curve)

    @property
    def settled(self) -> float:
        """Images inside on average, over one generation after the first ones are through."""
        return float(np.mean(self.inside[2 * self.steps : 3 * self.steps]))


@cache
def filling(model: str, policy: str) -> Filling:
    """Whoever waits enters as the engine's admission lets them."""
    shape = ModelShape.named(model)
    chosen = parse_policy(policy, shape.schedule, shape.layers)
    plan = CachePlan.build(shape.schedule, chosen, shape.layers, kv_heads=shape.kv_heads)
    curve = PlanUnits(plan).curve
    heads = shape.kv_heads if plan.heads == 1 else 1
    units = MEMORY // (heads * 2 * plan.page_size * shape.head_dim * BF16_BYTES)
    book, entered, inside, held = Admission(curve, units), deque([0] * len(curve), maxlen=len(curve)), [], []
    for _ in range(GENERATIONS * len(curve)):
        entered.append(0)
        while book.enter(PAIR):
            entered[-1] += 1
        inside.append(sum(entered))
        held.append(int(book.coming[0]))
        book.advance()
    return Filling(units, tuple((PAIR * curve).tolist()), inside, held)


def table() -> str:
    """Images inside at once in lockstep and staggered, with how many begin per tick."""
    lines = [
        "| model | policy | at once in lockstep | staggered | | begin per step, lockstep | staggered |",
        "|---|---|---|---|---|---|---|",
    ]
    for model, policy in CASES:
        found = filling(model, policy)
        begin, together = found.settled / found.steps, found.lockstep / found.steps
        lines.append(
            f"| {model} | `{policy}` | {found.lockstep} | {found.settled:.0f} | "
            f"{found.settled / found.lockstep:.1f}× | {together:.1f} | {begin:.1f} |"
        )
    return "\n".join(lines)


def picture(path: Path) -> None:
    """The pool over time under both."""
    found = filling(*SHOWN)
    ticks = np.arange(len(found.held)) + 1
    figure, axes = new_figure(8, 3.2)
    together = np.tile(np.array(found.curve) * found.lockstep, GENERATIONS) / found.units
    axes.step(ticks, 100 * together, where="mid", color="#c0392b", label=f"lockstep: {found.lockstep} images")
    axes.step(
        ticks, 100 * np.array(found.held) / found.units, where="mid", color="#0b6e4f", linewidth=2.4,
        label=f"staggered: up to {max(found.inside)} images",
    )  # fmt: skip
    axes.axhline(100, color="black", linestyle=":", label="the pool")
    axes.set_xlabel("tick: one step of every image inside")
    axes.set_ylabel("% of the pool held")
    axes.set_ylim(0, 110)
    axes.set_title(f"{SHOWN[0]}, {SHOWN[1]}, bf16, {MEMORY // GIB} GiB, while many images wait", fontsize=10)
    axes.legend(fontsize=8, loc="lower right")
    axes.grid(alpha=0.3)
    save(figure, path)


if __name__ == "__main__":
    sys.exit(console.run(lambda: picture(PICTURE)))
