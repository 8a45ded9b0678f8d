"""Rotary position tables of next-scale models, for `torch.ops.amskv.prepare_qk`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from amskv_kernels.schedule import ScaleSchedule


def rope2d_tables(
    schedule: ScaleSchedule, scale: int, head_dim: int, base: float = 10000.0, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Cosines and sines of Infinity's RoPE2D for the tokens of one scale.

    The first half of a head turns by the row, the second by the column; every scale's positions are those of the
    last scale's grid that it covers, round(i · H_last / h).

    Args:
        schedule: the model's schedule.
        scale: 0-based; the current step.
        head_dim: D, a multiple of 4.
        base: of the geometric series of frequencies.
        device: where the tables lie.

    Returns:
        cos and sin, (n, D / 2) fp32; entry i belongs to the elements 2i, 2i + 1 of a head.

    Raises:
        ValueError: a scale that the schedule does not have, or a head_dim that is not a multiple of 4.
    """
    if not 0 <= scale < len(schedule):
        raise ValueError(f"scale is {scale}; schedule {schedule.name} has scales 0 … {len(schedule) - 1}")
    if head_dim < 4 or head_dim % 4:
        raise ValueError(f"head_dim is {head_dim}; it must be a multiple of 4")
    (h, w), (last_h, last_w) = schedule.sizes[scale], schedule.sizes[-1]
    half = head_dim // 2
    exact: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}  # whatever the user's defaults are
    frequency = 1.0 / (base ** (torch.arange(0, half, 2, **exact) / half))  # [D/4]
    by_row, by_column = (
        torch.outer((torch.arange(size, **exact) * (last / size)).round(), frequency)
        for size, last in ((h, last_h), (w, last_w))
    )
    angle = torch.cat([by_row[:, None].expand(h, w, -1), by_column[None].expand(h, w, -1)], dim=-1)
    angle = angle.reshape(h * w, half).to(device)
    return angle.cos(), angle.sin()
