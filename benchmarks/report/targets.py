"""The project's performance targets, each met, missed or not measured yet, judged from results alone."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.harness.peers import CONTIGUOUS, EIGHT_BIT, OURS, STOCK
from benchmarks.harness.results import Row, rows
from benchmarks.report.serving import gain
from benchmarks.report.tables import case_of, cases, module_totals, table, total_us
from benchmarks.suites.plans import memory_of

Result = dict[str, Any]
RIVALS = ("cuDNN", "flash", "FlashAttention-3", "FlashAttention-4", "FlexAttention", "FlashInfer")
GPUS = {"Hopper": ("H100", "H200"), "H200": ("H200",), "A100": ("A100",)}  # target's word: parts of devices' names
NATIVE_REPORT = Path(__file__).parents[2] / "tools" / "reports" / "native-report.json"
LOADING, CONSUMING = "clocks to load pages of 16, estimated", "clocks of a consumer, estimated"
HEADLINE = {"model": "var-d30", "images": 64, "dtype": "bf16"}


@dataclass(frozen=True)
class Verdict:
    """A figure as text, and whether it reaches the target."""

    figure: str
    met: bool


@dataclass(frozen=True)
class Target:
    """What is wanted, on which device, and how to judge one result; None says that it does not hold the rows."""

    what: str
    wanted: str
    gpu: str | None
    judge: Callable[[Result], Verdict | None]


def _best_rival(row: Row) -> float | None:
    """The fastest rival's time over ours."""
    found = [row["ratios"][name] for name in RIVALS if name in row["ratios"]]
    return min(found, default=None)


def _each_step(result: Result) -> Verdict | None:
    ratios = [_best_rival(row) for row in rows(result, "kernel", policy="full", **HEADLINE)]
    known = [ratio for ratio in ratios if ratio is not None]
    if not known or len(known) < len(ratios):
        return None
    mean = statistics.geometric_mean(known)
    return Verdict(f"least {min(known):.2f}×, geometric mean {mean:.2f}×", min(known) >= 1.0 and mean >= 1.15)


def _rate(model: str, least: float) -> Callable[[Result], Verdict | None]:
    def judge(result: Result) -> Verdict | None:
        found = rows(result, "kernel", model=model, policy="full", dtype="bf16")
        last = max((row["step"] for row in found), default=None)
        attained = [row["times"][OURS]["tflop_s"] for row in found if row["step"] == last]
        return Verdict(f"{max(attained):.0f} TFLOP/s", max(attained) >= least) if attained else None

    return judge


def _bandwidth(result: Result) -> Verdict | None:
    found = [row for row in rows(result, "kernel") if row["n"] <= 64 and row["bytes"] > 100e6]
    copy = result.get("ceilings", {}).get("tb_s")
    if not found or not copy:
        return None
    least = min(row["times"][OURS]["tb_s"] for row in found) / copy
    return Verdict(f"least {least:.0%} of {len(found)} rows", least >= 0.7)


def _launches(result: Result) -> Verdict | None:
    # A call of 90 MB cannot end within a launch's time: this is about calls that the launch outlasts.
    found = [row for row in rows(result, "kernel") if row["n"] <= 64 and row["bound"] == "launch"]
    if not found:
        return None
    worst = max(row["times"][OURS]["median_us"] / row["launch_us"] for row in found)
    return Verdict(f"at most {worst:.2f}× in {len(found)} rows", worst <= 1.3)


def _paging(result: Result) -> Verdict | None:
    found = [row for row in rows(result, "kernel") if CONTIGUOUS in row["ratios"] and row["bytes"] > 100e6]
    if not found:
        return None
    worst = max(1 / row["ratios"][CONTIGUOUS] for row in found) - 1
    return Verdict(f"{worst:+.1%} at worst of {len(found)} rows above 100 MB", worst <= 0.01)


