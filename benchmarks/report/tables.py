"""Tables of results, for the terminal and, in github style, for README.md and docs/."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from tabulate import tabulate

from amskv_kernels.planning.memory import counted
from benchmarks.harness import machine
from benchmarks.harness.peers import OURS
from benchmarks.harness.results import Row, rows
from benchmarks.suites.plans import memory_of

Result = dict[str, Any]
CaseName = tuple[str, str, int, str]  # model, policy, images, dtype
NONE_YET = "*Not measured yet: no such result is committed.*"


def table(lines: Sequence[Sequence[object]], headers: Sequence[str], style: str, left: int = 1) -> str:
    """The lines, text to the left, figures to the right."""
    align = ("left",) * left + ("right",) * (len(headers) - left)
    return tabulate(lines, headers=headers, tablefmt=style, disable_numparse=True, colalign=align)


def duration(us: float) -> str:
    """Microseconds in the unit a person would say."""
    for limit, unit, size in ((1e3, "µs", 1.0), (1e6, "ms", 1e3)):
        if us < limit:
            return f"{us / size:.3g} {unit}"
    return f"{us / 1e6:.3g} s"


def rate(tflop_s: float) -> str:
    """TFLOP/s, or GFLOP/s below one."""
    return f"{tflop_s:.3g} TFLOP/s" if tflop_s >= 1 else f"{1e3 * tflop_s:.3g} GFLOP/s"


def caption(result: Result) -> str:
    """Which machine, commit and file the figures are from."""
    state = f"{result['commit'][:10]}{' with changes' if result['dirty'] else ''}"
    partial = "" if result["finished"] else ", not finished"
    file = f"benchmarks/results/{result['file']}"
    return f"Measured on {machine.summary(result['machine'])}, commit {state}{partial} (`{file}`)."


def case_of(row: Row) -> CaseName:
    """Whose row it is."""
    return row["model"], row["policy"], row["images"], row["dtype"]


def cases(found: Iterable[Row]) -> list[CaseName]:
    """The cases of rows, in order, each once."""
    return list(dict.fromkeys(case_of(row) for row in found))


def contestants(found: Sequence[Row]) -> list[str]:
    """Everyone who has a time in some row, ours first."""
    return list(dict.fromkeys(name for row in found for name in row["times"]))


def total_us(found: Sequence[Row], name: str) -> float | None:
    """Attention time of a whole generation, all layers; None where a step is missing."""
    if not all(name in row["times"] for row in found):
        return None
    return sum(row["layers"] * row["times"][name]["median_us"] for row in found)


def steps(found: Sequence[Row], style: str) -> str:
    """One case's rows, with every peer's time over ours."""
    others = [name for name in contestants(found) if name != OURS]
    lines = []
    for row in found:
        own = row["times"][OURS]
        lines.append(
            (
                row["step"] + 1, row["n"], row["n"] + row["history"], row["layers"], duration(own["median_us"]),
                f"{(own['q3_us'] - own['q1_us']) / own['median_us']:.0%}",
                rate(own["tflop_s"]), f"{1e3 * own['tb_s']:.3g} GB/s", row["bound"], f"{own['share_of_roof']:.0%}",
                *(f"{row['ratios'][name]:.2f}×" if name in row["ratios"] else "–" for name in others),
            )
        )  # fmt: skip
    headers = ("step", "queries", "keys", "layers", "ours", "spread", "rate", "traffic", "bound", "of roof", *others)
    return table(lines, headers, style, 0)


def sums(result: Result, suite: str, style: str) -> str:
    """Every case's attention as a sum over steps and layers."""
    found = rows(result, suite)
    names = [name for name in contestants(found) if name != OURS]
    lines = []
    for case in cases(found):
        own = [row for row in found if case_of(row) == case]
        ours = total_us(own, OURS) or 0.0
        roof = sum(row["layers"] * row["roof_us"] for row in own)
        cells = []
        for name in names:
            theirs = total_us(own, name)
            cells.append("–" if theirs is None else f"{theirs / ours:.2f}×")
        lines.append((case[0], case[1], case[2], case[3], duration(ours), f"{roof / ours:.0%}", *cells))
    return table(lines, ("model", "policy", "images", "dtype", "attention", "of roof", *names), style, 2)


def module_totals(result: Result) -> list[Row]:
    """Per case of the module suite: both times of all layers, their ratio, the caches' memory."""
    found, totals = rows(result, "module"), []
    for case in cases(found):
        own = [row for row in found if case_of(row) == case]
        ours, stock = (total_us(own, name) or 0.0 for name in (OURS, "stock"))
        memory = own[0]["memory"]
        totals.append(
            {"case": case, "layers": sum(row["layers"] for row in own), "ours_us": ours, "stock_us": stock, **memory}
        )
    return totals


