"""Give the public FoundationVision `Infinity` class a planned, paged KV cache, in place.

    from amskv_kernels.integrations.infinity import patch

    with patch(infinity, ScaleKV(0.10)) as patched:
        ...                                   # generate as before, any batch and aspect ratio
        print(patched.cache.nbytes)

Only the attention modules' `forward` and `kv_caching` are replaced. Self-attention goes through `prepare_qk` (norm,
length and RoPE2D in one pass) and the cache. Attention to the prompt projects keys and values once per prompt and
layer, not once more at every scale.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from amskv_kernels.cache.paged import PagedKVCache
from amskv_kernels.integrations.common import Patch, fits, require
from amskv_kernels.models.attention import Observer
from amskv_kernels.models.infinity import Text, Triples, text_attention
from amskv_kernels.planning.plan import CachePlan
from amskv_kernels.policies import Policy
from amskv_kernels.schedule import ScaleSchedule

PolicyOf = Policy | Callable[[ScaleSchedule], Policy]

_BLOCK_NEEDS = ("sa", "ca")
_SELF_NEEDS = (
    "num_heads", "head_dim", "cos_attn", "scale", "mat_qkv", "q_bias", "zero_k_bias", "v_bias", "proj", "proj_drop",
    "kv_caching",
)  # fmt: skip
_CROSS_NEEDS = (
    "num_heads", "head_dim", "cos_attn", "scale", "mat_q", "mat_kv", "zero_k_bias", "v_bias", "proj", "proj_drop",
)  # fmt: skip


class PatchedInfinity(Patch):
    """A patched model: its plan and cache, and the way back. Also a context manager that undoes on leaving.

    Attributes:
        plan: what every layer keeps in the current or last generation, when and where; None before the first.
        cache: its pool; kept for later generations of the same batch and schedule.
    """

    def __init__(self, model: Any, policy: PolicyOf, page_size: int | None, observe: Observer | None) -> None:
        self._blocks = _blocks(model)
        if isinstance(policy, Policy):
            policy.check_layers(len(self._blocks))
        self._policy, self._page_size, self.observe = policy, page_size, observe
        self._plans: dict[ScaleSchedule, CachePlan] = {}
        self._rotations: dict[tuple[Any, ...], tuple[Tensor, Tensor]] = {}
        self.cache: PagedKVCache | None = None
        self.caching = False
        self._begins = False
        for layer, block in enumerate(self._blocks):
            own = _SelfForward(self, layer, block.sa)
            object.__setattr__(block.sa, "forward", own)
            object.__setattr__(block.sa, "kv_caching", self._kv_caching)
            object.__setattr__(block.ca, "forward", _CrossForward(self, block.ca))

    @property
    def plan(self) -> CachePlan | None:
        """The plan of the current cache."""
        return None if self.cache is None else self.cache.plan

    def undo(self) -> None:
        """Put the model's own attention back and free the cache; doing it twice does no harm."""
        for block in self._blocks:
            for module in (block.sa, block.ca):
                for name in ("forward", "kv_caching"):
                    module.__dict__.pop(name, None)
        self._blocks, self.cache = [], None
        self._rotations.clear()

    def _kv_caching(self, enable: bool) -> None:
        """The model says so for every layer before and after each generation."""
        self.caching = self._begins = enable
        for block in self._blocks:
            block.ca.forward.forget()

    def ready(self, k: Tensor, scale_schedule: Triples | None) -> PagedKVCache:
        """The cache; the first call of a generation says which schedule it is of, and makes it where it must."""
        if not self._begins and self.cache is not None:
            return self.cache
        schedule = _schedule(scale_schedule)
        if schedule not in self._plans:
            policy = self._policy if isinstance(self._policy, Policy) else self._policy(schedule)
            self._plans[schedule] = CachePlan.build(
                schedule, policy, len(self._blocks), self._page_size, kv_heads=k.shape[2]
            )
        plan, cache = self._plans[schedule], self.cache
        if cache is None or cache.plan is not plan or not fits(cache, k):
            cache = self.cache = None  # its pool is free before the new one is made
            cache = PagedKVCache(
                plan, batch=k.shape[0], kv_heads=k.shape[2], head_dim=k.shape[3], dtype=k.dtype, device=k.device
            )
        cache.reset()
        self.cache, self._begins = cache, False
        return cache

    def rotation(
        self, grid: dict[str, Tensor] | None, scale_schedule: Triples | None, scale: int, n: int, device: torch.device
    ) -> tuple[Tensor, Tensor] | tuple[None, None]:  # fmt: skip
        """The model's own cosines and sines (n, D / 2) for the tokens of a scale; none where it gives no grid."""
        if grid is None or scale_schedule is None:
            return None, None
        key = (str(tuple(scale_schedule)), scale, n, device)
        if key not in self._rotations:
            start = sum(t * h * w for t, h, w in scale_schedule[:scale])
            cos, sin = grid[key[0]][:, 0, 0, 0, start : start + n].to(device, torch.float32)
            self._rotations[key] = cos.contiguous(), sin.contiguous()
        return self._rotations[key]