def _module(result: Result) -> Verdict | None:
    wanted = [one for one in module_totals(result) if one["case"][:3] == ("var-d30", "ams-kv:75", 64)]
    if not wanted or wanted[0]["layers"] != 30:
        return None
    share = wanted[0]["ours_us"] / wanted[0]["stock_us"]
    return Verdict(f"{share:.3f}×", share <= 0.20)


def _saved(result: Result) -> Verdict | None:
    found = rows(result, "plan", model="var-d30", policy="ams-kv:84.83")
    return Verdict(f"{found[0]['saved_bytes']:.1%} less", found[0]["saved_bytes"] >= 0.89) if found else None


def _eight_bit(_: Result) -> Verdict:
    """Whatever the result: exact arithmetic."""
    memory = memory_of("var-d30", "full", "int8")
    share = float(str(memory["retained_mib"])) / float(str(memory["stock_mib"]))
    return Verdict(f"{share:.2%}", share <= 0.22)


def _slack(model: str, most: float) -> Callable[[Result], Verdict | None]:
    def judge(result: Result) -> Verdict | None:
        # Where tokens are chosen, a layer's old and new pages live at once for a moment: no target speaks of those.
        whole = ("full", "ams-kv")
        found = [row for row in rows(result, "plan", model=model) if row["policy"].partition(":")[0] in whole]
        if not found:
            return None
        worst = max(row["allocated_mib"] / row["retained_mib"] for row in found)
        return Verdict(f"at most {worst:.3f}× under {len(found)} policies", worst <= most)

    return judge


def _planner(result: Result) -> Verdict | None:
    found = [row for model in ("var-d36", "infinity-8b") for row in rows(result, "plan", model=model)]
    if not found:
        return None
    worst = max(row["plan_ms"] for row in found)
    return Verdict(f"at most {worst:.1f} ms", worst <= 50)


def _a100_128(result: Result) -> Verdict | None:
    found = [row for row in rows(result, "kernel", head_dim=128) if row["n"] + row["history"] >= 2048]
    attained = [row["times"][OURS]["tflop_s"] for row in found]
    return Verdict(f"{max(attained):.0f} TFLOP/s", max(attained) >= 175) if attained else None


def _a100_64(result: Result) -> Verdict | None:
    found = rows(result, "kernel", policy="full", **HEADLINE)
    last = [row["ratios"]["flash"] for row in found if row["step"] == 9 and "flash" in row["ratios"]]
    return Verdict(f"{last[0]:.2f}×", last[0] >= 1.0) if last else None


def _loading(head_dim: int, most: int) -> Callable[[Result], Verdict | None]:
    """Whatever the result: the clocks stand in the native report."""

    def judge(_: Result) -> Verdict | None:
        report = json.loads(NATIVE_REPORT.read_text(encoding="utf-8"))
        found = [row for row in report["rows"] if LOADING in row and f"head_dim {head_dim}," in row["kernel"]]
        if not found:
            return None
        load, consume = (max(row[name] for row in found) for name in (LOADING, CONSUMING))
        return Verdict(f"{load:,.0f} clocks, the consumers {consume:,.0f}", load <= most and load <= consume)

    return judge


def _cpu_steps(result: Result) -> Verdict | None:
    found = [row["ratios"]["SDPA"] for row in rows(result, "cpu", policy="full") if row["n"] >= 64]
    return Verdict(f"least {min(found):.2f}× of {len(found)} rows", min(found) >= 1.0) if found else None


def _cpu_early_steps(result: Result) -> Verdict | None:
    found = [row for row in rows(result, "cpu", policy="full") if row["n"] < 64]
    limits = [max(2 * row["times"]["SDPA"]["median_us"], 25.0) for row in found]
    shares = [row["times"][OURS]["median_us"] / limit for row, limit in zip(found, limits, strict=True)]
    return Verdict(f"at most {max(shares):.2f} of that in {len(shares)} rows", max(shares) <= 1) if shares else None


