"""What the docs say of the models that ship: their demo, shoot-out and judges, and what bits are worth to them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from benchmarks.report.tables import NONE_YET
from examples import demo, precision
from examples import tables as examples

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
EVALUATION = EXAMPLES / "digits" / "results" / "evaluation.json"

# Of int8 on the digits: dB by the share of stock's bytes, None where everything is kept.
WANTED = {None: 50, 0.20: 45, 0.10: 37.5, 0.05: 33.5}
KEPT_SHARE = 0.22


def result_of(model: str, name: str) -> dict[str, Any] | None:
    """A committed result of a model that ships, with where it lies."""
    path = EXAMPLES / model / "results" / name
    if not path.exists():
        return None
    return {**json.loads(path.read_text(encoding="utf-8")), "path": path.relative_to(ROOT).as_posix()}


def demo_of(model: str) -> str:
    if (result := result_of(model, "demo.json")) is None:
        return NONE_YET
    machine, timing = result["machine"], f"; {result['timing']}" if "timing" in result else ""
    return (
        f"{demo.render(result['rows'], 'github')}\n\n{result['images']} {model} in batches of {result['batch']} with "
        f"guidance, {machine['dtype']}{timing}; measured on {machine['cpu']}, torch {machine['torch']} "
        f"([demo.json]({result['path']}))."
    )


def shootout_of(model: str) -> str:
    if (result := result_of(model, "shootout.json")) is None:
        return NONE_YET
    machine, found = result["machine"], result["rows"]
    judged = f"{examples.verdicts(found, 'github')}\n\n" if found[0].get("judged") else ""
    return (
        f"{examples.render(found, 'github')}\n\n{result['images']} {model} per row with guidance, fp32, with "
        f"95 % confidence intervals. Attention time is over stock's, empty where it was not measured; *gap* is how far "
        f"a fitted plan's expected loss may lie above the least possible. "
        f"{machine.get('gpu', _cpu(machine))}, torch {machine['torch']} (`{result['path']}`).\n\n{judged}"
        f"PSNR ahead of a rival, in dB ± standard error, by the share of bytes allowed:\n\n"
        f"{examples.margins(found, 'github')}\n\n"
        f"What a scale of the {model} model is worth to later ones:\n\n{examples.worth(result['scales'], 'github')}"
    )


def precision_of(model: str) -> str:
    if (result := result_of(model, "precision.json")) is None:
        return NONE_YET
    machine, found = result["machine"], result["rows"]
    kept = [row for row in found if row["share"] is None and row["bits"] < 8]
    best = max(kept, key=lambda row: row["psnr_db"])
    wanted = "; ".join(_wanted(found, share, psnr) for share, psnr in WANTED.items())
    return (
        f"{precision.everything(found, 'github')}\n\n"
        f"The best of what was tried below eight bits is {best['pages']}, {best['psnr_db']:.1f} dB.\n\n"
        f"Policies within a share of stock's bytes, in int8 and in 16 bits:\n\n"
        f"{precision.at_equal_bytes(found, 'github')}\n\nWanted of int8: {wanted}.\n\n"
        f"{result['images']} {model} per row with guidance, beside the full cache's in fp32, with 95 % "
        f"confidence intervals; {_cpu(machine)}, torch {machine['torch']} (`{result['path']}`)."
    )


def _wanted(found: list[Any], share: float | None, psnr: float) -> str:
    """What is wanted of int8 at this share of stock's bytes, None for everything kept, and the best there is."""
    rows = [row for row in found if row["pages"] == precision.INT8 and row["share"] == share]
    best = max(rows, key=lambda row: row["psnr_db"])
    reached = "met" if best["psnr_db"] >= psnr and best["retained_share"] <= (share or KEPT_SHARE) else "missed"
    where = f"at {share:.0%}" if share else f"with everything kept at {KEPT_SHARE:.0%}"
    return f"{psnr} dB {where} ({reached}: {best['psnr_db']:.2f} dB, {best['retained_share']:.2%})"


def eight_bits() -> str:
    """What the first screen says of int8 pages."""
    if (result := result_of("digits", "precision.json")) is None:
        return NONE_YET
    row = next(row for row in result["rows"] if row["pages"] == "int8" and row["share"] is None)
    return (
        f"In int8 pages, `full` holds every token that is read in {row['retained_share']:.1%} of the bytes that stock "
        f"code caches in 16 bits,\n{row['psnr_db']:.1f} dB from the exact images, on the digits below "
        f"([precision.json]({result['path']}), [docs/policies.md](docs/policies.md#what-bits-are-worth))."
    )


def evaluation() -> str:
    if not EVALUATION.exists():
        return NONE_YET
    result = json.loads(EVALUATION.read_text(encoding="utf-8"))
    lines = [f"| {name} | {share:.1%} |" for name, share in result["recognised"].items()]
    judge = "; ".join(f"{share:.1%} {name}" for name, share in result["judge"].items())
    return "\n".join(
        ["| policy | digits recognised |", "|---|---|", *lines, "",
         f"{result['images']} digits each. The classifier itself recognises {judge}. Measured on {result['device']}, "
         f"torch {result['torch']}."]
    )  # fmt: skip


def judged() -> str:
    """Real avatars, and generated ones of pairs that were shown and that were held out."""
    if (result := result_of("avatars", "evaluation.json")) is None:
        return NONE_YET
    names, real = result["attributes"], result["real"]
    bias = "; ".join(f"{value:.2f} of {count}" for count, value in real["frechet_of_real"].items())
    found = {f"real, {real['avatars']['tested']:,}": (real["accuracy"], "")}
    for kind in (key for key in result if key.startswith("pairs")):
        found[f"{kind}, {result['images']}"] = result[kind]["accuracy"], f"{result[kind]['frechet']:.2f}"
    lines = [
        f"| {kind} | {' | '.join(f'{accuracy[name]:.1%}' for name in names)} | {distance} |"
        for kind, (accuracy, distance) in found.items()
    ]
    header = f"| avatars | {' | '.join(names)} | Fréchet distance |"
    return "\n".join(
        [header, f"|---|{'---|' * (len(names) + 1)}", *lines, "",
         f"Everything kept, fp32. Real avatars are this far from the distance's reference themselves: {bias} of them. "
         f"Measured on {result['device']}, torch {result['torch']} (`{result['path']}`)."]
    )  # fmt: skip


def _cpu(machine: dict[str, str]) -> str:
    """The processor as the examples name it; older results say "1 threads"."""
    return re.sub(r"\b1 threads$", "1 thread", machine["cpu"])
