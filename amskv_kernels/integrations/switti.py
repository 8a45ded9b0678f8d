"""Switti in its autoregressive form: q and k normalised over the whole width, turned by `freqs_cis`.

Guidance ends before the last scales there: the sequences without a prompt leave, and the cache goes on without them.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from amskv_kernels.cache import UnplannedKVCache
from amskv_kernels.integrations.caches import Cache
from amskv_kernels.integrations.common import QKV, Constants, PagedSelfAttention, in_generation, prepared
from amskv_kernels.integrations.family import Family
from amskv_kernels.integrations.modules import stock
from amskv_kernels.integrations.star import PatchedSTAR


class _SelfAttention(PagedSelfAttention):
    projection = "to_qkv"

    to_qkv: nn.Linear
    q_norm: nn.Module
    k_norm: nn.Module
    qk_norm: bool
    scale: float

    def constants(self) -> Constants:
        """What is worked out once a generation."""
        return Constants(float(self.scale))

    def project(self, x: Tensor, layer: Any, told: Any) -> QKV:
        """As the public class projects, norms and rotates."""
        q, k, v = self.to_qkv(x).chunk(3, dim=-1)
        if self.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        heads = self.num_heads
        qkv = torch.cat((q.to(v.dtype), k.to(v.dtype), v), dim=-1).unflatten(-1, (3 * heads, self.head_dim))
        cos, sin = layer.patch.rotation(told, x)
        if cos is None:
            q, k, v = qkv.split(heads, dim=2)
            return q, k, v
        return *prepared(qkv, heads, None, cos, sin, False), qkv[:, :, 2 * heads :]

    def forward(self, x: Tensor, attn_bias: Any, freqs_cis: Tensor | None = None) -> Tensor:
        if not in_generation(self, attn_bias):
            return stock(self).forward(self, x, attn_bias, freqs_cis)
        return self.proj_drop(self.proj(self.attend(x, freqs_cis)))


class PatchedSwitti(PatchedSTAR):
    """A patched Switti: see `Patch`."""

    attention: ClassVar[type[PagedSelfAttention]] = _SelfAttention

    def read(self, model: Any, modules: list[Any]) -> None:
        if not model.use_ar:
            raise ValueError("model.use_ar is False; a Switti that does not look back at earlier scales has no cache")
        super().read(model, modules)

    def ready(self, told: Any, k: Tensor) -> Cache:
        """The cache, of the sequences that there still are."""
        cache = super().ready(told, k)
        if len(k) < cache.batch and not isinstance(cache, UnplannedKVCache):
            cache.keep_first(len(k))
        return cache


FAMILY = Family(
    name="Switti",
    needs=("patch_nums", "blocks", "use_ar"),
    layers="blocks",
    attention="attn",
    attributes=("num_heads", "head_dim", "qk_norm", "q_norm", "k_norm", "scale", "to_qkv", "proj", "proj_drop"),
    takes=("x", "attn_bias", "freqs_cis"),
    patch=PatchedSwitti,
)
