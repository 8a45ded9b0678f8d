"""The avatars: dicebear's "critters" (CC0 1.0) at 64 x 64, drawn from seeds, with their true attributes.

Needs dicebear-core, dicebear-styles and resvg-py, the extra `avatars`; only training and the judge's own training do.
"""

from __future__ import annotations

import io
import json
import multiprocessing
import sys
import zlib
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from amskv_kernels.files import replacing
from examples.avatars.attributes import ATTRIBUTES, is_held_out

SIDE = 64
STYLE = "critters"
ACCENTS = ("#f0abfc", "#fdba74", "#5eead4")  # of what is on top
# Each part draws its own seeds: part 0 teaches the generator, 1 the judge, 2 tells what the judge is worth.
PARTS = {"generator": 0, "judge": 1, "test": 2}
PART_SEEDS = 1_000_000  # apart


@dataclass(frozen=True)
class Avatars:
    """Images (N, 3, 64, 64) uint8 and, in the order of ATTRIBUTES, the indices of their values (N, 6) int64."""

    images: Tensor
    values: Tensor

    def pixels(self, chosen: Tensor | slice = slice(None)) -> Tensor:
        """Images as the models take them: fp32 in [0, 1]."""
        return self.images[chosen].float() / 255


@cache
def _style() -> Any:
    from dicebear import Style

    return Style(json.loads((files("dicebear_styles") / f"{STYLE}.json").read_text(encoding="utf-8")))


def _options(seed: int) -> dict[str, Any]:
    return {
        "seed": str(seed),
        "bodyVariant": list(ATTRIBUTES["body"]), "bodyColor": list(ATTRIBUTES["colour"]),
        "eyesVariant": list(ATTRIBUTES["eyes"]), "mouthVariant": list(ATTRIBUTES["mouth"]),
        "backgroundColor": list(ATTRIBUTES["background"]), "accentColor": list(ACCENTS),
        "topVariant": [top for top in ATTRIBUTES["top"] if top != "none"],
        "topProbability": 100 * (1 - 1 / len(ATTRIBUTES["top"])), "patternProbability": 0, "cheeksProbability": 0,
        "animationVariant": ["none"],
    }  # fmt: skip


def draw(seed: int) -> tuple[np.ndarray, list[int]]:
    """One avatar: its pixels (64, 64, 3) uint8, and the indices of its true attributes, as dicebear reports them."""
    import resvg_py
    from dicebear import Avatar
    from PIL import Image

    avatar = Avatar(_style(), _options(seed))
    said = avatar.to_json()["options"]
    names = {
        "body": said["bodyVariant"], "colour": said["bodyColor"][0], "eyes": said["eyesVariant"],
        "mouth": said["mouthVariant"], "background": said["backgroundColor"][0], "top": said.get("topVariant", "none"),
    }  # fmt: skip
    png = resvg_py.svg_to_bytes(svg_string=avatar.to_string(), width=SIDE, height=SIDE)
    pixels = np.asarray(Image.open(io.BytesIO(bytes(png))).convert("RGB"))
    return pixels, [values.index(names[name]) for name, values in ATTRIBUTES.items()]


def avatars(part: str, count: int, folder: Path, jobs: int = 1) -> Avatars:
    """The first `count` avatars of a part, kept in `folder` for later; the generator's lack the held-out pairs."""
    drawn_as = zlib.crc32(json.dumps([STYLE, SIDE, _options(0)]).encode())  # others are other avatars
    file = folder / f"{part}-{count}-{drawn_as:08x}.pt"
    if not file.exists():
        first = PARTS[part] * PART_SEEDS
        drawn: list[tuple[np.ndarray, list[int]]] = []
        with (
            multiprocessing.get_context("spawn").Pool(jobs) as pool,
            tqdm(total=count, desc=f"avatars, {part}", file=sys.stdout, mininterval=5) as bar,
        ):
            for one in pool.imap(draw, range(first, first + PART_SEEDS), chunksize=50):
                if part != "generator" or not bool(is_held_out(torch.tensor([one[1][:4]]))):
                    drawn.append(one)
                    bar.update()
                if len(drawn) == count:
                    break
        images = torch.from_numpy(np.stack([pixels for pixels, _ in drawn])).permute(0, 3, 1, 2).contiguous()
        with replacing(file) as beside:
            torch.save({"images": images, "values": torch.tensor([values for _, values in drawn])}, beside)
    return Avatars(**torch.load(file, weights_only=True))
