"""Rows of eight bits: what int8 pages hold, and what their bytes mean. Every backend rounds to these very bytes."""

from __future__ import annotations

import torch
from torch import Tensor

LEVELS = 127  # of either sign: −128 is never stored
# A scale below the least normal fp32 would not hold its bits, and a GPU may flush it: such rows count as zero.
LEAST_ROW = LEVELS * torch.finfo(torch.float32).tiny


def quantise(x: Tensor) -> tuple[Tensor, Tensor]:
    """Round rows to eight bits, half to even: x ≈ bytes · scale with scale = max |x| / 127, within scale / 2.

    A row whose largest magnitude is below 127 · 2⁻¹²⁶ is a row of zeros with scale 0. A row that holds NaN or an
    infinity has the scale NaN and bytes 0, so that it reads as NaN throughout, and no other row does.

    Args:
        x: (…, D) fp16, bf16 or fp32.

    Returns:
        (…, D) int8 and (…) fp32.
    """
    x = x.float()
    most = x.abs().amax(-1)
    scale = torch.where(most < LEAST_ROW, 0.0, most / LEVELS)
    holds = (scale > 0) & (most < torch.inf)
    steps = (x / torch.where(holds, scale, 1.0)[..., None]).round().clamp(-LEVELS, LEVELS)
    return torch.where(holds[..., None], steps, 0.0).to(torch.int8), scale.where(most < torch.inf, torch.nan)


def dequantise(rows: Tensor, scales: Tensor) -> Tensor:
    """The fp32 rows that eight-bit ones stand for: (…, D) int8 and (…) fp32."""
    return rows.float() * scales[..., None]