class _SelfForward:
    """Replaces one self-attention's `forward`: the module's own projections around the cache."""

    def __init__(self, patched: PatchedInfinity, layer: int, attention: Any) -> None:
        self._patched, self._layer, self._attention = patched, layer, attention
        self._original = attention.forward

    def __call__(
        self,
        x: Tensor,
        attn_bias_or_two_vector: Any = None,
        attn_fn: Any = None,
        scale_schedule: Triples | None = None,
        rope2d_freqs_grid: dict[str, Tensor] | None = None,
        scale_ind: int = 0,
    ) -> Tensor:
        patched, own = self._patched, self._attention
        if not patched.caching or attn_bias_or_two_vector is not None:  # training, or teacher forcing
            return self._original(
                x, attn_bias_or_two_vector, attn_fn, scale_schedule, rope2d_freqs_grid, scale_ind=scale_ind
            )
        batch, n, _ = x.shape
        heads = own.num_heads
        bias = torch.cat((own.q_bias, own.zero_k_bias, own.v_bias))
        qkv = F.linear(x, own.mat_qkv.weight, bias).view(batch, n, 3 * heads, own.head_dim)
        length = None
        if own.cos_attn:
            length = own.scale_mul_1H11.detach().clamp_max(own.max_scale_mul).exp().float().flatten()
        cos, sin = patched.rotation(rope2d_freqs_grid, scale_schedule, scale_ind, n, x.device)
        q, k = torch.ops.amskv.prepare_qk(qkv, heads, length, cos, sin, bool(own.cos_attn))
        if patched.observe is not None:
            patched.observe(self._layer, q, k, qkv[:, :, 2 * heads :], float(own.scale))
        cache = patched.ready(k, scale_schedule)
        cache.prepare(self._layer, x, own.mat_qkv.weight[: len(own.q_bias)])
        out = cache.attend(self._layer, q, k, qkv[:, :, 2 * heads :], float(own.scale))
        return own.proj_drop(own.proj(out.view(batch, n, -1)))


class _CrossForward:
    """Replaces one cross-attention's `forward`: the prompt's keys and values are projected when it is new."""

    def __init__(self, patched: PatchedInfinity, attention: Any) -> None:
        self._patched, self._attention = patched, attention
        self._original = attention.forward
        self.forget()

    def forget(self) -> None:
        """Free what a generation left."""
        self._text: Tensor | None = None
        self._version = 0
        self._kv: Tensor | None = None

    def __call__(self, q: Tensor, ca_kv: Text) -> Tensor:
        own = self._attention
        text, cu_seqlens, longest = ca_kv
        if not self._patched.caching or own.cos_attn or getattr(own, "for_attn_pool", False):
            return self._original(q, ca_kv)
        # Tensors of inference mode count no versions; what they gave is forgotten when a generation begins.
        version = 0 if text.is_inference() else text._version
        if self._kv is None or self._text is not text or self._version != version:
            bias = torch.cat((own.zero_k_bias, own.v_bias))
            kv = F.linear(text, own.mat_kv.weight, bias).view(-1, 2, own.num_heads, own.head_dim)
            self._text, self._version, self._kv = text, version, kv.contiguous()
        queries = own.mat_q(q).view(*q.shape[:2], own.num_heads, own.head_dim)
        out = _attend_text(own, queries, self._kv, cu_seqlens, longest)
        return own.proj_drop(own.proj(out.reshape(*q.shape[:2], -1)))


