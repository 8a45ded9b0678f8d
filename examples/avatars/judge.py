"""The judge of avatars: one small classifier an attribute, and the Fréchet distance on what they see.

    python -m examples.avatars.judge    # train it again; needs dicebear, a few minutes

It learns from avatars of seeds that the generator never drew, and from nothing that the generator made.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from amskv_kernels.cli import arguments, console
from amskv_kernels.files import replacing, write_json
from examples.avatars.attributes import ASKED, ATTRIBUTES, asked_of
from examples.avatars.data import Avatars, avatars
from examples.avatars.model import WEIGHTS
from examples.training import SEED

LEARNT, TESTED = 3000, 2000  # avatars
REFERENCE = 1500  # of the tested ones: what the Fréchet distance is from; the others tell its bias
BIAS_OF = (100, 200, 500)  # images
EPOCHS, BATCH, PEAK = 10, 64, 4e-3
SEEN = 12  # features of each classifier that the Fréchet distance is taken on


class Reader(nn.Module):
    """Reads one attribute: images (B, 3, 64, 64) in [0, 1] -> features (B, SEEN), values' logits (B, values)."""

    def __init__(self, values: int) -> None:
        super().__init__()
        widths = (3, 16, 16, 32, 32)
        self.maps = nn.Sequential()
        for inner, outer in pairwise(widths):
            self.maps += nn.Sequential(
                nn.Conv2d(inner, outer, 3, stride=2, padding=1), nn.GroupNorm(4, outer), nn.ReLU()
            )
        self.seen, self.told = nn.Linear(widths[-1] * 16, SEEN), nn.Linear(SEEN, values)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = self.seen(self.maps(images * 2 - 1).flatten(1)).relu()
        return features, self.told(features)


