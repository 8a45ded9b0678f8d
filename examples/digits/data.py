"""The digits: scikit-learn's 1,797 scans of 8x8, split once, and the independent judge of generated ones."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from sklearn.svm import SVC
from torch import Tensor
from torch.nn import functional as F

SEED = 0
SIDE = 32  # images are shown to the model at 4 times their scanned size
HELD_OUT = 0.3


@dataclass(frozen=True)
class Digits:
    """Images (N, 3, 32, 32) fp32 in [0, 1] and labels (N,) int64."""

    images: Tensor
    labels: Tensor


def enlarge(scans: Tensor) -> Tensor:
    """Scans (N, 8, 8) in [0, 1] -> images (N, 3, 32, 32), smooth and grey."""
    large = F.interpolate(scans[:, None], size=(SIDE, SIDE), mode="bicubic", align_corners=False)
    return large.clamp(0, 1).repeat(1, 3, 1, 1)


def shrink(images: Tensor) -> np.ndarray:
    """Images (N, 3, 32, 32) -> what the judge looks at: (N, 64), the 8x8 averages."""
    return F.adaptive_avg_pool2d(images.detach().float().mean(1, keepdim=True), 8).flatten(1).cpu().numpy()


@cache
def digits() -> tuple[Digits, Digits]:
    """(the generator's training images, the held-out images that only the judge learns from), stratified, fixed."""
    data = load_digits()
    scans = torch.from_numpy(data.images.astype(np.float32) / 16)
    labels = torch.from_numpy(data.target.astype(np.int64))
    ours, held = train_test_split(np.arange(len(labels)), test_size=HELD_OUT, stratify=data.target, random_state=SEED)
    images = enlarge(scans)
    return Digits(images[ours], labels[ours]), Digits(images[held], labels[held])


@cache
def classifier() -> SVC:
    """The judge: an RBF support vector machine that has seen the held-out images only. Feed it `shrink(images)`."""
    _, held = digits()
    return SVC(kernel="rbf", C=10.0, gamma="scale", random_state=SEED).fit(shrink(held.images), held.labels.numpy())


def accuracy(images: Tensor, labels: Tensor) -> float:
    """Share of images (N, 3, 32, 32) in which the judge sees the label (N,)."""
    return float((classifier().predict(shrink(images)) == labels.cpu().numpy()).mean())


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image moved by up to 1 pixel, turned by up to 6° and scaled by up to 5 %; generator on the CPU."""
    n = len(images)
    jitter = (torch.rand(n, 4, generator=generator) * 2 - 1).to(images.device)
    turn, size = jitter[:, 0] * math.radians(6), 1 + 0.05 * jitter[:, 1]
    move = jitter[:, 2:] * (2 / SIDE)
    cos, sin = turn.cos() * size, turn.sin() * size
    grid = torch.stack((torch.stack((cos, -sin, move[:, 0]), 1), torch.stack((sin, cos, move[:, 1]), 1)), 1)
    where = F.affine_grid(grid, list(images.shape), align_corners=False)
    return F.grid_sample(images, where, align_corners=False).clamp(0, 1)
