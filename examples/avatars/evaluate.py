"""What the judge sees in generated avatars beside real ones, and in pairs of body and colour that were never shown.

python -m examples.avatars.evaluate --images 200
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from amskv_kernels.cli import arguments, console
from amskv_kernels.files import write_json
from examples.avatars.attributes import ASKED, some_classes
from examples.avatars.judge import verdict
from examples.avatars.model import WEIGHTS
from examples.avatars.subject import SUBJECT
from examples.shootout import draw
from examples.subjects import plan_for

BATCH = 20
KINDS = {"pairs that were shown": False, "pairs that were held out": True}


def seen_in(images: Tensor, labels: Tensor) -> dict[str, Any]:
    """The judge's findings, of what was asked for."""
    found = asdict(verdict(images, labels, images))
    del found["like_full"]  # these are the full cache's
    return {name: found[name] for name in ("accuracy", "all_asked", "frechet")}


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=arguments.whole(2), default=200, help="of each kind of pairs (default 200)")
    parser.add_argument("--device", type=arguments.device, default="cpu")
    parser.add_argument("--out", type=arguments.output_file, help="write the result there as JSON, too")
    args = parser.parse_args(argv)
    var, vae = SUBJECT.load(args.device)
    plan = plan_for(var, "full", SUBJECT.calibration)
    result: dict[str, Any] = {
        "images": args.images, "sampling": SUBJECT.sampling, "device": str(args.device), "torch": torch.__version__,
        "attributes": list(ASKED), "real": json.loads((WEIGHTS / "judge.json").read_text(encoding="utf-8")),
    }  # fmt: skip
    for kind, held_out in KINDS.items():
        labels = some_classes(args.images, seed=1, held_out=held_out).to(args.device)
        result[kind] = seen_in(draw(SUBJECT, var, vae, plan, labels, BATCH)[0].images, labels)
        print(json.dumps({kind: result[kind]}, indent=1), flush=True)
    if args.out is not None:
        write_json(args.out, result)


if __name__ == "__main__":
    sys.exit(console.run(main))
