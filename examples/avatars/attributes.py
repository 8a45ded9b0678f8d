"""What an avatar is made of, and which of it makes its class."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

# The class of an avatar: one value of each of these. dicebear's own names and colours.
ASKED: dict[str, tuple[str, ...]] = {
    "body": ("dome", "block", "tower", "bell", "wedgeInv", "steps"),
    "colour": ("#7dd3fc", "#c4b5fd", "#fda4af", "#fcd34d", "#bef264", "#e2e8f0"),
    "eyes": ("round", "mono", "happy", "angry"),
    "mouth": ("smile", "laugh", "frown", "open"),
}
# What the model is free to choose.
FREE: dict[str, tuple[str, ...]] = {
    "background": ("#0369a1", "#6d28d9", "#c2410c", "#047857"),
    "top": ("none", "horns", "antennae", "earsRound"),
}
ATTRIBUTES = {**ASKED, **FREE}
NUM_CLASSES = len(list(itertools.product(*ASKED.values())))
# (body, colour) of which the generator sees no avatar: each body and each colour once: it knows both apart.
HELD_OUT = tuple((i, (i + 2) % len(ASKED["colour"])) for i in range(len(ASKED["body"])))


def class_of(asked: Tensor) -> Tensor:
    """Indices (N, 4) into the values of ASKED, in its order -> classes (N,) int64."""
    classes = torch.zeros(len(asked), dtype=torch.int64)
    for column, values in zip(asked.T, ASKED.values(), strict=True):
        classes = classes * len(values) + column
    return classes


def asked_of(classes: Tensor) -> Tensor:
    """The inverse of `class_of`: (N,) -> (N, 4) int64."""
    columns = []
    for values in reversed(ASKED.values()):
        columns.append(classes % len(values))
        classes = classes.div(len(values), rounding_mode="floor")
    return torch.stack(columns[::-1], dim=1)


def is_held_out(asked: Tensor) -> Tensor:
    """Which of (N, 4) have a body and a colour that the generator never saw together: (N,) bool."""
    return (asked[:, None, :2] == torch.tensor(HELD_OUT)).all(-1).any(-1)


def some_classes(count: int, seed: int, held_out: bool = False) -> Tensor:
    """Random classes (count,) int64, none twice before all came; of pairs that were held out, or of the others."""
    asked = asked_of(torch.arange(NUM_CLASSES))
    pool = (is_held_out(asked) == held_out).nonzero().flatten()
    order = torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed))
    return pool[order.repeat(-(-count // len(order)))[:count]]
