"""The baseline: the cache that public VAR code keeps."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


class ConcatKVCache:
    """A cache of every token of every scale, as stock code keeps it; the baseline that others are compared with.

    Per layer, K stays in the dtype it comes in, which is fp32 in a model with L2-normalised attention whatever the
    model's own dtype, and V as it comes. Each step concatenates the whole cache anew and casts all of K to V's dtype
    before attention. The last scale is stored although nothing reads it.
    """

    keeps_fp32_keys = True

    def __init__(self) -> None:
        self._kv: dict[int, tuple[Tensor, Tensor]] = {}

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, softmax_scale: float) -> Tensor:
        """Append k, v to layer `layer` and attend from q over everything it holds.

        Args:
            layer: any integer.
            q, k: (B, n, H, D), fp32 or v's dtype.
            v: (B, n, H, D).
            softmax_scale: factor on q·k.

        Returns:
            (B, n, H, D) in v's dtype.

        Raises:
            ValueError: k or v does not continue the shape that the layer holds.
        """
        k, v = k.transpose(1, 2), v.transpose(1, 2)
        if layer in self._kv:
            held_k, held_v = self._kv[layer]
            for name, held, new in (("k", held_k, k), ("v", held_v, v)):
                if held.shape[:2] + held.shape[3:] != new.shape[:2] + new.shape[3:]:
                    b, h, _, d = held.shape
                    raise ValueError(
                        f"{name} has shape {tuple(new.transpose(1, 2).shape)}; it must be ({b}, n, {h}, {d})"
                    )
            k, v = torch.cat((held_k, k), dim=2), torch.cat((held_v, v), dim=2)
        self._kv[layer] = (k, v)
        out = F.scaled_dot_product_attention(q.transpose(1, 2).to(v.dtype), k.to(v.dtype), v, scale=softmax_scale)
        return out.transpose(1, 2)

    def reset(self) -> None:
        """Forget everything; the next step is a first step."""
        self._kv.clear()

    @property
    def bytes(self) -> int:
        """Bytes of K and V held now."""
        return sum(k.nbytes + v.nbytes for k, v in self._kv.values())
