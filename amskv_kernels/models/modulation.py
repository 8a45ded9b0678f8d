"""How a class reaches VAR's layers: scales and shifts of their norms, and gates of what they add."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class Modulation(NamedTuple):
    """What classes do to the parts of a layer: 0 is attention, 1 the feed-forward; the head has one part.

    Each is (B, 1, C), of sequences, or (B, n, C), of their rows.
    """

    gates: tuple[Tensor, ...]
    scales: tuple[Tensor, ...]  # 1 is added already
    shifts: tuple[Tensor, ...]

    def norm(self, x: Tensor, part: int) -> Tensor:
        """x (B, n, C) normalised, scaled and shifted."""
        return torch.addcmul(self.shifts[part], F.layer_norm(x, x.shape[-1:], eps=1e-6), self.scales[part])

    def add(self, x: Tensor, y: Tensor, part: int) -> Tensor:
        """x with what a part made of it, y, through its gate."""
        return torch.addcmul(x, y, self.gates[part])


class Conditions(NamedTuple):
    """What depends on the class alone."""

    layers: Iterable[Modulation]
    head: Modulation  # the norm before the logits, in fp32
