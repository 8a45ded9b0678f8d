"""STAR (scale-wise text-to-image): VAR's attention, turned by `freqs_cis`, beside attention to the prompt.

The turn comes before the L2 norm there and after it here, which is the same: neither changes what the other does.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from amskv_kernels.integrations.common import PagedSelfAttention, PerStep, Rotation, complex_turns, in_generation
from amskv_kernels.integrations.modules import stock
from amskv_kernels.integrations.var import FAMILY as VAR
from amskv_kernels.integrations.var import PatchedVAR


class _SelfAttention(PagedSelfAttention):
    rotary_pos_emb: bool

    def forward(
        self, x: Tensor, attn_bias: Any = None, encoder_hidden_states: Any = None, freqs_cis: Tensor | None = None,
        layer_id: int = 0,
    ) -> Tensor:  # fmt: skip
        if not in_generation(self, attn_bias):
            return stock(self).forward(self, x, attn_bias, encoder_hidden_states, freqs_cis, layer_id)
        return self.proj_drop(self.proj(self.attend(x, freqs_cis if self.rotary_pos_emb else None)))


class PatchedSTAR(PatchedVAR):
    """A patched STAR: see `Patch`."""

    attention: ClassVar[type[PagedSelfAttention]] = _SelfAttention

    def read(self, model: Any, modules: list[Any]) -> None:
        super().read(model, modules)
        self._turns = PerStep()

    def begin(self, enable: bool) -> None:
        """The model says so for every layer before and after each generation."""
        super().begin(enable)
        self._turns.forget()

    def rotation(self, told: Tensor | None, x: Tensor) -> Rotation:
        """The model's own, which all layers of a step share."""
        if told is None:
            return None, None
        return self._turns.of((told, x.device), lambda: complex_turns(told.to(x.device)))


FAMILY = VAR._replace(
    name="STAR",
    attributes=(*VAR.attributes, "is_cross", "rotary_pos_emb"),
    takes=("x", "attn_bias", "encoder_hidden_states", "freqs_cis", "layer_id"),
    patch=PatchedSTAR,
)
