"""What the patches of all families share: the handle, and self-attention around the cache."""

from __future__ import annotations

from collections.abc import Iterable
from types import TracebackType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from amskv_kernels.arguments import one_of
from amskv_kernels.cache import PagedKVCache
from amskv_kernels.integrations.caches import Cache, Caches
from amskv_kernels.integrations.modules import Binding, PatchedModule, eager, require, require_signature, stock
from amskv_kernels.models.attention import Observer
from amskv_kernels.planning.layout import HEAD_DIMS
from amskv_kernels.planning.plan import CachePlan
from amskv_kernels.schedule import ScaleSchedule

P = TypeVar("P", bound="Patch")
Rotation = tuple[Tensor, Tensor] | tuple[None, None]


class Patch:
    """A patch in force; leaving a `with` block undoes it.

    Attributes:
        plan: what every layer keeps in the current or last generation, when and where; None before it is known, and in
            the online mode.
        cache: its pool; None before the first generation, kept for later ones of the same batch and schedule.
    """

    def __init__(self, caches: Caches, observe: Observer | None) -> None:
        self._caches, self.observe = caches, observe
        self._bindings: list[Binding] = []
        self._begins = self.caching = False
        self.plan: CachePlan | None = None

    @property
    def cache(self) -> Cache | None:
        """The cache of the current or last generation."""
        return self._caches.cache

    def undo(self) -> None:
        """Put the model's own attention back and free the cache; doing it twice does no harm."""
        for binding in self._bindings:
            binding.undo()
        self._bindings = []
        self._caches.cache = None
        self.begin(False)

    def begin(self, enable: bool) -> None:
        """The model says so for every layer before and after each generation."""
        self.caching = self._begins = enable

    def schedule_of(self, told: Any) -> ScaleSchedule:
        """The schedule of a generation, from what the model tells its attention beside x."""
        raise NotImplementedError

    def rotation(self, told: Any, x: Tensor) -> Rotation:
        """Cosines and sines (n, D / 2) fp32 for the tokens of x (B, n, C); none in a model without."""
        return None, None

    def ready(self, told: Any, k: Tensor) -> Cache:
        """The cache; the first call of a generation, whose keys are k (B, n, Hkv, D), makes it where it must."""
        if not self._begins and self._caches.cache is not None:
            return self._caches.cache
        cache = self._caches.start(self.schedule_of(told), k)
        self.plan = cache.plan if isinstance(cache, PagedKVCache) else None
        self._begins = False
        return cache

    def _bind(self, modules: Iterable[Binding]) -> None:
        """Take the modules over, all or none."""
        try:
            for binding in modules:
                self._bindings.append(binding)
        except BaseException:
            self.undo()
            raise

    def __enter__(self: P) -> P:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:  # fmt: skip
        self.undo()


def require_attention(
    module: Any, name: str, needs: tuple[str, ...], takes: tuple[str, ...], whose: str
) -> None:  # fmt: skip
    """Raise TypeError or ValueError where a self-attention is not laid out or called like `whose` public class."""
    require(module, name, needs, whose)
    require_signature(module, name, "forward", takes, whose)
    require_signature(module, name, "kv_caching", ("enable",), whose)
    one_of(f"{name}.head_dim", module.head_dim, HEAD_DIMS)


class Layer(Binding):
    """One layer's self-attention, and what does not change between the steps of a generation.

    Args:
        module: the public self-attention.
        kind: what replaces its methods.
        patch: whose cache it goes through.
        number: the layer's, from 0.
        l2_norm: whether q and k are normalised, and q has a learned length per head.
    """

    def __init__(
        self, module: nn.Module, kind: type[PatchedModule], patch: Patch, number: int, l2_norm: bool
    ) -> None:  # fmt: skip
        super().__init__(module, kind, patch)
        self.number, self.l2_norm = number, l2_norm
        self.begin()

    def begin(self) -> None:
        """Forget what the last generation worked out: weights may have changed since."""
        self.bias: Tensor | None = None
        self.length: Tensor | None = None
        self.scale = 1.0

    def prepare(self) -> None:
        """Work it out, with the weights at hand (sharded ones are there in a forward only)."""
        own: Any = self.module
        if self.l2_norm:
            self.length = own.scale_mul_1H11.detach().clamp_max(own.max_scale_mul).exp().float().flatten()
        self.scale = float(own.scale)
        self.bias = torch.cat((own.q_bias, own.zero_k_bias, own.v_bias))


class PagedSelfAttention(PatchedModule):
    """A public self-attention module whose history lies in the patch's cache."""

    replaced = ("forward", "kv_caching")

    # As the public classes name them.
    mat_qkv: nn.Linear
    proj: nn.Linear
    proj_drop: nn.Module
    num_heads: int
    head_dim: int

    def kv_caching(self, enable: bool) -> None:
        """Begin or end a generation."""
        layer = getattr(self, "_amskv", None)
        if layer is None:
            stock(self).kv_caching(self, enable)
            return
        layer.of(self).begin()
        layer.patch.begin(enable)

    @eager
    def attend(self, x: Tensor, told: Any = None) -> Tensor:
        """From the module's input x (B, n, C) to its attention's output (B, n, C), before the last projection.

        Args:
            x: of one scale.
            told: what the model tells beside it, for `Patch.schedule_of` and `Patch.rotation`.
        """
        layer = self._amskv.of(self)
        patch = layer.patch
        if layer.bias is None:
            layer.prepare()
        cos, sin = patch.rotation(told, x)
        (batch, n, width), heads, weight = x.shape, self.num_heads, self.mat_qkv.weight
        qkv = F.linear(x, weight, layer.bias).view(batch, n, 3 * heads, self.head_dim)
        if layer.l2_norm or cos is not None:
            q, k = torch.ops.amskv.prepare_qk(qkv, heads, layer.length, cos, sin, layer.l2_norm)
            v = qkv[:, :, 2 * heads :]
        else:
            q, k, v = qkv.split(heads, dim=2)
        if patch.observe is not None:
            patch.observe(layer.number, q, k, v, layer.scale)
        cache = patch.ready(told, k)
        if patch.plan is not None and patch.plan.selection is not None and patch.plan.selection.raw_queries:
            cache.prepare(layer.number, x, weight[:width])
        return cache.attend(layer.number, q, k, v, layer.scale).view(batch, n, -1)