class Judge(nn.Module):
    """A reader for each attribute, and where real avatars lie among their features (fp64)."""

    mean: Tensor
    covariance: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.readers = nn.ModuleDict({name: Reader(len(values)) for name, values in ATTRIBUTES.items()})
        width = SEEN * len(ATTRIBUTES)
        self.register_buffer("mean", torch.zeros(width, dtype=torch.float64))
        self.register_buffer("covariance", torch.eye(width, dtype=torch.float64))

    @torch.no_grad()
    def look(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images (N, 3, 64, 64) -> features (N, SEEN · attributes) fp64, values read (N, attributes) int64."""
        features, values = [], []
        for part in images.split(256):
            found = [reader(part) for reader in self.readers.values()]
            features.append(torch.cat([seen for seen, _ in found], dim=1).double())
            values.append(torch.stack([told.argmax(1) for _, told in found], dim=1))
        return torch.cat(features), torch.cat(values)

    def distance(self, features: Tensor) -> float:
        """Fréchet distance of features (N, width) fp64 from real avatars'."""
        return frechet(*moments(features), self.mean, self.covariance)


def moments(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (width,) and covariance (width, width) of features (N, width)."""
    return features.mean(0), features.T.cov()


def _root(matrix: Tensor) -> Tensor:
    """The square root of a symmetric matrix without negative eigenvalues, but for rounding."""
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp_min(0).sqrt()) @ vectors.T


def frechet(mean: Tensor, covariance: Tensor, other_mean: Tensor, other_covariance: Tensor) -> float:
    """Squared Fréchet distance of two Gaussians, fp64."""
    root = _root(covariance)
    both = _root(root @ other_covariance @ root)
    spread = covariance.trace() + other_covariance.trace() - 2 * both.trace()
    return float((mean - other_mean).square().sum() + spread)


@cache
def judge(weights: Path = WEIGHTS) -> Judge:
    """The judge that ships."""
    found = Judge()
    found.load_state_dict(load_file(weights / "judge.safetensors"))
    return found.eval().requires_grad_(False)


@dataclass(frozen=True)
class Verdict:
    """What the judge says of images."""

    accuracy: dict[str, float]  # of each attribute that was asked for
    like_full: dict[str, float]  # of each that was not: share read as in the images they are compared with
    all_asked: float  # share of images with every attribute that was asked for
    frechet: float


def verdict(images: Tensor, labels: Tensor, full: Tensor) -> Verdict:
    """Of images (N, 3, 64, 64) of classes (N,), beside those of the same seeds with the full cache."""
    features, values = judge().look(images)
    asked = values[:, : len(ASKED)] == asked_of(labels.cpu())
    same = (values == judge().look(full)[1]).float().mean(0).tolist()
    names = list(ATTRIBUTES)
    return Verdict(
        accuracy=dict(zip(ASKED, asked.float().mean(0).tolist(), strict=True)),
        like_full=dict(zip(names[len(ASKED) :], same[len(ASKED) :], strict=True)),
        all_asked=float(asked.all(1).float().mean()),
        frechet=judge().distance(features),
    )


def _blurred(images: Tensor, generator: torch.Generator) -> Tensor:
    """Moved by a pixel at most, some softer, all a little noisy: what a drawn avatar may be and still be one."""
    dx, dy = (torch.randint(-1, 2, (2,), generator=generator)).tolist()
    images = images.roll((dx, dy), (2, 3))
    soft = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    share = torch.rand(len(images), 1, 1, 1, generator=generator) * 0.8
    noise = torch.randn(images.shape, generator=generator) * 0.03
    return (images.lerp(soft, share) + noise).clamp(0, 1)


def train(data: Avatars, epochs: int = EPOCHS) -> Judge:
    """A judge that has learnt from `data`; what is real is not known to it yet."""
    found, generator = Judge(), torch.Generator().manual_seed(SEED)
    optimizer = torch.optim.AdamW(found.parameters(), lr=PEAK, weight_decay=0.01)
    total = epochs * (len(data.images) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK, total_steps=max(total, 2), pct_start=0.2)
    with tqdm(total=total, unit="step", desc="judge", file=sys.stdout, mininterval=5) as bar:
        for _ in range(epochs):
            order = torch.randperm(len(data.images), generator=generator)
            for chosen in order[: len(order) // BATCH * BATCH].split(BATCH):
                images = _blurred(data.pixels(chosen), generator)
                told = [reader(images)[1] for reader in found.readers.values()]
                loss = sum(F.cross_entropy(t, v) for t, v in zip(told, data.values[chosen].T, strict=True))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                bar.update()
    return found.eval().requires_grad_(False)


def worth(found: Judge, data: Avatars) -> dict[str, Any]:
    """Give the judge its reference, and say what it is worth: accuracy on real avatars, and the distance's bias."""
    features, values = found.look(data.pixels())
    found.mean, found.covariance = moments(features[:REFERENCE])
    right = (values == data.values).double().mean(0).tolist()
    rest = features[REFERENCE:]
    return {
        "avatars": {"learnt": LEARNT, "tested": len(data.images), "reference": min(REFERENCE, len(data.images))},
        "accuracy": {name: round(share, 4) for name, share in zip(ATTRIBUTES, right, strict=True)},
        # What as many real avatars are away: a distance of generated ones means something above that only.
        "frechet_of_real": {str(n): round(found.distance(rest[:n]), 4) for n in BIAS_OF if n <= len(rest)},
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=arguments.output_folder, default=WEIGHTS, help="default: beside this file")
    parser.add_argument("--threads", type=arguments.whole(1), default=torch.get_num_threads(), help="CPU threads")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    torch.manual_seed(SEED)
    kept = args.out / "checkpoints"
    found = train(avatars("judge", LEARNT, kept, args.threads))
    told = worth(found, avatars("test", TESTED, kept, args.threads))
    with replacing(args.out / "judge.safetensors") as beside:
        save_file({name: value.contiguous() for name, value in found.state_dict().items()}, beside)
    write_json(args.out / "judge.json", told)
    print(told)


if __name__ == "__main__":
    sys.exit(console.run(main))
