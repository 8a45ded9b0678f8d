"""Give the public FoundationVision `VAR` class a planned, paged KV cache, in place.

    from amskv_kernels.integrations.var import patch

    with patch(var, AMSKV(demanding_layers=(0, 1, 2))) as patched:
        images = var.autoregressive_infer_cfg(B=8, label_B=labels, cfg=1.5, top_k=900, top_p=0.96)
        print(patched.cache.nbytes)

Only the attention modules' `forward` and `kv_caching` are replaced; weights, sampling and training stay theirs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from amskv_kernels.cache.paged import PagedKVCache
from amskv_kernels.integrations.common import Patch, fits, require
from amskv_kernels.models.attention import Observer
from amskv_kernels.planning.plan import CachePlan
from amskv_kernels.policies import Policy
from amskv_kernels.schedule import ScaleSchedule

_MODEL_NEEDS = ("patch_nums", "blocks")
_ATTENTION_NEEDS = (
    "num_heads", "head_dim", "attn_l2_norm", "scale", "mat_qkv", "q_bias", "zero_k_bias", "v_bias",
    "proj", "proj_drop", "kv_caching",
)  # fmt: skip
_REPLACED = ("forward", "kv_caching")


class PatchedVAR(Patch):
    """A patched model: its plan and cache, and the way back. Also a context manager that undoes on leaving.

    Attributes:
        plan: what every layer keeps, when and where.
        cache: the pool, made by the first generation (None before) and kept for later ones of the same batch.
    """

    def __init__(self, model: Any, policy: Policy, page_size: int | None, observe: Observer | None) -> None:
        self._attentions = _attention_modules(model)
        schedule = ScaleSchedule([(size, size) for size in model.patch_nums])
        heads = self._attentions[0].num_heads if self._attentions else None
        self.plan = CachePlan.build(schedule, policy, len(self._attentions), page_size, heads)
        self.cache: PagedKVCache | None = None
        self._observe = observe
        self._caching = False
        for layer, attention in enumerate(self._attentions):
            for name, replacement in zip(_REPLACED, (_Forward(self, layer, attention), self._kv_caching), strict=True):
                object.__setattr__(attention, name, replacement)

    def undo(self) -> None:
        """Put the model's own attention back and free the cache; doing it twice does no harm."""
        for attention in self._attentions:
            for name in _REPLACED:
                attention.__dict__.pop(name, None)
        self._attentions = []
        self.cache = None

    def _kv_caching(self, enable: bool) -> None:
        """The model says so for every layer before and after each generation."""
        self._caching = enable
        if enable and self.cache is not None:
            self.cache.reset()

    def _ready(self, k: Tensor) -> PagedKVCache:
        """The cache, which the first call of a generation makes to measure."""
        batch, _, heads, head_dim = k.shape
        cache = self.cache
        if cache is None or (cache.step == 0 and cache.layer == 0 and not fits(cache, k)):
            cache = self.cache = None  # its pool is free before the new one is made
            cache = self.cache = PagedKVCache(
                self.plan, batch=batch, kv_heads=heads, head_dim=head_dim, dtype=k.dtype, device=k.device
            )
        return cache


class _Forward:
    """Replaces one attention module's `forward`: the module's own projections and norms around the cache."""

    def __init__(self, patched: PatchedVAR, layer: int, attention: Any) -> None:
        self._patched, self._layer, self._attention = patched, layer, attention
        self._original = attention.forward

    def __call__(self, x: Tensor, attn_bias: Tensor | None) -> Tensor:
        if not self._patched._caching:  # training, or teacher forcing
            return self._original(x, attn_bias)
        own = self._attention
        batch, n, _ = x.shape
        bias = torch.cat((own.q_bias, own.zero_k_bias, own.v_bias))
        qkv = F.linear(x, own.mat_qkv.weight, bias).view(batch, n, 3, own.num_heads, own.head_dim)
        q, k, v = qkv.unbind(2)
        if own.attn_l2_norm:
            length = own.scale_mul_1H11.clamp_max(own.max_scale_mul).exp().transpose(1, 2)
            q, k = F.normalize(q, dim=-1) * length, F.normalize(k, dim=-1)
        # Under autocast the norm gives fp32; attention takes 16 bit there anyway.
        q, k = q.to(v.dtype), k.to(v.dtype)
        if self._patched._observe is not None:
            self._patched._observe(self._layer, q, k, v, float(own.scale))
        cache = self._patched._ready(k)
        cache.prepare(self._layer, x, own.mat_qkv.weight[: len(own.q_bias)])
        out = cache.attend(self._layer, q, k, v, float(own.scale))
        return own.proj_drop(own.proj(out.view(batch, n, -1)))


def patch(
    model: Any, policy: Policy, *, page_size: int | None = None, observe: Observer | None = None
) -> PatchedVAR:  # fmt: skip
    """Patch a FoundationVision `VAR` so that its generations keep only what `policy` keeps.

    Args:
        model: an instance of the public class, any depth, on any device.
        policy: `Full()` for the same images from less memory, AMSKV(…) for much less.
        page_size: see `CachePlan.build`.
        observe: called with (layer, q, k, v, softmax_scale) at every call, for example `SimilarityRecorder.observe` to
            calibrate.

    Returns:
        A handle with `.undo()`, `.plan` and `.cache`, usable in a `with` statement.

    Raises:
        TypeError: the model is not laid out like the public class; names what is missing.
        ValueError: already patched, or a policy that does not fit the model.
    """
    return PatchedVAR(model, policy, page_size, observe)


def _attention_modules(model: Any) -> list[Any]:
    require(model, "model", _MODEL_NEEDS, "VAR")
    found = []
    for layer, block in enumerate(model.blocks):
        attention: Any = getattr(block, "attn", None)
        require(attention, f"model.blocks[{layer}].attn", _ATTENTION_NEEDS, "VAR")
        if isinstance(attention.forward, _Forward):
            raise ValueError("model is patched already; undo() that patch first")
        found.append(attention)
    return found
