"""The digits, for the demo and the shoot-out."""

from __future__ import annotations

import torch
from torch import Tensor

from examples.digits.data import accuracy
from examples.digits.model import CALIBRATION, SAMPLING, load
from examples.subjects import Subject


def _labels(count: int) -> Tensor:
    return torch.arange(count) % 10


def _judge(images: Tensor, labels: Tensor, full: Tensor) -> tuple[float, dict[str, float]]:
    return accuracy(images, labels), {}


SUBJECT = Subject("digits", load, SAMPLING, _labels, _judge, CALIBRATION, grey=True)
