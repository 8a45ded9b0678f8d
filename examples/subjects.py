"""What a model that ships is to the demo and the shoot-out: weights, classes, and how its pictures are judged."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from amskv_kernels import CachePlan, PagedKVCache, parse_policy
from amskv_kernels.models import VAR, VQVAE

NAMES = ("digits", "avatars")
POLICIES = ("full", "ams-kv:75", "ams-kv:84.83", "sink:2,1", "sliding:1")
FRECHET = "Fréchet distance"  # the one finding that is no share

# Images (N, 3, H, W), their classes (N,), and the full cache's images of the same seeds -> (share of images in which
# the judge sees what was asked for, its other findings by name: shares, and FRECHET).
Judge = Callable[[Tensor, Tensor, Tensor], tuple[float, dict[str, float]]]


@dataclass(frozen=True)
class Subject:
    """A model that ships."""

    name: str
    load: Callable[[str | torch.device], tuple[VAR, VQVAE]]
    sampling: dict[str, Any]  # arguments of VAR.generate that suit it
    labels: Callable[[int], Tensor]  # classes of so many images, on the CPU
    judge: Judge
    calibration: Path  # what AMS-KV ranks the layers by
    grey: bool = False

    @property
    def results(self) -> Path:
        """Where its committed results lie."""
        return Path(__file__).parent / self.name / "results"


def subject(name: str) -> Subject:
    """The model of a name in NAMES."""
    found: Subject = import_module(f"examples.{name}.subject").SUBJECT
    return found


def plan_for(var: VAR, policy: str, calibration: Path) -> CachePlan:
    """The plan of a policy for this model; AMS-KV ranks the layers by the calibration that ships."""
    config = var.config
    text = f"{policy}@{calibration}" if policy.startswith("ams-kv:") else policy
    return CachePlan.build(config.schedule, parse_policy(text, config.schedule, config.depth), config.depth)


def cache_for(var: VAR, plan: CachePlan, labels: Tensor, pages: torch.dtype = torch.float32) -> PagedKVCache:
    """A cache for images of these classes with guidance, its pages in fp32 or int8."""
    config = var.config
    return PagedKVCache(
        plan, batch=2 * len(labels), kv_heads=config.num_heads, head_dim=config.head_dim, dtype=pages,
        device=labels.device,
    )  # fmt: skip


def shown(name: str, value: float) -> str:
    """A judge's finding for people."""
    return f"{value:.2f}" if name == FRECHET else f"{value:.1%}"