def modules(result: Result, style: str) -> str:
    """Norm, RoPE, cache and attention of all layers, against the stock module."""
    lines = [
        (
            *one["case"], duration(one["stock_us"]), duration(one["ours_us"]),
            f"{one['ours_us'] / one['stock_us']:.2f}×", f"{one['stock_cache_mib']:,.0f}", f"{one['pool_mib']:,.0f}",
        )
        for one in module_totals(result)
    ]  # fmt: skip
    headers = ("model", "policy", "images", "dtype", "stock", "ours", "ours / stock", "stock MiB", "our MiB")
    return table(lines, headers, style, 2)


def hosts(result: Result, style: str) -> str:
    """What stands before a kernel: time, and dispatcher calls per attention module and step."""
    found = rows(result, "host")
    times = [(row["backend"], row["up_to"], f"{row['us']:.3g} µs") for row in found if row["kind"] == "attend"]
    calls = [
        (row["model"], row["backend"], f"{row['stock']:.1f}", f"{row['ours']:.1f}")
        for row in found
        if row["kind"] == "dispatches"
    ]
    return "\n\n".join(
        table(lines, headers, style, left)
        for lines, headers, left in (
            (times, ("backend", "from `attend` to", "time"), 2),
            (calls, ("dispatcher calls of an attention module", "our backend", "stock", "ours"), 2),
        )
        if lines
    )


def digits(result: Result, style: str) -> str:
    """The small model's generations under every cache."""
    lines = []
    for row in rows(result, "image", model="digits"):
        stock = row["caches"]["stock"]["images_s"]
        lines += [
            (
                name,
                row["images"],
                f"{one['images_s']:.3g}",
                f"{one['images_s'] / stock:.2f}×",
                f"{one['cache_mib']:.1f}",
            )
            for name, one in row["caches"].items()
        ]
    return table(lines, ("cache", "images", "images / s", "of stock's", "cache MiB"), style)


def images(result: Result, style: str) -> str:
    """Whole generations at the released shapes."""
    lines = [
        (row["model"], row["cache"], row["images"], row["how"], f"{row['images_s']:.3g}", f"{row['peak_gib']:.1f}")
        for row in rows(result, "image")
        if row["model"] != "digits"
    ]
    return table(lines, ("model", "cache", "images", "how", "images / s", "peak GiB"), style, 2)


def serving(result: Result, style: str) -> str:
    """Every setting at every load: throughput, latency and images inside, one server after the other."""
    lines = []
    for row in rows(result, "serving"):
        case = (f"{row['model']}, {row['policy']}", f"{row['pool_mib']:.0f}", f"{row['load']:g}×")
        for name, one in row["servers"].items():
            figures = (f"{one['images_s']:.3g}", f"{one['p50_s']:.2f}", f"{one['p99_s']:.2f}")
            figures += (f"{one['inside']:.1f}", f"{one['pool_share']:.0%}")
            lines.append((*case, name, *figures))
            case = ("", "", "")
    headers = ("model", "pool MiB", "load", "server", "images / s", "p50 s", "p99 s", "images at once", "pool in use")
    return table(lines, headers, style, 4)


def capacity(result: Result, style: str) -> str:
    """The largest batches before memory runs out."""
    found = rows(result, "capacity")
    whole = f"{result['machine'].get('memory_gib', '?')} GiB"
    lines = [
        (row["model"], row["cache"], whole if row["cap_gb"] is None else f"{row['cap_gb']} GB", row["images"])
        for row in found
    ]
    return table(lines, ("model", "cache", "memory", "largest batch"), style, 2)


def plans(found: Sequence[Row], style: str) -> str:
    """Planned memory, worked out anew; the planner's time is the row's."""
    lines = []
    for row in found:
        own: Row = memory_of(row["model"], row["policy"])
        eight_bit: Row = memory_of(row["model"], row["policy"], "int8")
        lines.append(
            (
                own["model"], own["policy"], f"{own['needed_mib']:,.1f}", f"{own['stock_mib']:,.1f}",
                f"{own['saved']:.1%}", f"{eight_bit['needed_mib']:,.1f}",
                f"{own['allocated_mib']:,.1f}", f"{own['in_flight_mib']:,.1f}",
                f"{own['retained_mib']:,.1f}", f"{own['retained_tokens_per_layer']:.1f} of {own['total_tokens']}",
                f"{own['kept_of_all']:.1%}", f"{own['saved_of_all']:.1%}", f"{own['saved_of_prefix']:.1%}",
                own["page_size"], f"{row['plan_ms']:.1f}",
            )
        )  # fmt: skip
    headers = (
        "model", "policy", "needed MiB", "stock MiB", "saved", "needed, int8", "pool", "in flight", "retained",
        "tokens / layer", "kept of all", "saved of all", "of prefix", "page", "plan ms",
    )  # fmt: skip
    return table(lines, headers, style, 2)


