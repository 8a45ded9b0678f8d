"""Give the public FoundationVision `Infinity` class a planned, paged KV cache, in place.

    with amskv_kernels.patch(infinity, ScaleKV(0.10)) as patched:
        ...                                   # generate as before, any batch and aspect ratio
        print(patched.cache.nbytes)

Only the attention modules' `forward` and `kv_caching` are replaced. Attention to the prompt projects keys and values
once per prompt and layer, not once more at every scale.
"""

from __future__ import annotations

import sys
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from amskv_kernels.integrations.caches import Caches, PolicyLike, schedule_of
from amskv_kernels.integrations.common import Layer, PagedSelfAttention, Patch, Rotation, require_attention
from amskv_kernels.integrations.modules import (
    Binding,
    PatchedModule,
    eager,
    require,
    require_signature,
    stock,
    unwrapped,
)
from amskv_kernels.models.attention import Observer
from amskv_kernels.models.infinity import Text, Triples, text_attention
from amskv_kernels.schedule import ScaleSchedule

NEEDS = ("unregistered_blocks",)
_SELF_NEEDS = (
    "num_heads", "head_dim", "cos_attn", "scale", "mat_qkv", "q_bias", "zero_k_bias", "v_bias", "proj", "proj_drop",
    "kv_caching",
)  # fmt: skip
_SELF_TAKES = ("x", "attn_bias_or_two_vector", "attn_fn", "scale_schedule", "rope2d_freqs_grid", "scale_ind")
_CROSS_NEEDS = (
    "num_heads", "head_dim", "cos_attn", "scale", "mat_q", "mat_kv", "zero_k_bias", "v_bias", "proj", "proj_drop",
)  # fmt: skip


class _Told(NamedTuple):
    """What the model tells its self-attention beside x."""

    sizes: Triples | None
    grid: dict[str, Tensor] | None
    scale: int


class PatchedInfinity(Patch):
    """A patched Infinity: see `Patch`. The first call of a generation says which schedule it is of."""

    def __init__(self, caches: Caches, observe: Observer | None, blocks: list[tuple[Any, Any]]) -> None:
        super().__init__(caches, observe)
        self.prompts: dict[int, tuple[Tensor, int, Tensor]] = {}  # layer: text, its version, its keys and values
        self._rotation: tuple[Any, Rotation] = None, (None, None)
        self._bind(
            binding
            for number, (own, cross) in enumerate(blocks)
            for binding in (Layer(own, _SelfAttention, self, number, bool(own.cos_attn)), _Prompt(cross, self, number))
        )

    def begin(self, enable: bool) -> None:
        """The model says so for every layer before and after each generation."""
        super().begin(enable)
        self.prompts.clear()
        self._rotation = None, (None, None)

    def schedule_of(self, told: _Told) -> ScaleSchedule:
        """The (1, h, w) of every scale, as a schedule."""
        if told.sizes is None:
            raise ValueError("scale_schedule is None; the model must pass the (1, h, w) of every scale")
        if any(t != 1 for t, _, _ in told.sizes):
            raise ValueError(f"scale_schedule is {told.sizes!r}; only images are supported, one frame per scale")
        return schedule_of(tuple((int(h), int(w)) for _, h, w in told.sizes))

    def rotation(self, told: _Told, x: Tensor) -> Rotation:
        """The model's own, which all layers of a step share."""
        sizes, grid, scale = told
        if grid is None or sizes is None:
            return None, None
        asked = (id(grid), sizes, scale, x.shape[1], x.device)
        if self._rotation[0] != asked:
            start = sum(t * h * w for t, h, w in sizes[:scale])
            cos, sin = grid[str(tuple(sizes))][:, 0, 0, 0, start : start + x.shape[1]].to(x.device, torch.float32)
            self._rotation = asked, (cos.contiguous(), sin.contiguous())
        return self._rotation[1]


class _Prompt(Binding):
    """One layer's attention to the prompt, whose keys and values are projected when it is new."""

    def __init__(self, module: nn.Module, patch: PatchedInfinity, number: int) -> None:
        super().__init__(module, _CrossAttention, patch)
        self.number = number

    def keys_values(self, text: Tensor) -> Tensor:
        """(N, 2, H, D) of the text (N, C)."""
        own: Any = self.module
        # Tensors of inference mode count no versions; what they gave is forgotten when a generation begins.
        version = 0 if text.is_inference() else text._version
        known, known_version, kv = self.patch.prompts.get(self.number, (None, 0, None))
        if kv is None or known is not text or known_version != version:
            bias = torch.cat((own.zero_k_bias, own.v_bias))
            kv = F.linear(text, own.mat_kv.weight, bias).view(-1, 2, own.num_heads, own.head_dim).contiguous()
            self.patch.prompts[self.number] = text, version, kv
        return kv


