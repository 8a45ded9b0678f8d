"""Give the public FoundationVision `VAR` class a planned, paged KV cache, in place.

    with amskv_kernels.patch(var, AMSKV(demanding_layers=(0, 1, 2))) as patched:
        images = var.autoregressive_infer_cfg(B=8, label_B=labels, cfg=1.5, top_k=900, top_p=0.96)
        print(patched.cache.nbytes)

Only the attention modules' `forward` and `kv_caching` are replaced; weights, sampling and training stay theirs.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from amskv_kernels.integrations.caches import Caches, PolicyLike, schedule_of
from amskv_kernels.integrations.common import Layer, PagedSelfAttention, Patch, require_attention
from amskv_kernels.integrations.modules import require, stock, unwrapped
from amskv_kernels.models.attention import Observer
from amskv_kernels.schedule import ScaleSchedule

_ATTENTION_NEEDS = (
    "num_heads", "head_dim", "attn_l2_norm", "scale", "mat_qkv", "q_bias", "zero_k_bias", "v_bias",
    "proj", "proj_drop", "kv_caching",
)  # fmt: skip
NEEDS = ("patch_nums", "blocks")


class PatchedVAR(Patch):
    """A patched VAR: see `Patch`. Its schedule, and so its plan, is known from the start."""

    def __init__(self, model: Any, caches: Caches, observe: Observer | None, modules: list[Any]) -> None:
        super().__init__(caches, observe)
        self.schedule = schedule_of(tuple((int(side), int(side)) for side in model.patch_nums))
        self.plan = caches.plan(self.schedule, modules[0].num_heads)
        self._bind(
            Layer(module, _SelfAttention, self, number, bool(module.attn_l2_norm))
            for number, module in enumerate(modules)
        )

    def schedule_of(self, told: Any) -> ScaleSchedule:
        """The model's own."""
        return self.schedule


class _SelfAttention(PagedSelfAttention):
    def forward(self, x: Tensor, attn_bias: Tensor | None) -> Tensor:
        layer = getattr(self, "_amskv", None)
        if layer is None or attn_bias is not None or not layer.patch.caching:  # training, or teacher forcing
            return stock(self).forward(self, x, attn_bias)
        return self.proj_drop(self.proj(self.attend(x)))


def patch(
    model: Any,
    policy: PolicyLike,
    *,
    page_size: int | None = None,
    observe: Observer | None = None,
    online: bool = False,
    theta: float | None = None,
) -> PatchedVAR:
    """Patch a FoundationVision `VAR` so that its generations keep only what `policy` keeps.

    Arguments, result and errors as for `amskv_kernels.patch`.
    """
    model = unwrapped(model)
    modules = _attention_modules(model)
    return PatchedVAR(model, Caches(policy, len(modules), page_size, online, theta), observe, modules)


def _attention_modules(model: Any) -> list[Any]:
    require(model, "model", NEEDS, "VAR")
    modules = [unwrapped(getattr(unwrapped(block), "attn", None)) for block in model.blocks]
    for number, module in enumerate(modules):
        require_attention(module, f"model.blocks[{number}].attn", _ATTENTION_NEEDS, ("x", "attn_bias"), "VAR")
    if not modules:
        raise TypeError("model.blocks is empty; a model to patch has at least one layer")
    return modules