def patch(
    model: Any, policy: PolicyOf, *, page_size: int | None = None, observe: Observer | None = None
) -> PatchedInfinity:  # fmt: skip
    """Patch a FoundationVision `Infinity` so that its generations keep only what `policy` keeps.

    Args:
        model: an instance of the public class with text conditioning, any size, or an `InfinityStack`.
        policy: `Full()`, `ScaleKV(0.10)`, …; or a function from a schedule to one, for policies that are made for a
            schedule, where generations of several aspect ratios follow each other.
        page_size: see `CachePlan.build`.
        observe: called with (layer, q, k, v, softmax_scale) at every call, for example `AttentionRecorder.observe` to
            calibrate.

    Returns:
        A handle with `.undo()`, `.plan` and `.cache`, usable in a `with` statement.

    Raises:
        TypeError: the model is not laid out like the public class; names what is missing.
        ValueError: already patched, or a policy that does not fit the model.
    """
    return PatchedInfinity(model, policy, page_size, observe)


def _attend_text(own: Any, q: Tensor, kv: Tensor, cu_seqlens: Tensor, longest: int) -> Tensor:
    """With the function that the model's own module uses, where it has one: the same arithmetic, 16 bit throughout."""
    batch, n, heads, head_dim = q.shape
    function = vars(sys.modules[type(own).__module__]).get("flash_attn_varlen_kvpacked_func")
    if function is None:
        return text_attention(q, kv.to(q.dtype), cu_seqlens, longest, float(own.scale))
    half = torch.bfloat16 if q.dtype == torch.float32 else q.dtype
    cu_queries = torch.arange(0, n * (batch + 1), n, dtype=torch.int32, device=q.device)
    out: Tensor = function(
        q=q.reshape(-1, heads, head_dim).to(half), kv=kv.to(half), cu_seqlens_q=cu_queries, cu_seqlens_k=cu_seqlens,
        max_seqlen_q=n, max_seqlen_k=longest, dropout_p=0, softmax_scale=own.scale,
    )  # fmt: skip
    return out.to(q.dtype)


def _blocks(model: Any) -> list[Any]:
    require(model, "model", ("unregistered_blocks",), "Infinity")
    blocks = list(model.unregistered_blocks)
    for layer, block in enumerate(blocks):
        name = f"model.unregistered_blocks[{layer}]"
        require(block, name, _BLOCK_NEEDS, "Infinity")
        require(block.sa, f"{name}.sa", _SELF_NEEDS, "Infinity")
        require(block.ca, f"{name}.ca", _CROSS_NEEDS, "Infinity")
        if isinstance(block.sa.forward, _SelfForward):
            raise ValueError("model is patched already; undo() that patch first")
    return blocks


def _schedule(scale_schedule: Triples | None) -> ScaleSchedule:
    if scale_schedule is None:
        raise ValueError("scale_schedule is None; the model must pass the (1, h, w) of every scale")
    if any(t != 1 for t, _, _ in scale_schedule):
        raise ValueError(f"scale_schedule is {scale_schedule!r}; only images are supported, one frame per scale")
    return _named(tuple((int(h), int(w)) for _, h, w in scale_schedule))


@cache
def _named(sizes: tuple[tuple[int, int], ...]) -> ScaleSchedule:
    """The published schedule of these sizes, or a custom one."""
    published = (ScaleSchedule.named(name) for name in ScaleSchedule.names())
    return next((schedule for schedule in published if schedule.sizes == sizes), ScaleSchedule(sizes))