class _SelfAttention(PagedSelfAttention):
    def forward(
        self,
        x: Tensor,
        attn_bias_or_two_vector: Any = None,
        attn_fn: Any = None,
        scale_schedule: Triples | None = None,
        rope2d_freqs_grid: dict[str, Tensor] | None = None,
        scale_ind: int = 0,
    ) -> Tensor:
        layer = getattr(self, "_amskv", None)
        if layer is None or attn_bias_or_two_vector is not None or not layer.patch.caching:
            return stock(self).forward(  # training, or teacher forcing
                self, x, attn_bias_or_two_vector, attn_fn, scale_schedule, rope2d_freqs_grid, scale_ind=scale_ind
            )
        return self.proj_drop(self.proj(self.attend(x, _Told(scale_schedule, rope2d_freqs_grid, scale_ind))))


class _CrossAttention(PatchedModule):
    def forward(self, q: Tensor, ca_kv: Text) -> Tensor:
        prompt: Any = getattr(self, "_amskv", None)
        own: Any = self
        if prompt is None or not prompt.patch.caching or own.cos_attn or getattr(own, "for_attn_pool", False):
            return stock(self).forward(self, q, ca_kv)
        queries = own.mat_q(q).view(*q.shape[:2], own.num_heads, own.head_dim)
        return own.proj_drop(own.proj(self.attend(queries, ca_kv).reshape(*q.shape[:2], -1)))

    @eager
    def attend(self, q: Tensor, ca_kv: Text) -> Tensor:
        """From queries (B, n, H, D) to the output of attention to the prompt, in q's dtype."""
        text, cu_seqlens, longest = ca_kv
        return _attend_text(self, q, self._amskv.of(self).keys_values(text), cu_seqlens, longest)


def patch(
    model: Any,
    policy: PolicyLike,
    *,
    page_size: int | None = None,
    observe: Observer | None = None,
    online: bool = False,
    theta: float | None = None,
) -> PatchedInfinity:
    """Patch a FoundationVision `Infinity` so that its generations keep only what `policy` keeps.

    Arguments, result and errors as for `amskv_kernels.patch`.
    """
    blocks = _blocks(unwrapped(model))
    return PatchedInfinity(Caches(policy, len(blocks), page_size, online, theta), observe, blocks)


def _attend_text(own: Any, q: Tensor, kv: Tensor, cu_seqlens: Tensor, longest: int) -> Tensor:
    """With the function that the model's own module uses, where it has one: the same arithmetic, 16 bit throughout."""
    batch, n, heads, head_dim = q.shape
    function = vars(sys.modules[stock(own).__module__]).get("flash_attn_varlen_kvpacked_func")
    if function is None:
        return text_attention(q, kv.to(q.dtype), cu_seqlens, longest, float(own.scale))
    half = torch.bfloat16 if q.dtype == torch.float32 else q.dtype
    cu_queries = torch.arange(0, n * (batch + 1), n, dtype=torch.int32, device=q.device)
    out: Tensor = function(
        q=q.reshape(-1, heads, head_dim).to(half), kv=kv.to(half), cu_seqlens_q=cu_queries, cu_seqlens_k=cu_seqlens,
        max_seqlen_q=n, max_seqlen_k=longest, dropout_p=0, softmax_scale=own.scale,
    )  # fmt: skip
    return out.to(q.dtype)


def _blocks(model: Any) -> list[tuple[Any, Any]]:
    """The self-attention and the attention to the prompt of every layer."""
    require(model, "model", NEEDS, "Infinity")
    found = []
    for number, wrapped in enumerate(model.unregistered_blocks):
        block, name = unwrapped(wrapped), f"model.unregistered_blocks[{number}]"
        require(block, name, ("sa", "ca"), "Infinity")
        own, cross = unwrapped(block.sa), unwrapped(block.ca)
        require_attention(own, f"{name}.sa", _SELF_NEEDS, _SELF_TAKES, "Infinity")
        require(cross, f"{name}.ca", _CROSS_NEEDS, "Infinity")
        require_signature(cross, f"{name}.ca", "forward", ("q", "ca_kv"), "Infinity")
        found.append((own, cross))
    if not found:
        raise TypeError("model.unregistered_blocks is empty; a model to patch has at least one layer")
    return found
