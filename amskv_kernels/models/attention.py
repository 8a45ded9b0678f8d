"""What a model asks of whoever computes its attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

# Called with (layer, q, k, v, softmax_scale) of every call, as `Attention.attend` gets them; returns nothing.
Observer = Callable[[int, Tensor, Tensor, Tensor, float], None]


class Attention(Protocol):
    """Where a layer's q, k, v go: a cache in generation, a mask in training.

    An object may also have `keeps_fp32_keys = True`: then q and k of an L2-normalised model arrive in fp32, as stock
    code caches them. Without it (or False) they arrive in v's dtype. And it may have `prepare(layer, x, weight)`,
    called before each `attend` with the input (B, n, C) and the weight (H · D, C) of the layer's query projection.
    One that norms q and k itself has `attend_qkv(layer, qkv, q_scale, softmax_scale)`, which VAR then calls in place of
    both: qkv (B, n, 3 · H, D) as it was projected, q_scale (H,) fp32 the length of L2-normalised q, None where neither
    q nor k is normalised.
    """

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, softmax_scale: float) -> Tensor:
        """Attend from q over k, v and whatever else the object lets layer `layer` (0-based) see.

        Args:
            layer: layers come in order, once per step.
            q, k, v: (B, n, H, D), any strides whose last dimension is contiguous.
            softmax_scale: factor on q·k.

        Returns:
            (B, n, H, D) in v's dtype.
        """
        ...
