"""The same images under several policies, beside those of the full cache: rows, a table, a contact sheet."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from amskv_kernels.planning.memory import MIB

if TYPE_CHECKING:
    from torch import Tensor

    from amskv_kernels.cli.drawing import Drawn, Subject
    from amskv_kernels.policies import Policy

ROUNDING = 1 / (12 * 255**2)  # squared error of rounding to 8 bits: no picture is closer than that, 58.9 dB
SHOWN = 12  # images of a strip

Distance = Callable[["Tensor", "Tensor"], "Tensor"]


class Row(NamedTuple):
    """A policy and what it drew, compared with the full cache's images.

    Attributes:
        mib: pool of one image.
        psnr: in dB; infinite for the full cache itself.
        same: share of equal tokens.
        lpips: mean distance; None where it is not installed.
    """

    name: str
    policy: Policy
    mib: float
    drawn: Drawn
    psnr: float
    same: float
    lpips: float | None = None


def compare(
    subject: Subject, policies: Mapping[str, Policy], images: int, seed: int, distance: Distance | None = None
) -> Iterator[Row]:  # fmt: skip
    """Draw the same images under each policy, the full cache's first."""
    from tqdm import tqdm

    full: Drawn | None = None
    for name, policy in tqdm(policies.items(), desc="drawing", unit="policy", disable=None):
        mib = subject.image_bytes(subject.plan(policy)) / MIB
        drawn = subject.draw(policy, images, seed)
        full = full or drawn
        error = (drawn.images - full.images).square().flatten(1).mean(1).clamp_min(ROUNDING)
        psnr = math.inf if drawn is full else float(-10 * error.log10().mean())
        far = None if distance is None else float(distance(drawn.images, full.images).mean())
        yield Row(name, policy, mib, drawn, psnr, float((drawn.tokens == full.tokens).float().mean()), far)


def table(rows: Sequence[Row], room: int | None = None) -> str:
    """What a person decides by.

    Args:
        rows: see `Row`.
        room: bytes, for a column that says how many images they hold.
    """
    shown: dict[str, Callable[[Row], str]] = {}
    shown["policy"], shown["MiB / image"] = lambda row: row.name, lambda row: f"{row.mib:.2f}"
    if room is not None:
        size = f"{room / 2**30:g} GiB" if room >= 2**30 else f"{room / MIB:g} MiB"
        shown[f"images in {size}"] = lambda row: f"{int(room / MIB / row.mib) if row.mib else 0}"
    shown["PSNR"] = lambda row: "identical" if math.isinf(row.psnr) else f"{row.psnr:.2f} dB"
    if all(row.lpips is not None for row in rows):
        shown["LPIPS"] = lambda row: f"{row.lpips:.4f}"
    shown["equal tokens"] = lambda row: f"{row.same:.1%}"
    shown["s / image"] = lambda row: f"{row.drawn.seconds / len(row.drawn.images):.3f}"
    lines = [tuple(shown), *(tuple(show(row) for show in shown.values()) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    shape = f"{{:<{widths[0]}}}" + "".join(f"  {{:>{width}}}" for width in widths[1:])
    return "\n".join(shape.format(*line) for line in lines)


def contact_sheet(pictures: Mapping[str, Tensor], path: Path) -> bool:
    """Each name's first images (B, C, h, w), one strip a name; False where there is no matplotlib to draw with."""
    import torch

    from amskv_kernels.cli import plots

    strips: dict[str, Any] = {
        name: torch.cat(list(images[:SHOWN]), dim=2).permute(1, 2, 0).clamp(0, 1).numpy()
        for name, images in pictures.items()
    }
    try:
        plots.strips(strips, path)
    except RuntimeError:
        return False
    return True
