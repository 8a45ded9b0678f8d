"""FoundationVision's `VAR`, and VAR-CLIP, which changes what an image begins with and nothing of the attention.

    with amskv_kernels.patch(var, AMSKV(demanding_layers=(0, 1, 2))) as patched:
        images = var.autoregressive_infer_cfg(B=8, label_B=labels, cfg=1.5, top_k=900, top_p=0.96)
        print(patched.cache.nbytes)

Only the attention modules' `forward` and `kv_caching` are replaced; weights, sampling and training stay theirs.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

from torch import Tensor

from amskv_kernels.arguments import shown, whole_number
from amskv_kernels.integrations.caches import schedule_of
from amskv_kernels.integrations.common import PagedSelfAttention, Patch, in_generation
from amskv_kernels.integrations.family import Family
from amskv_kernels.integrations.modules import stock
from amskv_kernels.schedule import ScaleSchedule


class _SelfAttention(PagedSelfAttention):
    def forward(self, x: Tensor, attn_bias: Tensor | None) -> Tensor:
        if not in_generation(self, attn_bias):
            return stock(self).forward(self, x, attn_bias)
        return self.proj_drop(self.proj(self.attend(x)))


def sides_of(model: Any) -> tuple[int, ...]:
    """Of the model's maps, as ints whatever holds them.

    Raises:
        TypeError: nothing that holds numbers.
        ValueError: one that is no whole number above 0.
    """
    if not isinstance(model.patch_nums, Iterable):
        raise TypeError(f"model.patch_nums is {shown(model.patch_nums)}; it must be sides of maps, such as (1, 2, 3)")
    return tuple(whole_number(f"model.patch_nums[{i}]", side, 1) for i, side in enumerate(model.patch_nums))


class PatchedVAR(Patch):
    """A patched VAR: see `Patch`. Its schedule, and so its plan, is known from the start."""

    attention: ClassVar[type[PagedSelfAttention]] = _SelfAttention

    def read(self, model: Any, modules: list[Any]) -> None:
        self.schedule = schedule_of(tuple((side, side) for side in sides_of(model)))
        self.plan = self._caches.plan(self.schedule, modules[0].num_heads)

    def schedule_of(self, told: Any) -> ScaleSchedule:
        """The model's own."""
        return self.schedule


FAMILY = Family(
    name="VAR",
    needs=("patch_nums", "blocks"),
    layers="blocks",
    attention="attn",
    attributes=(
        "num_heads", "head_dim", "attn_l2_norm", "scale", "mat_qkv", "q_bias", "zero_k_bias", "v_bias", "proj",
        "proj_drop",
    ),
    takes=("x", "attn_bias"),
    patch=PatchedVAR,
)  # fmt: skip
