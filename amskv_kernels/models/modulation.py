"""How a class reaches VAR's layers: scales and shifts of their norms, and gates of what they add."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F


class Modulates(Protocol):
    """What a class does to the parts of a layer: 0 is attention, 1 the feed-forward. The head has one part."""

    def norm(self, x: Tensor, part: int) -> Tensor:
        """x (B, n, C) normalised, scaled and shifted."""
        ...

    def add(self, x: Tensor, y: Tensor, part: int) -> Tensor:
        """x with what a part made of it, y, through its gate; x may be changed."""
        ...


class Modulation(NamedTuple):
    """Of one class for each of the batch: (B, 1, C) for every part."""

    gates: tuple[Tensor, ...]
    scales: tuple[Tensor, ...]  # 1 is added already
    shifts: tuple[Tensor, ...]

    def norm(self, x: Tensor, part: int) -> Tensor:
        """See `Modulates`."""
        return torch.addcmul(self.shifts[part], normalised(x), self.scales[part])

    def add(self, x: Tensor, y: Tensor, part: int) -> Tensor:
        """See `Modulates`."""
        return torch.addcmul(x, y, self.gates[part])


def normalised(x: Tensor) -> Tensor:
    """Layer norm of the last dimension, without weights."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)


class Conditions(NamedTuple):
    """What depends on the class alone."""

    layers: Iterable[Modulates]
    head: Modulates  # the norm before the logits, in fp32
