"""Heads of sizes without kernels, 104 say: their rows are padded with zeros to the next size that has them.

Zeros add nothing to q · k, and what comes of v's is cut off: attention is that of the true size, to rounding. The ops
take the sizes they have kernels for and no others; whoever keeps pages pads.
"""

from __future__ import annotations

import math

from torch import Tensor
from torch.nn import functional as F

from amskv_kernels.planning.layout import row_size


class HeadRows:
    """Heads of `head_dim` elements in rows of `size`.

    Args:
        head_dim: D, a multiple of 8, at most 128.

    Raises:
        ValueError: any other D.
    """

    def __init__(self, head_dim: int) -> None:
        self.size = row_size("head_dim", head_dim)
        self.head_dim = int(head_dim)
        self.softmax_scale = 1 / math.sqrt(head_dim)
        self._padding = self.size - self.head_dim

    def pad(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v (…, D) in rows: themselves where these are no longer.

        Raises:
            ValueError: they are padded, and of another D.
        """
        if not self._padding:  # the op checks them
            return q, k, v
        for name, x in (("q", q), ("k", k), ("v", v)):
            if x.dim() != 4 or x.shape[3] != self.head_dim:
                raise ValueError(f"{name} has shape {tuple(x.shape)}; it must be (B, n, heads, D = {self.head_dim})")
        return self.row_of(q), self.row_of(k), self.row_of(v)

    def row_of(self, x: Tensor) -> Tensor:
        """(…, D) in rows."""
        return F.pad(x, (0, self._padding)) if self._padding else x

    def cut(self, out: Tensor) -> Tensor:
        """(…, D) of (…, size), contiguous."""
        return out[..., : self.head_dim].contiguous() if self._padding else out

    def __str__(self) -> str:
        if not self._padding:
            return f"head_dim={self.head_dim}"
        return f"head_dim={self.head_dim} in rows of {self.size}, {self._padding / self.head_dim:.0%} more bytes"
