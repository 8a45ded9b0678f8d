"""What the `serving` suite found, as a picture and in one figure."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from amskv_kernels.cli.plots import new_figure, save
from benchmarks.harness import machine
from benchmarks.harness.results import Row, rows
from benchmarks.suites.serving import ENGINE, LOCKSTEP, SINGLE

Result = dict[str, Any]
COLOURS = {ENGINE: "#0b6e4f", LOCKSTEP: "#c0392b", SINGLE: "#2c5fa8"}


def settings(result: Result) -> list[tuple[str, str, int]]:
    """(model, policy, images that lockstep has at once) of every setting with several loads."""
    found = [(row["model"], row["policy"], row["together"]) for row in rows(result, "serving")]
    return [setting for setting in dict.fromkeys(found) if found.count(setting) > 1]


def picture(result: Result, path: Path) -> None:
    """Images a second and the 99th percentile of latency over the load, a column for each setting."""
    shown = settings(result)
    figure, axes = new_figure(3.4 * len(shown), 5.5, columns=len(shown), rows=2)
    for column, setting in enumerate(shown):
        own = [row for row in rows(result, "serving") if (row["model"], row["policy"], row["together"]) == setting]
        above, below = axes[:, column] if len(shown) > 1 else axes
        for name, colour in COLOURS.items():
            loads = [row["load"] for row in own]
            for axis, figure_of in ((above, "images_s"), (below, "p99_s")):
                axis.plot(loads, [row["servers"][name][figure_of] for row in own], marker="o", color=colour, label=name)
        above.set_title(f"{setting[0]} {setting[1]}\n{own[0]['pool_mib']:.0f} MiB of pages", fontsize=9)
        below.set_xlabel("load, of lockstep's capacity")
        above.set_ylim(bottom=0)
        below.set_ylim(bottom=0)
        for axis in (above, below):
            axis.grid(alpha=0.3)
    first = axes[:, 0] if len(shown) > 1 else axes
    first[0].set_ylabel("images / s")
    first[1].set_ylabel("p99 latency, s")
    first[0].legend(fontsize=7)
    figure.supxlabel(f"{machine.summary(result['machine'])} · {result['file']}", fontsize=7, color="0.4")
    save(figure, path)


def gain(row: Row) -> tuple[float, float]:
    """The engine's images a second, and its 99th percentile of latency, over lockstep's."""
    own, other = row["servers"][ENGINE], row["servers"][LOCKSTEP]
    return own["images_s"] / other["images_s"], own["p99_s"] / other["p99_s"]
