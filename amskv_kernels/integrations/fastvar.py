"""FastVAR on Infinity: later layers attend with the tokens of a map that change most, and the last maps are left out.

How many tokens a layer gets is known only as the model runs, and so is what it stores: see `UnplannedKVCache`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from amskv_kernels.cache import UnplannedKVCache
from amskv_kernels.integrations.caches import Cache
from amskv_kernels.integrations.common import PagedSelfAttention, Rotation, in_generation
from amskv_kernels.integrations.infinity import FAMILY as INFINITY
from amskv_kernels.integrations.infinity import InfinityAttention, PatchedInfinity, Told
from amskv_kernels.integrations.modules import stock
from amskv_kernels.models.infinity import Triples


class _SelfAttention(InfinityAttention):
    def forward(
        self, x: Tensor, attn_bias_or_two_vector: Any = None, attn_fn: Any = None,
        scale_schedule: Triples | None = None, rope2d_freqs_grid: dict[str, Tensor] | None = None, scale_ind: int = 0,
        rope_idx: Callable[..., Any] | None = None, ori_len: int = 0,
    ) -> Tensor:  # fmt: skip
        if not in_generation(self, attn_bias_or_two_vector):
            return stock(self).forward(
                self, x, attn_bias_or_two_vector, attn_fn, scale_schedule, rope2d_freqs_grid, scale_ind, rope_idx,
                ori_len,
            )  # fmt: skip
        told = Told(scale_schedule, rope2d_freqs_grid, scale_ind, (rope_idx, ori_len))
        return self.proj_drop(self.proj(self.attend(x, told)))


class PatchedFastVAR(PatchedInfinity):
    """A patched FastVAR: see `Patch`."""

    attention: ClassVar[type[PagedSelfAttention]] = _SelfAttention

    def read(self, model: Any, modules: list[Any]) -> None:
        if self._caches.online:
            raise ValueError("online is True; FastVAR's token counts are known only as it runs, and AMS-KV's are not")
        self._caches.counted = False
        super().read(model, modules)

    def ready(self, told: Told, k: Tensor) -> Cache:
        """The cache, at the scale that the model draws."""
        cache = super().ready(told, k)
        assert isinstance(cache, UnplannedKVCache)
        if cache.layer == 0:
            cache.go_to(told.scale)
        return cache

    def rotation(self, told: Told, x: Tensor) -> Rotation:
        """That of the tokens which the model picked, each sequence its own."""
        if told.grid is None or told.sizes is None:
            return None, None
        picked, tokens = told.more
        whole = (told.grid, told.scale, tokens, x.device)
        cos, sin = self._turns.of(whole, lambda: self.turns(told, tokens, x.device))
        if x.shape[1] == tokens:
            return cos, sin
        index: Tensor = picked().reshape(-1).to(torch.int64)
        return cos[index], sin[index]


FAMILY = INFINITY._replace(name="FastVAR", takes=(*INFINITY.takes, "rope_idx", "ori_len"), patch=PatchedFastVAR)
