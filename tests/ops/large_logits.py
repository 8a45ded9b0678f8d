"""Calls of attn with logits of every size, made so that fp32 holds each score exactly."""

from __future__ import annotations

import torch
from torch import Tensor


def enlarge(q: Tensor, k: Tensor, pages: Tensor, seed: int) -> None:
    """Make queries and keys one-hot, in place: queries of 2⁰ … 2¹⁵ or more by rows, keys of 8 random bits.

    One product makes a score, so none is rounded; NaN stays where it was.
    """
    rng = torch.Generator().manual_seed(seed)
    top = 15 if q.dtype == torch.float16 else 26
    rows = 2.0 ** torch.randint(0, top + 1, q.shape[:3], generator=rng)
    rows *= torch.randint(0, 2, rows.shape, generator=rng) * 2 - 1
    q.zero_()[..., 0] = rows.to(q)
    for keys in (k, pages[:, 0]):
        there = ~keys[..., 0].isnan()
        drawn = torch.randint(-255, 256, keys.shape[:-1], generator=rng).float() * 2.0**7
        missing = ~there
        keys[there] = 0
        keys[..., 0] = torch.where(missing, torch.nan, drawn).to(keys)


def check(out: Tensor, lse: Tensor, truth: Tensor, truth_lse: Tensor, values: float) -> None:
    """Outputs within the rounding of 16-bit weights and results, lse within that of fp32."""
    assert out.isfinite().all(), "not finite"
    assert (out.double() - truth).abs().max() <= 2 * torch.finfo(out.dtype).eps * values
    assert ((lse.double() - truth_lse).abs() <= 2e-5 + 2.0**-22 * truth_lse.abs()).all()
