"""The project's performance targets, each met, missed or not measured yet, judged from results alone."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.harness.peers import CONTIGUOUS, OURS
from benchmarks.harness.results import Row, rows
from benchmarks.report.tables import module_totals, table

Result = dict[str, Any]
RIVALS = ("cuDNN", "flash", "FlexAttention", "FlashInfer")
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
    return Verdict(f"{worst:+.1%} at worst of {len(found)} rows above 100 MB", worst <= 0.02)


def _module(result: Result) -> Verdict | None:
    wanted = [one for one in module_totals(result) if one["case"][:3] == ("var-d30", "ams-kv:75", 64)]
    if not wanted or wanted[0]["layers"] != 30:
        return None
    share = wanted[0]["ours_us"] / wanted[0]["stock_us"]
    return Verdict(f"{share:.3f}×", share <= 0.20)


def _saved(result: Result) -> Verdict | None:
    found = rows(result, "plan", model="var-d30", policy="ams-kv:84.83")
    return Verdict(f"{found[0]['saved_bytes']:.1%} less", found[0]["saved_bytes"] >= 0.89) if found else None


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


TARGETS = (
    Target("each step of VAR-d30-256, 64 images with guidance, over the best peer", "≥ 1.0×, geometric mean ≥ 1.15×",
           "H200", _each_step),
    Target("last step of VAR-256 (n 256, 680 keys, D 64)", "≥ 400 TFLOP/s", "H200", _rate("var-d30", 400)),
    Target("last step of VAR-512 (n 1024, 2240 keys, D 64)", "≥ 480 TFLOP/s", "H200", _rate("var-d36", 480)),
    Target("last step of Infinity-1M (n 4096, 10521 keys, D 128)", "≥ 620 TFLOP/s", "H200", _rate("infinity-2b", 620)),
    Target("steps with n ≤ 64 that move more than 100 MB", "≥ 70 % of the copy bandwidth", "H200", _bandwidth),
    Target("steps with n ≤ 64 that an empty launch outlasts", "≤ 1.3× an empty launch", "H200", _launches),
    Target("paged against one contiguous run", "≤ 2 % slower", "H200", _paging),
    Target("whole-image self-attention over the stock module's, VAR-d30, AMS-KV at 75 %", "≤ 0.20×", "H200", _module),
    Target("KV bytes of VAR-d30 at 84.83 %, bf16, against stock's 6 bytes", "≥ 89 % less", None, _saved),
    Target("allocated over tokens' own bytes, VAR-256, whole scales", "≤ 1.25×", None, _slack("var-d30", 1.25)),
    Target("allocated over tokens' own bytes, Infinity-1M, whole scales", "≤ 1.03×", None, _slack("infinity-2b", 1.03)),
    Target("last step D 64 over FlashAttention-2 of the same run", "≥ 1.0×", "A100", _a100_64),
    Target("D 128 at 2k keys and more", "≥ 175 TFLOP/s", "A100", _a100_128),
    Target("planning a VAR-d36 or Infinity-8B generation, one CPU core", "≤ 50 ms", None, _planner),
)  # fmt: skip


def verdict(target: Target, results: Sequence[Result]) -> tuple[Verdict, Result] | None:
    """The first result that can judge a target."""
    for result in results:
        if target.gpu is None or (result["machine"]["device"] == "cuda" and target.gpu in result["machine"]["name"]):
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
