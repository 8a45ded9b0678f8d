"""What the shoot-out's rows say, as tables for people."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tabulate import tabulate

from examples.contestants import ABLATION, FITTED, RIVALS, SHARES, WINDOWS
from examples.subjects import shown


def ordered(rows: Sequence[dict]) -> list[dict]:
    """The rows that are shown: the best PSNR first at each share."""
    found = [row for row in rows if row["policy"] not in ABLATION]
    return sorted(found, key=lambda row: (-row["share"], -(row["psnr_db"] or 99)))


def render(rows: Sequence[dict], style: str = "simple") -> str:
    """Rows, as `asdict` gives them, as a table for people."""
    lines = [
        (
            f"{row['share']:.0%}",
            row["policy"],
            f"{row['tokens_per_layer']:.1f}",
            f"{row['retained_mib']:.1f} ({row['retained_share']:.1%})",
            f"{row['peak_mib']:.1f}",
            "" if row["attention_share"] is None else f"{row['attention_share']:.2f}×",
            f"{row['accuracy']:.1%}",
            f"{row['same_tokens']:.1%}",
            _psnr(row),
            f"{row['attention_error']:.1%}",
            "" if row["gap"] is None else f"{row['gap']:.1%}",
        )
        for row in ordered(rows)
    ]
    headers = (
        "allowed", "policy", "tokens / layer", "KV MiB (of stock)", "peak MiB", "attention time", "recognised",
        "same tokens", "PSNR, dB (95 %)", "attention error", "gap",
    )  # fmt: skip
    return tabulate(
        lines, headers=headers, tablefmt=style, disable_numparse=True, colalign=("right", "left", *["right"] * 9)
    )


def _psnr(row: dict) -> str:
    """A row's mean and its 95 % confidence interval."""
    if row["psnr_db"] is None:
        return "identical"
    return f"{row['psnr_db']:.2f} ± {1.96 * scatter(row['psnr_each']):.2f}"


def scatter(values: Sequence[float]) -> float:
    """Standard error of a mean."""
    return float(torch.tensor(values).std() / len(values) ** 0.5)


def ahead(rows: Sequence[dict], ours: str, rival: str, share: float) -> tuple[float, float]:
    """How much closer to the full cache's images `ours` comes, dB, and its standard error: paired, image by image."""
    psnr = {(row["policy"], row["share"]): row["psnr_each"] for row in rows}
    each = [own - other for own, other in zip(psnr[ours, share], psnr[rival, share], strict=True)]
    return sum(each) / len(each), scatter(each)


def margins(rows: Sequence[dict], style: str = "simple") -> str:
    """How far ahead of their rivals LeastLoss and AMS-KV are, and AMS-KV of itself with other demanding layers."""
    pairs = [(ours, rival) for ours in FITTED for rival in RIVALS]
    pairs += [(ours, rival) for ours in ("AMS-KV, calibrated", "AMS-KV") for rival in (*WINDOWS, "H2O")]
    pairs += [("AMS-KV, calibrated", rival) for rival in ABLATION]
    lines = []
    for ours, rival in pairs:
        found = [ahead(rows, ours, rival, share) for share in SHARES]
        lines.append((ours, f"against {rival}", *(f"{mean:+.2f} ± {error:.2f}" for mean, error in found)))
    headers = ("policy", "", *(f"{share:.0%}" for share in SHARES))
    align = ("left", "left", *["right"] * len(SHARES))
    return tabulate(lines, headers=headers, tablefmt=style, disable_numparse=True, colalign=align)


def worth(scales: Sequence[dict], style: str = "simple") -> str:
    """What a scale is worth: the attention that later scales pay to it, as a whole and per token."""
    lines = [
        (f"{i + 1}", f"{scale['tokens']}", f"{scale['attention']:.1%}", f"{scale['attention'] / scale['tokens']:.2%}")
        for i, scale in enumerate(scales)
    ]
    headers = ("scale", "tokens", "attention from later scales", "per token")
    return tabulate(lines, headers=headers, tablefmt=style, disable_numparse=True, colalign=["right"] * 4)


def verdicts(rows: Sequence[dict], style: str = "simple") -> str:
    """What else the judge finds under each policy, in the order of `render`."""
    lines = [
        (f"{row['share']:.0%}", row["policy"], *(shown(name, value) for name, value in row["judged"].items()))
        for row in ordered(rows)
    ]
    headers = ("allowed", "policy", *ordered(rows)[0]["judged"])
    align = ("right", "left", *["right"] * (len(headers) - 2))
    return tabulate(lines, headers=headers, tablefmt=style, disable_numparse=True, colalign=align)