def _cpu_roof(result: Result) -> Verdict | None:
    found = rows(result, "cpu", policy="full")
    last = [max((row for row in found if case_of(row) == case), key=lambda row: row["step"]) for case in cases(found)]
    shares = [row["times"][OURS]["share_of_roof"] for row in last]
    return Verdict(f"least {min(shares):.0%} of {len(shares)} cases", min(shares) >= 0.6) if shares else None


def _cpu_bf16(result: Result) -> Verdict | None:
    found = rows(result, "cpu")
    sums = {case: total_us([row for row in found if case_of(row) == case], OURS) for case in cases(found)}
    pairs = [(us, sums.get((*case[:3], "fp32"))) for case, us in sums.items() if case[3] == "bf16"]
    known = [bf16 / fp32 for bf16, fp32 in pairs if bf16 and fp32]
    return Verdict(f"at most {max(known):.2f}× of {len(known)} cases", max(known) <= 1) if known else None


def _cpu_eight_bit(result: Result) -> Verdict | None:
    name = EIGHT_BIT.format("cpu")
    found = [row["times"] for row in rows(result, "cpu", dtype="fp32") if name in row["times"]]
    ratios = [times[name]["median_us"] / times[OURS]["median_us"] for times in found]
    return Verdict(f"at most {max(ratios):.2f}× of {len(ratios)} rows", max(ratios) <= 1) if ratios else None


def _host(result: Result) -> Verdict | None:
    found = [row for row in rows(result, "host", kind="attend") if row["up_to"] in ("the kernel", "the launch")]
    us = {row["backend"]: row["us"] for row in found}
    if not us.keys() >= {"cpu", "triton"}:
        return None
    return Verdict(f"{us['cpu']:.1f} and {us['triton']:.1f} µs", us["cpu"] <= 10 and us["triton"] <= 25)


def _cpu_image(policy: str, least: float) -> Callable[[Result], Verdict | None]:
    def judge(result: Result) -> Verdict | None:
        found = rows(result, "cpu", policy=policy)
        sums = [
            [total_us([row for row in found if case_of(row) == case], name) for name in (STOCK, OURS)]
            for case in cases(found)
        ]
        known = [stock / ours for stock, ours in sums if stock and ours]
        return Verdict(f"least {min(known):.2f}× of {len(known)} models", min(known) >= least) if known else None

    return judge


def _cpu_module(result: Result) -> Verdict | None:
    if result["machine"]["device"] != "cpu":
        return None
    found = [one["ours_us"] / one["stock_us"] for one in module_totals(result) if one["stock_us"]]
    return Verdict(f"at most {max(found):.2f}× of {len(found)} cases", max(found) <= 0.8) if found else None


def _serving(result: Result) -> Verdict | None:
    found = [gain(row) for row in rows(result, "serving", load=1.5)]
    if not found:
        return None
    least, worst = min(images for images, _ in found), max(p99 for _, p99 in found)
    return Verdict(f"least {least:.2f}× the images/s, p99 at worst {worst:.2f}×", least >= 1.3 and worst <= 1.0)


