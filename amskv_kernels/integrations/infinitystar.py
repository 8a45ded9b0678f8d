"""InfinityStar: video, 32 query heads on 8 KV heads, a text before the maps, and a rule of what a scale may see.

The model tells its attention which scales it may look at (`ref_sids`). That rule is planned as a policy: what no later
scale looks at is never stored, and pages are free after their last use. A scale that is drawn several times is stored
the last time.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from amskv_kernels.integrations.common import (
    QKV,
    Constants,
    PagedSelfAttention,
    Patch,
    PerStep,
    Rotation,
    in_generation,
    prepared,
)
from amskv_kernels.integrations.family import Family
from amskv_kernels.integrations.modules import stock
from amskv_kernels.policies import Visible
from amskv_kernels.policies.around import Around
from amskv_kernels.schedule import ScaleSchedule

TEXT = "t0"  # as the model's code calls the step of the prompt

Triples = Sequence[tuple[int, int, int]]


class _Told(NamedTuple):
    """What the model tells its self-attention beside x."""

    turns: Tensor  # (2, 1, 1, 1, n, D / 2)
    sizes: Triples
    scale: int | str
    info: Mapping[int, Mapping[str, Any]] | None
    last: bool  # whether the scale is drawn for the last time
    tokens: int


class _SelfAttention(PagedSelfAttention):
    q_proj: nn.Linear
    k_proj: nn.Linear
    v_proj: nn.Linear
    o_proj: nn.Linear
    q_norm: nn.Module
    k_norm: nn.Module
    num_key_value_heads: int

    def constants(self) -> Constants:
        """What is worked out once a generation."""
        return Constants(self.head_dim**-0.5)

    def project(self, x: Tensor, layer: Any, told: _Told) -> QKV:
        """As the public class projects and norms, the two kinds of heads in one row for the rotation."""
        q, k, v = (
            linear(x).unflatten(2, (-1, self.head_dim)) for linear in (self.q_proj, self.k_proj, self.v_proj)
        )  # fmt: skip
        qkv = torch.cat((self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype), v), dim=2)
        cos, sin = layer.patch.rotation(told, x)
        return *prepared(qkv, self.num_key_value_heads, None, cos, sin, False), v

    def forward(
        self, x: Tensor, attn_bias_or_two_vector: Any, attn_fn: Any = None, rope2d_freqs_grid: Any = (),
        scale_schedule: Triples = (), scale_ind: int | str = 0, context_info: Any = None,
        last_repetition_step: bool = True, ref_text_scale_inds: Sequence[str] = (),
    ) -> Tensor:  # fmt: skip
        if not in_generation(self, attn_bias_or_two_vector):
            return stock(self).forward(
                self, x, attn_bias_or_two_vector, attn_fn, rope2d_freqs_grid, scale_schedule, scale_ind, context_info,
                last_repetition_step, ref_text_scale_inds,
            )  # fmt: skip
        told = _Told(rope2d_freqs_grid, scale_schedule, scale_ind, context_info, last_repetition_step, x.shape[1])
        return self.o_proj(self.attend(x, told))


class PatchedInfinityStar(Patch):
    """A patched InfinityStar: see `Patch`. The text, the first call of a generation, says which schedule it is of."""

    attention: ClassVar[type[PagedSelfAttention]] = _SelfAttention

    def read(self, model: Any, modules: list[Any]) -> None:
        if self._caches.online:
            raise ValueError("online is True; what an InfinityStar may look at is its own rule, known from the start")
        parallel = vars(sys.modules[stock(modules[0]).__module__]).get("sp_manager")
        if parallel is not None and parallel.sp_on():
            raise ValueError("sequence parallelism is on; a patched attention has all tokens and all heads")
        self._turns = PerStep()

    def begin(self, enable: bool) -> None:
        """The model says so for every layer before and after each generation."""
        super().begin(enable)
        self._turns.forget()

    def schedule_of(self, told: _Told) -> ScaleSchedule:
        """The text, then the maps; and the model's rule, for `placed`."""
        if told.scale != TEXT or told.info is None:
            raise ValueError(
                f"scale_ind is {told.scale!r}; a generation begins with the text, {TEXT!r}, and context_info"
            )
        maps = ScaleSchedule(told.sizes)
        rule = Visible(tuple(tuple(sorted(told.info[scale]["ref_sids"])) for scale in range(len(maps))))
        self._caches.around = Around(maps, prefix=1, rule=rule)
        return ScaleSchedule([(1, told.tokens), *told.sizes])

    def rotation(self, told: _Told, x: Tensor) -> Rotation:
        """The model's own, which all layers of a step share."""

        def turns() -> tuple[Tensor, Tensor]:
            cos, sin = told.turns[:, 0, 0, 0].to(x.device, torch.float32)
            return cos.contiguous(), sin.contiguous()

        return self._turns.of((told.turns, x.device), turns)

    def attended(self, cache: Any, layer: int, qkv: QKV, scale: float, told: _Told) -> Tensor:
        """What is drawn again is not stored; the step after the text is that of map 0."""
        step = 0 if told.scale == TEXT else told.scale + 1 if isinstance(told.scale, int) else -1
        if step != cache.step:
            raise ValueError(
                f"scale_ind is {told.scale!r}; the coming step is of scale {cache.step - 1}, and prompts beside the "
                f"text are not supported"
            )
        out: Tensor = (cache.attend if told.last else cache.look)(layer, *qkv, scale)
        return out


FAMILY = Family(
    name="InfinityStar",
    needs=("unregistered_blocks",),
    layers="unregistered_blocks",
    attention="attn",
    attributes=(
        "num_heads", "head_dim", "num_key_value_heads", "q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm",
    ),
    takes=(
        "x", "attn_bias_or_two_vector", "attn_fn", "rope2d_freqs_grid", "scale_schedule", "scale_ind", "context_info",
        "last_repetition_step", "ref_text_scale_inds",
    ),
    patch=PatchedInfinityStar,
)  # fmt: skip
