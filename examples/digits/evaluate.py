"""How many generated digits an independent classifier recognises, with all attention history and with less.

python -m examples.digits.evaluate --images 500
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from amskv_kernels.models import VAR, VQVAE, ConcatKVCache
from amskv_kernels.models.var import Attention
from examples.digits.data import SEED, accuracy, digits
from examples.digits.model import SAMPLING, WEIGHTS, load


class WindowCache:
    """A cache of the first `first` and the last `last` scales in every layer but `full_layers`, which keep all.

    Plain concatenation; it shows what a policy costs in quality, not in time.
    """

    def __init__(self, first: int, last: int, full_layers: frozenset[int] = frozenset()) -> None:
        self.first, self.last, self.full_layers = first, last, full_layers
        self._kv: dict[int, list[tuple[Tensor, Tensor]]] = {}

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, softmax_scale: float) -> Tensor:
        """Attend from q over the scales still held and k, v: (B, n, H, D) -> (B, n, H, D)."""
        held = self._kv.setdefault(layer, [])
        held.append((k.transpose(1, 2), v.transpose(1, 2)))
        if layer not in self.full_layers and len(held) > self.first + self.last + 1:
            del held[self.first]
        keys, values = (torch.cat(parts, dim=2) for parts in zip(*held, strict=True))
        out: Tensor = F.scaled_dot_product_attention(q.transpose(1, 2), keys, values, scale=softmax_scale)
        return out.transpose(1, 2)


PARTS = ("on the generator's training images", "on the held-out images it learned from")
CACHES: dict[str, Any] = {
    "full": ConcatKVCache,
    "first 2 + last 1": lambda: WindowCache(2, 1),
    "first 2 + last 1, layer 0 full": lambda: WindowCache(2, 1, frozenset({0})),
    "last 1": lambda: WindowCache(0, 1),
}


def draw(var: VAR, vae: VQVAE, attention: Attention, labels: Tensor, seed: int, **sampling: Any) -> Tensor:
    """Images (B, 3, 32, 32) of the labels (B,), on the CPU."""
    generator = torch.Generator(labels.device).manual_seed(seed)
    return var.generate(vae, labels, attention, generator=generator, **{**SAMPLING, **sampling}).images.cpu()


def evaluate(
    var: VAR, vae: VQVAE, images: int, device: str = "cpu", names: tuple[str, ...] = tuple(CACHES), **sampling: Any
) -> dict[str, Any]:
    """Recognised share per cache, of `images` digits with the classes in turn, the same random numbers for each."""
    labels = (torch.arange(images) % 10).to(device)
    recognised = {}
    for name in names:
        parts = [
            accuracy(draw(var, vae, CACHES[name](), part, SEED + i, **sampling), part) * len(part)
            for i, part in enumerate(labels.split(100))
        ]
        recognised[name] = round(sum(parts) / images, 4)
    return {"images": images, "sampling": {**SAMPLING, **sampling}, "recognised": recognised}


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--weights", type=Path, default=WEIGHTS)
    parser.add_argument("--out", type=Path, help="write the result there as JSON, too")
    args = parser.parse_args(argv)
    var, vae = load(args.device, args.weights)
    result = {
        "judge": {
            name: round(accuracy(part.images, part.labels), 4) for name, part in zip(PARTS, digits(), strict=True)
        },
        **evaluate(var, vae, args.images, args.device),
        "device": args.device,
        "torch": torch.__version__,
    }
    print(json.dumps(result, indent=1))
    if args.out is not None:
        args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
