"""The attention of one tick: every sequence over its own pages, at its own step, in one call."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from amskv_kernels.ops.prepared import prepare_attn_ragged
from amskv_kernels.serving.batch import Mixture
from amskv_kernels.serving.pool import UnitPool


class PoolAttention:
    """Runs `attn_ragged` over the pool, for all sequences of a tick.

    Args:
        pool: whose pages hold the history.
        dtype: of q, k and v.
    """

    def __init__(self, pool: UnitPool, dtype: torch.dtype) -> None:
        self.pool = pool
        self._attn = prepare_attn_ragged(pool.pages.device, dtype, pool.pages.dtype)
        self._mixture: Mixture

    def begin(self, mixture: Mixture) -> None:
        """A tick of a mixture, whose tables name units that have been taken."""
        self._mixture = mixture

    def attend_qkv(self, layer: int, qkv: Tensor, q_scale: Tensor | None, softmax_scale: float) -> Tensor:
        """qkv (1, T, 3 · H, D) of packed rows -> (1, T, H, D), zeros in rows past the last sequence's."""
        heads = qkv.shape[2] // 3
        if q_scale is None:
            q, k = qkv[:, :, :heads], qkv[:, :, heads : 2 * heads]
        else:
            q, k = torch.ops.amskv.prepare_qk.default(qkv, heads, q_scale, None, None, True)
        return self.attend(layer, q, k, qkv[:, :, 2 * heads :], softmax_scale)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, softmax_scale: float) -> Tensor:
        """q, k, v (1, T, H, D) of packed rows -> as q, zeros in rows past the last sequence's."""
        mixture, pool, given = self._mixture, self.pool, q.shape[1]
        rows, sequences = mixture.rows, len(mixture.starts) - 1
        out, _ = self._attn(
            q[0, :rows], k[0, :rows], v[0, :rows], pool.pages, pool.arena[:sequences], mixture.read.device[layer],
            mixture.write.device[layer], mixture.starts, softmax_scale, pool.page_scales,
        )  # fmt: skip
        return F.pad(out, (0, 0, 0, 0, 0, given - rows))[None] if rows < given else out[None]
