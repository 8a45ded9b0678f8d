"""The avatars, for the demo and the shoot-out."""

from __future__ import annotations

from torch import Tensor

from examples.avatars.attributes import some_classes
from examples.avatars.judge import verdict
from examples.avatars.model import CALIBRATION, SAMPLING, load
from examples.subjects import FRECHET, Subject


def _labels(count: int) -> Tensor:
    return some_classes(count, seed=0)


def _judge(images: Tensor, labels: Tensor, full: Tensor) -> tuple[float, dict[str, float]]:
    found = verdict(images, labels, full)
    alike = {f"{name} as full": share for name, share in found.like_full.items()}
    return found.all_asked, {**found.accuracy, **alike, FRECHET: found.frechet}


SUBJECT = Subject("avatars", load, SAMPLING, _labels, _judge, CALIBRATION)
