"""`amskv evaluate`: what policies cost in quality, time and bytes, beside the full cache on the user's own model."""

from __future__ import annotations

import argparse
import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from amskv_kernels.cli.arguments import command, output_folder
from amskv_kernels.cli.comparing import Distance, Row, compare, contact_sheet, table
from amskv_kernels.cli.generate import count_of
from amskv_kernels.cli.subjects import add_drawing, add_model, subject_of
from amskv_kernels.planning.memory import MIB

if TYPE_CHECKING:
    from torch import Tensor

POLICIES = "ams-kv:75,ams-kv:84.83,sink:2,1,sliding:1"
EPILOG = """\
for example:
  amskv evaluate                                   the digits of this project, in a clone of it
  amskv evaluate --var var_d16.pth --vae vae_ch160v4096z32.pth --policies ams-kv:75,h2o:25,least-loss:25@losses.json

PSNR, LPIPS (where it is installed) and equal tokens compare with the full cache's images from the same seed; an image
is drawn before time counts.
writes to --out: evaluation.json, contact-sheet.png (the same images under every policy)
"""


def add(commands: Any) -> None:
    """Add the command to the parser's."""
    evaluate = command(commands, "evaluate", "compare policies with the full cache: quality, time, bytes", EPILOG)
    add_model(evaluate)
    add_drawing(evaluate)
    evaluate.add_argument("--policies", default=POLICIES, help=f"beside full, by commas (default {POLICIES})")
    evaluate.add_argument(
        "--out", type=output_folder, default=Path("evaluation"), help="folder to write to (default evaluation)"
    )
    evaluate.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Draw, compare, write."""
    from amskv_kernels.files import write_json
    from amskv_kernels.policies import Policy, parse_policy

    subject = subject_of(arguments)
    shape = subject.shape
    policies: dict[str, Policy] = {
        name: parse_policy(name, shape.schedule, shape.layers) for name in ("full", *_names(arguments.policies))
    }
    for policy in policies.values():
        subject.plan(policy)  # what does not fit the model is told before anything is drawn
    images = count_of(arguments, subject)
    distance = perceptual_distance()
    subject.draw(policies["full"], 1, arguments.seed)
    rows = list(compare(subject, policies, images, arguments.seed, distance))
    print(table(rows))
    arguments.out.mkdir(parents=True, exist_ok=True)
    result = {
        "model": shape.name, "images": images, "seed": arguments.seed, "pages": subject.pages,
        "rows": [_record(row) for row in rows],
    }  # fmt: skip
    write_json(arguments.out / "evaluation.json", result)
    print(f"\nfigures   {arguments.out / 'evaluation.json'}")
    if contact_sheet({row.name: row.drawn.images for row in rows}, arguments.out / "contact-sheet.png"):
        print(f"pictures  {arguments.out / 'contact-sheet.png'}")
    return 0


def _names(text: str) -> list[str]:
    """Policies by commas; a number after a comma belongs to the policy before it, as in sink:2,1."""
    names = [name for name in re.split(r",(?![0-9])", text) if name != "full"]
    if not all(names):
        raise ValueError(f"--policies is {text[:80]!r}; it must be policies by commas, such as {POLICIES}")
    return list(dict.fromkeys(names))


def _record(row: Row) -> dict[str, Any]:
    return {
        "policy": row.name,
        "pool_bytes_per_image": round(row.mib * MIB),
        "psnr_db": None if math.isinf(row.psnr) else round(row.psnr, 3),  # None: identical by being the same
        "lpips": row.lpips,
        "equal_tokens": row.same,
        "seconds_per_image": row.drawn.seconds / len(row.drawn.images),
    }


def perceptual_distance() -> Distance | None:
    """LPIPS between pictures (B, C, h, w) in [0, 1]; None where it is not installed, or has no weights to load."""
    try:
        import lpips
    except ImportError:
        return None
    try:
        measure = lpips.LPIPS(net="alex", verbose=False).eval().requires_grad_(False)
    except (OSError, RuntimeError) as error:
        print(f"LPIPS is left out: its weights cannot be loaded ({str(error).splitlines()[0]})")
        return None

    def distance(own: Tensor, other: Tensor) -> Tensor:
        found: Tensor = measure(own[:, :3], other[:, :3], normalize=True)
        return found.flatten()

    return distance
