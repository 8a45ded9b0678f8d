"""HART, text to image, with attention as Llama's or as GPT-2's: the prompt's tokens come first, as the first scale.

The last map may be drawn in several masked passes (`num_maskgit_iters`), each of which reads the passes before it.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from amskv_kernels.integrations.caches import schedule_of
from amskv_kernels.integrations.common import QKV, PagedSelfAttention, Patch, PerStep, in_generation
from amskv_kernels.integrations.modules import Binding, PatchedModule, stock
from amskv_kernels.integrations.var import FAMILY as VAR
from amskv_kernels.integrations.var import sides_of
from amskv_kernels.policies.around import Around
from amskv_kernels.schedule import ScaleSchedule

Mask = tuple[Tensor, Tensor]  # row and place of every token that a pass draws


class _Told(NamedTuple):
    """What the model tells its self-attention beside x."""

    scale: int
    context: Tensor | None  # (B, n) positions of the prompt's tokens
    mask: Mask | None


class _GPT2Attention(PagedSelfAttention):
    def forward(
        self, x: Tensor, attn_bias: Any, si: int = -1, context_position_ids: Any = None, context_mask: Any = None
    ) -> Tensor:
        if not in_generation(self, attn_bias):
            return stock(self).forward(self, x, attn_bias, si, context_position_ids, context_mask)
        return self.proj_drop(self.proj(self.attend(x)))


class _LlamaAttention(PagedSelfAttention):
    projection = "qkv_proj"

    rotary_emb: nn.Module
    context_rotary_emb: nn.Module

    def project(self, x: Tensor, layer: Any, told: _Told) -> QKV:
        """Normalised as everywhere, then turned: element i with element i + D / 2, by angles that differ."""
        q, k, v = super().project(x, layer, None)
        cos, sin = layer.patch.angles(self, told, v)
        return _turned(q, cos, sin), _turned(k, cos, sin), v

    def forward(
        self, x: Tensor, attn_bias: Any, si: int = -1, context_position_ids: Any = None, context_mask: Any = None,
        m_maskgit: Mask | None = None,
    ) -> Tensor:  # fmt: skip
        if not in_generation(self, attn_bias):
            return stock(self).forward(self, x, attn_bias, si, context_position_ids, context_mask, m_maskgit)
        return self.proj_drop(self.proj(self.attend(x, _Told(si, context_position_ids, m_maskgit))))


class _Model(PatchedModule):
    replaced = ("autoregressive_infer_cfg",)

    def autoregressive_infer_cfg(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own; how many passes draw the last map is told here only."""
        binding, own = getattr(self, "_amskv", None), stock(self).autoregressive_infer_cfg
        if binding is not None:
            given = inspect.signature(own).bind(self, *args, **kwargs)
            given.apply_defaults()
            binding.patch.passes = int(given.arguments.get("num_maskgit_iters", 1))
        return own(self, *args, **kwargs)


class PatchedHART(Patch):
    """A patched HART with GPT-2's attention: see `Patch`.

    Attributes:
        passes: that draw the last map in the coming generations.
    """

    attention: ClassVar[type[PagedSelfAttention]] = _GPT2Attention

    def read(self, model: Any, modules: list[Any]) -> None:
        if self._caches.online:
            raise ValueError("online is True; it is for models whose generation begins with a map, not with a prompt")
        self.sides = sides_of(model)
        self.text, self.passes, self._angles = int(model.context_token), 1, PerStep()
        self.plan = self._caches.plan(self.schedule_of(None), modules[0].num_heads)

    def bindings(self, model: Any, modules: list[Any]) -> Iterator[Binding]:
        """The attentions, and the model itself where it is one that says how many passes there are."""
        yield from super().bindings(model, modules)
        if isinstance(model, nn.Module) and hasattr(model, "autoregressive_infer_cfg"):
            yield Binding(model, _Model, self)

    def begin(self, enable: bool) -> None:
        """The model says so for every layer before and after each generation."""
        super().begin(enable)
        self._angles.forget()

    def schedule_of(self, told: Any) -> ScaleSchedule:
        """The prompt in place of the first map, the others, and the last one as it is drawn."""
        *sides, last = self.sides[1:] if self.text else self.sides
        maps = [(side, side) for side in sides]
        self._caches.around = Around(schedule_of((*maps, (last, last))), prefix=int(self.text > 0))
        drawn = [(last, last)] if self.passes == 1 else [(1, n) for n in passes(last * last, self.passes)]
        return ScaleSchedule(([(1, self.text)] if self.text else []) + maps + drawn)

    def angles(self, module: Any, told: _Told, v: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines (B, n, 1, D) for the tokens of v (B, n, H, D), which all layers of a step share."""
        mask = told.mask or (None, None)
        return self._angles.of((told.scale, told.context, *mask, v.device), lambda: self._worked_out(module, told, v))

    def _worked_out(self, module: Any, told: _Told, v: Tensor) -> tuple[Tensor, Tensor]:
        if self.text and told.scale == 0:
            cos, sin = module.context_rotary_emb(v, told.context)
        else:
            places = _places(self.sides[told.scale], self.sides[-1], v.device).expand(len(v), -1, -1)
            if told.mask is not None:
                places = places[told.mask].reshape(len(v), -1, 2)
            if self.text and told.context is not None:
                places = places + told.context[:, -1, None, None]
            cos, sin = module.rotary_emb(v, places)
        return cos[:, :, None], sin[:, :, None]


class PatchedLlamaHART(PatchedHART):
    """A patched HART with Llama's attention: see `Patch`."""

    attention: ClassVar[type[PagedSelfAttention]] = _LlamaAttention


def passes(tokens: int, count: int) -> Iterator[int]:
    """How many tokens each of `count` masked passes draws; what is left after each follows a cosine."""
    masked = tokens
    for number in range(1, count):
        left = max(1, min(masked - 1, math.floor(tokens * math.cos(math.pi / 2 * number / count))))
        yield masked - left
        masked = left
    yield masked


def _places(side: int, last: int, device: torch.device) -> Tensor:
    """(1, side², 2) row and column of every token, in the units of the last map."""
    line = torch.arange(side, device=device) / side * last
    return torch.cartesian_prod(line, line).view(1, -1, 2)


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return (x * cos + torch.cat((-second, first), dim=-1) * sin).to(x.dtype)


GPT2 = VAR._replace(
    name="HART (GPT-2)",
    needs=("patch_nums", "blocks", "context_token"),
    takes=("x", "attn_bias", "si", "context_position_ids", "context_mask"),
    patch=PatchedHART,
)
LLAMA = GPT2._replace(
    name="HART (Llama)",
    attributes=(*(name for name in VAR.attributes if name != "mat_qkv"), "qkv_proj", "rotary_emb"),
    takes=(*GPT2.takes, "m_maskgit"),
    patch=PatchedLlamaHART,
)