TARGETS = (
    Target("each step of VAR-d30-256, 64 images with guidance, over the best peer", "≥ 1.0×, geometric mean ≥ 1.15×",
           "Hopper", _each_step),
    Target("last step of VAR-256 (n 256, 680 keys, D 64)", "≥ 450 TFLOP/s", "Hopper", _rate("var-d30", 450)),
    Target("last step of VAR-512 (n 1024, 2240 keys, D 64)", "≥ 500 TFLOP/s", "Hopper", _rate("var-d36", 500)),
    Target("last step of Infinity-1M (n 4096, 10521 keys, D 128)", "≥ 690 TFLOP/s", "H200", _rate("infinity-2b", 690)),
    Target("steps with n ≤ 64 that move more than 100 MB", "≥ 70 % of the copy bandwidth", "Hopper", _bandwidth),
    Target("steps with n ≤ 64 that an empty launch outlasts", "≤ 1.3× an empty launch", "Hopper", _launches),
    Target("paged against one contiguous run", "≤ 1 % slower", "Hopper", _paging),
    Target("whole-image self-attention over the stock module's, VAR-d30, AMS-KV at 75 %", "≤ 0.20×", "Hopper",
           _module),
    Target("loading warps, D 64, clocks per tile of 128 keys in pages of 16, estimated",
           "≤ 1,050, the consumers' at most", None, _loading(64, 1050)),
    Target("loading warps, D 128, the same", "≤ 1,600, the consumers' at most", None, _loading(128, 1600)),
    Target("KV bytes of VAR-d30, everything kept, int8 pages, against stock's 6 bytes", "≤ 22 %", None, _eight_bit),
    Target("KV bytes of VAR-d30 at 84.83 %, bf16, against stock's 6 bytes", "≥ 89 % less", None, _saved),
    Target("allocated over tokens' own bytes, VAR-256, whole scales", "≤ 1.25×", None, _slack("var-d30", 1.25)),
    Target("allocated over tokens' own bytes, Infinity-1M, whole scales", "≤ 1.03×", None, _slack("infinity-2b", 1.03)),
    Target("last step D 64 over FlashAttention-2 of the same run", "≥ 1.0×", "A100", _a100_64),
    Target("D 128 at 2k keys and more", "≥ 175 TFLOP/s", "A100", _a100_128),
    Target("planning a VAR-d36 or Infinity-8B generation, one CPU core", "≤ 50 ms", None, _planner),
    Target("CPU, each step with n ≥ 64, `full`, over SDPA on ready keys", "≥ 1.0×", None, _cpu_steps),
    Target("CPU, each step with n < 64, `full`", "≤ 2× SDPA's time or 25 µs", None, _cpu_early_steps),
    Target("CPU, the last step, `full`", "≥ 60 % of the roof measured in the run", None, _cpu_roof),
    Target("CPU, attention of a whole image in bf16 over fp32", "≤ 1×", None, _cpu_bf16),
    Target("CPU, each step in fp32, int8 pages over fp32 pages", "≤ 1×", None, _cpu_eight_bit),
    Target("CPU, attention of a whole image, `full`, over stock's concatenation", "≥ 1.3×", None,
           _cpu_image("full", 1.3)),
    Target("CPU, the same, AMS-KV at 75 %", "≥ 2×", None, _cpu_image("ams-kv:75", 2)),
    Target("CPU, the whole self-attention module over stock's", "≤ 0.8×", None, _cpu_module),
    Target("host time of a call up to its kernel, native and Triton", "≤ 10 and ≤ 25 µs", None, _host),
    Target("serving at 1.5× capacity over lockstep batches, p99 no worse", "≥ 1.3× the images/s", None, _serving),
)  # fmt: skip


def _is_of(machine: dict[str, Any], names: tuple[str, ...]) -> bool:
    return machine["device"] == "cuda" and any(name in machine["name"] for name in names)


def verdict(target: Target, results: Sequence[Result]) -> tuple[Verdict, Result] | None:
    """The first result that can judge a target."""
    for result in results:
        if target.gpu is None or _is_of(result["machine"], GPUS[target.gpu]):
            found = target.judge(result)
            if found is not None:
                return found, result
    return None


def render(results: Sequence[Result], style: str) -> str:
    """Every target with its figure."""
    lines = []
    for target in TARGETS:
        where = target.gpu or "any machine"
        found = verdict(target, results)
        if found is None:
            lines.append((target.what, where, target.wanted, "not measured yet", ""))
        else:
            lines.append(
                (target.what, where, target.wanted, "met" if found[0].met else "missed",
                 f"{found[0].figure} (`{found[1]['file']}`)")
            )  # fmt: skip
    return table(lines, ("target", "on", "wanted", "", "figure"), style, 5)
