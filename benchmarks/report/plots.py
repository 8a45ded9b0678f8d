"""Pictures of results for docs/images: drawn from committed JSON, each names its machine."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any, TypeVar

from amskv_kernels.cli.plots import new_figure, save
from amskv_kernels.planning.memory import counted
from benchmarks.harness import machine
from benchmarks.harness.peers import OURS
from benchmarks.harness.results import newest, rows
from benchmarks.report import serving
from benchmarks.report.tables import CaseName, case_of, cases, contestants, module_totals, total_us
from benchmarks.suites.image import MODELS

Result = dict[str, Any]
T = TypeVar("T")
IMAGES = Path(__file__).parents[2] / "docs" / "images"
COLOURS = ("#0b6e4f", "#c0392b", "#2c5fa8", "#e08e0b", "#7d4fa3", "#50808e", "#8a6d3b", "#444444")


def _coloured(things: Iterable[T], first: int = 0) -> Iterator[tuple[T, str]]:
    """Every thing with a colour, from the `first` on; where there are more things they come again."""
    return zip(things, cycle((*COLOURS[first:], *COLOURS[:first])), strict=False)


def _note(axes: Any, result: Result) -> None:
    """Which machine and file, small, under the picture."""
    text = f"{machine.summary(result['machine'])} · {result['file']} · commit {result['commit'][:10]}"
    axes.figure.supxlabel(text, fontsize=7, color="0.4")


def _case_title(case: CaseName) -> str:
    model, policy, images, dtype = case
    return f"{model}, {policy}, {counted(images, 'image')} with guidance, {dtype}"


def _case_label(case: CaseName) -> str:
    model, policy, images, dtype = case
    return f"{model} {policy}\n{counted(images, 'image')}, {dtype}"


def per_step(result: Result, suite: str, case: CaseName, path: Path) -> None:
    """Time of every step's calls, all layers, for every contestant; below it, the roof."""
    found = [row for row in rows(result, suite) if case_of(row) == case]
    figure, axes = new_figure(8, 4.5)
    at = sorted({row["step"] for row in found})
    for name, colour in _coloured(contestants(found)):
        times = []
        for step in at:
            own = [row for row in found if row["step"] == step]
            times.append(total_us(own, name))
        known = [(step, us / 1e3) for step, us in zip(at, times, strict=True) if us is not None]
        axes.plot(
            [step + 1 for step, _ in known], [ms for _, ms in known], marker="o", markersize=4,
            color=colour, linewidth=2.4 if name == OURS else 1.2, label=name,
        )  # fmt: skip
    roof = [sum(row["layers"] * row["roof_us"] for row in found if row["step"] == step) / 1e3 for step in at]
    axes.plot([step + 1 for step in at], roof, color="black", linestyle=":", label="roof of this machine")
    axes.set_yscale("log")
    axes.set_xticks([step + 1 for step in at])
    axes.set_xlabel("step")
    axes.set_ylabel("ms for all layers")
    axes.set_title(f"Attention by step: {_case_title(case)}", fontsize=10)
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3, which="both")
    _note(axes, result)
    save(figure, path)


def roofline(result: Result, suite: str, dtype: str, path: Path) -> None:
    """Every row of ours under the machine's roof: operations per byte against rate attained."""
    found = [row for row in rows(result, suite) if row["dtype"] == dtype]
    ceilings = result["ceilings"]
    bandwidth, peak = ceilings["tb_s"], ceilings["tflop_s"][dtype]
    figure, axes = new_figure(8, 4.5)
    intensity = [row["flops"] / row["bytes"] for row in found]
    low, high = min(intensity) / 1.5, max(max(intensity), peak / bandwidth) * 1.5
    ridge = peak / bandwidth
    unit, size = ("TFLOP/s", 1.0) if peak >= 10 else ("GFLOP/s", 1e3)
    roof = [(x, min(peak, x * bandwidth) * size) for x in (low, ridge, high)]
    axes.plot([x for x, _ in roof], [y for _, y in roof], color="black", label="copy bandwidth and matrix product")
    names = list(dict.fromkeys(row["model"] for row in found))
    for name, colour in _coloured(names):
        own = [row for row in found if row["model"] == name]
        axes.scatter(
            [row["flops"] / row["bytes"] for row in own], [row["times"][OURS]["tflop_s"] * size for row in own],
            s=18, color=colour, label=name, alpha=0.8,
        )  # fmt: skip
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("operations per byte")
    axes.set_ylabel(unit)
    axes.set_title(f"Attention calls under this machine's roof, {dtype}", fontsize=10)
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3, which="both")
    _note(axes, result)
    save(figure, path)


