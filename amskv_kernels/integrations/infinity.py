"""Give the public FoundationVision `Infinity` class a planned, paged KV cache, in place.

    with amskv_kernels.patch(infinity, ScaleKV(0.10)) as patched:
        ...                                   # generate as before, any batch and aspect ratio
        print(patched.cache.nbytes)

Only the attention modules' `forward` and `kv_caching` are replaced. Attention to the prompt projects keys and values
once per prompt and layer, not once more at every scale.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from amskv_kernels.integrations.caches import schedule_of
from amskv_kernels.integrations.common import Layer, PagedSelfAttention, Patch, PerStep, Rotation, in_generation
from amskv_kernels.integrations.family import Family
from amskv_kernels.integrations.modules import (
    Binding,
    PatchedModule,
    eager,
    require,
    require_signature,
    stock,
    unwrapped,
)
from amskv_kernels.models.infinity import Text, Triples, text_attention
from amskv_kernels.schedule import ScaleSchedule

_CROSS_NEEDS = (
    "num_heads", "head_dim", "cos_attn", "scale", "mat_q", "mat_kv", "zero_k_bias", "v_bias", "proj", "proj_drop",
)  # fmt: skip


class Told(NamedTuple):
    """What the model tells its self-attention beside x; relatives of Infinity tell `more`."""

    sizes: Triples | None
    grid: dict[str, Tensor] | None
    scale: int
    more: Any = None


class InfinityAttention(PagedSelfAttention):
    def l2_norm(self) -> bool:
        """As Infinity calls it."""
        own: Any = self
        return bool(own.cos_attn)

    def forward(
        self,
        x: Tensor,
        attn_bias_or_two_vector: Any = None,
        attn_fn: Any = None,
        scale_schedule: Triples | None = None,
        rope2d_freqs_grid: dict[str, Tensor] | None = None,
        scale_ind: int = 0,
    ) -> Tensor:
        if not in_generation(self, attn_bias_or_two_vector):
            return stock(self).forward(
                self, x, attn_bias_or_two_vector, attn_fn, scale_schedule, rope2d_freqs_grid, scale_ind=scale_ind
            )
        return self.proj_drop(self.proj(self.attend(x, Told(scale_schedule, rope2d_freqs_grid, scale_ind))))


class PatchedInfinity(Patch):
    """A patched Infinity: see `Patch`. The first call of a generation says which schedule it is of."""

    attention: ClassVar[type[PagedSelfAttention]] = InfinityAttention

    def read(self, model: Any, modules: list[Any]) -> None:
        self.prompts: dict[int, tuple[Tensor, int, Tensor]] = {}  # layer: text, its version, its keys and values
        self._turns = PerStep()
        self._crosses = [_cross(block, number) for number, block in enumerate(model.unregistered_blocks)]

    def bindings(self, model: Any, modules: list[Any]) -> Iterator[Binding]:
        """Attention to the maps and to the prompt, layer by layer."""
        for number, (own, cross) in enumerate(zip(modules, self._crosses, strict=True)):
            yield Layer(own, self.attention, self, number)
            yield _Prompt(cross, self, number)

    def begin(self, enable: bool) -> None:
        """The model says so for every layer before and after each generation."""
        super().begin(enable)
        self.prompts.clear()
        self._turns.forget()

    def schedule_of(self, told: Told) -> ScaleSchedule:
        """The (1, h, w) of every scale, as a schedule."""
        if told.sizes is None:
            raise ValueError("scale_schedule is None; the model must pass the (1, h, w) of every scale")
        if any(t != 1 for t, _, _ in told.sizes):
            raise ValueError(f"scale_schedule is {told.sizes!r}; only images are supported, one frame per scale")
        return schedule_of(tuple((int(h), int(w)) for _, h, w in told.sizes))

    def rotation(self, told: Told, x: Tensor) -> Rotation:
        """The model's own, which all layers of a step share."""
        if told.grid is None or told.sizes is None:
            return None, None
        return self._turns.of(
            (told.grid, told.scale, x.shape[1], x.device), lambda: self.turns(told, x.shape[1], x.device)
        )

    def turns(self, told: Told, tokens: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Cosines and sines (n, D / 2) of the next `tokens` of the model's table."""
        assert told.grid is not None and told.sizes is not None
        start = self.begins(told)
        table = told.grid[str(tuple(told.sizes))][:, 0, 0, 0, start : start + tokens]
        cos, sin = table.to(device, torch.float32)
        return cos.contiguous(), sin.contiguous()

    def begins(self, told: Told) -> int:
        """Where the scale begins in the model's table."""
        assert told.sizes is not None
        return sum(t * h * w for t, h, w in told.sizes[: told.scale])


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


def _cross(wrapped: Any, number: int) -> Any:
    """A layer's attention to the prompt."""
    block, name = unwrapped(wrapped), f"model.unregistered_blocks[{number}]"
    require(block, name, ("ca",), "Infinity")
    cross = unwrapped(block.ca)
    require(cross, f"{name}.ca", _CROSS_NEEDS, "Infinity")
    require_signature(cross, f"{name}.ca", "forward", ("q", "ca_kv"), "Infinity")
    return cross


FAMILY = Family(
    name="Infinity",
    needs=("unregistered_blocks",),
    layers="unregistered_blocks",
    attention="sa",
    attributes=(
        "num_heads", "head_dim", "cos_attn", "scale", "mat_qkv", "q_bias", "zero_k_bias", "v_bias", "proj", "proj_drop",
    ),
    takes=("x", "attn_bias_or_two_vector", "attn_fn", "scale_schedule", "rope2d_freqs_grid", "scale_ind"),
    patch=PatchedInfinity,
)  # fmt: skip
