"""How many generated digits an independent classifier recognises, under each cache policy.

python -m examples.digits.evaluate --images 500
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from amskv_kernels.cli import arguments, console
from amskv_kernels.files import write_json
from amskv_kernels.models import VAR, VQVAE
from examples.digits.data import SEED, accuracy, digits
from examples.digits.model import CALIBRATION, SAMPLING, WEIGHTS, load
from examples.subjects import POLICIES, cache_for, plan_for

PARTS = ("of the generator's training images", "of the held-out images it learned from")
BATCH = 100


def draw(var: VAR, vae: VQVAE, policy: str, labels: Tensor, seed: int) -> Tensor:
    """Images (B, 3, 32, 32) of the labels (B,), on the CPU."""
    generator = torch.Generator(labels.device).manual_seed(seed)
    cache = cache_for(var, plan_for(var, policy, CALIBRATION), labels)
    return var.generate(vae, labels, cache, generator=generator, **SAMPLING).images.cpu()


def evaluate(var: VAR, vae: VQVAE, images: int, device: str = "cpu") -> dict[str, Any]:
    """Recognised share per policy, of `images` digits with the classes in turn, the same random numbers for each."""
    labels = (torch.arange(images) % 10).to(device)
    right = dict.fromkeys(POLICIES, 0.0)
    batches = labels.split(BATCH)
    with tqdm(total=len(POLICIES) * len(batches), unit="batch", desc="drawing", disable=None) as bar:
        for policy in POLICIES:
            for i, part in enumerate(batches):
                right[policy] += accuracy(draw(var, vae, policy, part, SEED + i), part) * len(part)
                bar.update()
    return {
        "images": images,
        "sampling": SAMPLING,
        "recognised": {policy: round(count / images, 4) for policy, count in right.items()},
    }


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=arguments.whole(1), default=500)
    parser.add_argument("--device", type=arguments.device, default="cpu")
    parser.add_argument("--weights", type=Path, default=WEIGHTS)
    parser.add_argument("--out", type=arguments.output_file, help="write the result there as JSON, too")
    args = parser.parse_args(argv)
    try:
        var, vae = load(args.device, args.weights)
    except ValueError as error:
        parser.error(str(error))
    judge = {name: round(accuracy(part.images, part.labels), 4) for name, part in zip(PARTS, digits(), strict=True)}
    result = {"judge": judge, **evaluate(var, vae, args.images, args.device)}
    result |= {"device": args.device, "torch": torch.__version__}
    print(json.dumps(result, indent=1))
    if args.out is not None:
        write_json(args.out, result)


if __name__ == "__main__":
    sys.exit(console.run(main))