def sums(result: Result, suite: str, path: Path) -> None:
    """Attention of whole generations: every contestant's time over ours, as bars."""
    found = rows(result, suite)
    kept = cases(found)
    names = [name for name in contestants(found) if name != OURS]
    figure, axes = new_figure(8, 1.2 + 0.42 * len(kept) * max(1, len(names) / 2))
    height = 0.8 / max(1, len(names))
    for i, (name, colour) in enumerate(_coloured(names, 1)):
        shares = []
        for case in kept:
            own = [row for row in found if case_of(row) == case]
            theirs, ours = total_us(own, name), total_us(own, OURS)
            shares.append(theirs / ours if theirs and ours else 0.0)
        axes.barh([j + i * height for j in range(len(kept))], shares, height, color=colour, label=name)
    axes.axvline(1, color=COLOURS[0], linewidth=2, label="ours")
    axes.set_yticks(
        [j + 0.4 - height / 2 for j in range(len(kept))],
        [_case_label(case) for case in kept],
        fontsize=7,
    )
    axes.invert_yaxis()
    axes.set_xlabel("time over ours, all steps and layers (more is slower)")
    axes.set_title("Attention of whole generations", fontsize=10)
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3, axis="x")
    _note(axes, result)
    save(figure, path)


def modules(result: Result, path: Path) -> None:
    """The attention module of a whole generation against stock's, as bars."""
    totals = module_totals(result)
    figure, axes = new_figure(8, 1.4 + 0.5 * len(totals))
    for i, (name, colour) in enumerate((("stock_us", COLOURS[1]), ("ours_us", COLOURS[0]))):
        axes.barh(
            [j + 0.4 * i for j in range(len(totals))], [one[name] / one["stock_us"] for one in totals], 0.4,
            color=colour, label=name.removesuffix("_us"),
        )  # fmt: skip
    axes.set_yticks([j + 0.2 for j in range(len(totals))], [_case_label(one["case"]) for one in totals], fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel("time over the stock module's")
    axes.set_title("Norm, RoPE, cache and attention of a whole generation", fontsize=10)
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3, axis="x")
    _note(axes, result)
    save(figure, path)


def memory(result: Result, model: str, path: Path) -> None:
    """Cached MiB at every step under each policy, stock on top."""
    found = rows(result, "plan", model=model)
    figure, axes = new_figure(8, 4.5)
    steps = range(1, len(found[0]["sizes"]) + 1)
    axes.step(steps, found[0]["stock_live_mib"], where="mid", color="black", linestyle="--", label="stock")
    for row, colour in _coloured(found):
        axes.step(steps, row["live_mib"], where="mid", color=colour, label=row["policy"])
    axes.set_xticks(list(steps), [f"{h}×{w}" for h, w in found[0]["sizes"]], fontsize=8)
    axes.set_xlabel("step: the map being drawn")
    axes.set_ylabel("MiB in the cache")
    axes.set_ylim(bottom=0)
    axes.set_title(f"Cache of one {model} image with guidance, bf16 (exact, from the plan)", fontsize=10)
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    save(figure, path)


def batches(result: Result, model: str, path: Path) -> None:
    """Images per second over the batch, until memory runs out."""
    found = [row for row in rows(result, "image", model=model) if row["how"] == "eager"]
    figure, axes = new_figure(8, 4.5)
    for name, colour in _coloured(dict.fromkeys(row["cache"] for row in found)):
        own = sorted((row["images"], row["images_s"]) for row in found if row["cache"] == name)
        axes.plot([x for x, _ in own], [y for _, y in own], marker="o", color=colour, label=name)
        limit = [row["images"] for row in rows(result, "capacity", model=model, cache=name) if row["cap_gb"] is None]
        if limit:
            axes.axvline(limit[0], color=colour, linestyle=":", linewidth=1)
    axes.set_xscale("log", base=2)
    axes.set_xlabel("images at once (dotted: the largest batch that fits)")
    axes.set_ylabel("images per second")
    axes.set_title(f"{model}, random weights, bf16", fontsize=10)
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    _note(axes, result)
    save(figure, path)


def wanted(results: Sequence[Result]) -> dict[str, Callable[[Path], None]]:
    """Every picture that these results can give, by file name."""
    found: dict[str, Callable[[Path], None]] = {}
    for suite, device in (("cpu", "cpu"), ("kernel", "cuda")):
        result = newest(results, suite, device)
        if result is None:
            continue
        known = cases(rows(result, suite))
        case = next((one for one in known if one[:2] == ("var-d30", "full")), known[0])
        found[f"{suite}-steps.png"] = partial(per_step, result, suite, case)
        found[f"{suite}-roofline.png"] = partial(roofline, result, suite, case[3])
        found[f"{suite}-sums.png"] = partial(sums, result, suite)
        if rows(result, "module"):
            found[f"{suite}-module.png"] = partial(modules, result)
    planned, drawn = newest(results, "plan"), newest(results, "image", "cuda")
    for model in ("var-d30", "infinity-2b") if planned else ():
        if planned and rows(planned, "plan", model=model):
            found[f"memory-{model}.png"] = partial(memory, planned, model)
    for model in MODELS if drawn else ():
        if drawn and rows(drawn, "image", model=model):
            found[f"batches-{model}.png"] = partial(batches, drawn, model)
    if (served := newest(results, "serving", "cpu")) is not None and serving.settings(served):
        found["serving.png"] = partial(serving.picture, served)
    return found


def draw(results: Sequence[Result], folder: Path = IMAGES) -> list[Path]:
    """Draw all of them."""
    drawn = []
    for name, make in wanted(results).items():
        make(folder / name)
        drawn.append(folder / name)
    return drawn