def roof_steps(row: Row, style: str) -> str:
    """One predicted generation, step by step."""
    lines = [
        (
            step["step"] + 1, step["n"], step["n"] + step["history"], step["layers"], f"{step['bytes'] / 1e6:,.1f}",
            f"{step['flops'] / 1e9:,.1f}", step["bound"], duration(step["roof_us"]),
        )
        for step in row["steps"]
    ]  # fmt: skip
    return table(lines, ("step", "queries", "keys", "layers", "MB", "GFLOP", "bound", "at least"), style, 0)


def last_calls(found: Sequence[Row], style: str) -> str:
    """Of every row, the two numbers of its last step in most layers, and which of them bounds it."""
    lines = []
    for row in found:
        last = [step for step in row["steps"] if step["step"] == row["steps"][-1]["step"]]
        step = max(last, key=lambda step: step["layers"])
        lines.append(
            (row["model"], row["policy"], row["head_dim"], step["n"], step["n"] + step["history"],
             f"{step['bytes'] / 2**20:,.0f} MiB", f"{step['flops'] / 1e9:,.0f}",
             f"{step['flops'] / step['bytes']:,.0f}", step["bound"], duration(step["roof_us"]))
        )  # fmt: skip
    headers = ("model", "policy", "head size", "queries", "keys", "bytes", "GFLOP", "FLOP / byte", "bound", "at least")
    return table(lines, headers, style, 2)


def facts(found: Sequence[Row], column: str, style: str) -> str:
    """One column per row of `found`, one line per fact."""
    names = [name for name in found[0] if name != column]
    lines = [(name, *(row[name] for row in found)) for name in names]
    return table(lines, ("", *(row[column] for row in found)), style, 1)


def roofs(found: Sequence[Row], style: str) -> str:
    """Predicted least attention times of whole generations."""
    lines = [
        (row["model"], row["policy"], row["images"], duration(row["image_roof_us"]),
         duration(row["image_roof_us"] / row["images"]))
        for row in found
    ]  # fmt: skip
    return table(lines, ("model", "policy", "images", "attention, at least", "an image"), style, 2)


def missing(result: Result, most: int = 40) -> str:
    """What could not be measured, with the reason; the same reason once."""
    reasons: dict[str, list[str]] = {}
    for what, why in result["missing"].items():
        # Older results say so even of what only lacks a file.
        reasons.setdefault(why.removeprefix("not available yet: "), []).append(what)
    for row in result["rows"]:
        for name, why in row.get("missing", {}).items():
            names = reasons.setdefault(why, [])
            names += [] if name in names else [name]
    lines = [f"- {', '.join(names[:4])}{' …' if len(names) > 4 else ''}: {why}" for why, names in reasons.items()]
    return "\n".join(lines[:most])


def show(results: Sequence[Result]) -> str:
    """Everything that results hold, for the terminal."""
    parts = []
    for result in results:
        parts.append(caption(result))
        for suite in ("cpu", "kernel"):
            if rows(result, suite):
                parts += [_last_steps(result, suite), f"{suite}: attention of a generation, peers' time over ours"]
                parts.append(sums(result, suite, "simple"))
        for suite, title, make in (
            ("module", "module: norm, RoPE, cache and attention, all layers and steps", modules),
            ("host", "host: what stands before a kernel", hosts),
            ("capacity", "largest batches", capacity),
            ("serving", "serving: Poisson arrivals", serving),
        ):
            if rows(result, suite):
                parts += [title, make(result, "simple")]
        if rows(result, "image", model="digits"):
            parts += ["digits", digits(result, "simple")]
        elif rows(result, "image"):
            parts += ["images", images(result, "simple")]
        if rows(result, "plan"):
            parts += ["plans: one image with guidance, bf16", plans(rows(result, "plan"), "simple")]
        for row in rows(result, "roof")[:1]:
            title = f"PREDICTION for {row['gpu']}: {row['ceilings']}"
            parts += [
                f"{title}; {row['model']} {row['policy']}, {counted(row['images'], 'image')}",
                roof_steps(row, "simple"),
                roofs(rows(result, "roof"), "simple"),
            ]
        if missing(result):
            parts += ["not measured", missing(result)]
    return "\n\n".join(parts)


def _last_steps(result: Result, suite: str) -> str:
    """The first case's steps."""
    found = rows(result, suite)
    case = case_of(found[0])
    own = [row for row in found if case_of(row) == case]
    return f"{suite}: {case[0]} {case[1]}, {counted(case[2], 'image')}, {case[3]}\n\n{steps(own, 'simple')}"
