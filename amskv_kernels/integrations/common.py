"""What the patches of all families share: the handle, and self-attention around the cache."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from amskv_kernels.arguments import shown
from amskv_kernels.cache import PagedKVCache
from amskv_kernels.integrations.caches import Cache, Caches
from amskv_kernels.integrations.modules import Binding, PatchedModule, eager, stock
from amskv_kernels.models.attention import Observer
from amskv_kernels.planning.layout import HEAD_DIMS, row_size
from amskv_kernels.planning.plan import CachePlan
from amskv_kernels.policies import Full
from amskv_kernels.schedule import ScaleSchedule

P = TypeVar("P", bound="Patch")
T = TypeVar("T")
QKV = tuple[Tensor, Tensor, Tensor]
Rotation = tuple[Tensor, Tensor] | tuple[None, None]


class Patch:
    """A patch in force; leaving a `with` block undoes it.

    Args:
        model: an instance of the public class.
        modules: its self-attention, layer by layer.
        caches: make the cache of each generation.
        observe: called with (layer, q, k, v, softmax_scale) at every call.

    Attributes:
        plan: what every layer keeps in the current or last generation, when and where; None before it is known, and in
            the online mode.
        cache: its pool; None before the first generation, kept for later ones of the same batch and schedule.
    """

    attention: ClassVar[type[PagedSelfAttention]]

    def __init__(self, model: Any, modules: list[Any], caches: Caches, observe: Observer | None) -> None:
        if observe is not None and not callable(observe):
            raise TypeError(f"observe is {shown(observe)}; it must be callable as (layer, q, k, v, softmax_scale)")
        self._caches, self.observe = caches, observe
        self._bindings: list[Binding] = []
        self._begins = self.caching = False
        self.plan: CachePlan | None = None
        self.read(model, modules)
        self._bind(self.bindings(model, modules))

    def read(self, model: Any, modules: list[Any]) -> None:
        """Take from the model what does not change, and refuse what does not fit it; nothing is patched yet."""

    def bindings(self, model: Any, modules: list[Any]) -> Iterator[Binding]:
        """The modules to take over, one after the other."""
        for number, module in enumerate(modules):
            yield Layer(module, self.attention, self, number)

    @property
    def cache(self) -> Cache | None:
        """The cache of the current or last generation."""
        return self._caches.cache

    def __repr__(self) -> str:
        state = "undone" if not self._bindings else repr(self.cache or self.plan or "no generation yet")
        return f"{type(self).__name__}({state})"

    def __getstate__(self) -> dict[str, Any]:
        """A copy is of a patch that was undone, as copies of the model are unpatched."""
        undone = {"_bindings": [], "_caches": Caches(Full(), 1, None, False, None, None), "observe": None}
        return vars(self) | undone

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
        """Cosines and sines (n, D / 2) fp32 for the tokens of x (B, n, C), or (B · n, D / 2) where sequences differ;
        none in a model without."""
        return None, None

    def ready(self, told: Any, k: Tensor) -> Cache:
        """The cache; the first call of a generation, whose keys are k (B, n, Hkv, D), makes it where it must."""
        if not self._begins and self._caches.cache is not None:
            return self._caches.cache
        cache = self._caches.start(self.schedule_of(told), k)
        self.plan = cache.plan if isinstance(cache, PagedKVCache) else None
        self._begins = False
        return cache

    def attended(self, cache: Any, layer: int, qkv: QKV, scale: float, told: Any) -> Tensor:
        """(B, n, H, D): what the cache gives."""
        out: Tensor = cache.attend(layer, *qkv, scale)
        return out

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


class Constants(NamedTuple):
    """What a layer's weights say once for all steps of a generation.

    Attributes:
        scale: softmax scale.
        bias: of the projection to q, k and v.
        length: (H,) fp32, of each head's normalised q.
        l2_norm: whether q and k are normalised.
    """

    scale: float
    bias: Tensor | None = None
    length: Tensor | None = None
    l2_norm: bool = False


class Layer(Binding):
    """One layer's self-attention, and what does not change between the steps of a generation.

    Args:
        module: the public self-attention.
        kind: what replaces its methods.
        patch: whose cache it goes through.
        number: the layer's, from 0.
    """

    def __init__(self, module: nn.Module, kind: type[PatchedModule], patch: Patch, number: int) -> None:
        super().__init__(module, kind, patch)
        self.number = number
        self.begin()

    def begin(self) -> None:
        """Forget what the last generation worked out: weights may have changed since."""
        self._constants: Constants | None = None

    @property
    def constants(self) -> Constants:
        """Worked out with the weights at hand: sharded ones are there in a forward only."""
        if self._constants is None:
            own: Any = self.module
            self._constants = own.constants()
        return self._constants


class PagedSelfAttention(PatchedModule):
    """A public self-attention module whose history lies in the patch's cache.

    The public classes with q, k and v in one projection, which the first of `projection` names, are this as it stands.
    """

    replaced = ("forward", "kv_caching")
    projection: ClassVar[str] = "mat_qkv"

    # As the public classes name them.
    proj: nn.Module
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

    def constants(self) -> Constants:
        """What is worked out once a generation."""
        own: Any = self
        bias = torch.cat((own.q_bias, own.zero_k_bias, own.v_bias))
        if not self.l2_norm():
            return Constants(float(own.scale), bias)
        length = own.scale_mul_1H11.detach().clamp_max(own.max_scale_mul).exp().float().flatten()
        return Constants(float(own.scale), bias, length, True)

    def l2_norm(self) -> bool:
        """Whether q and k are normalised, and q has a learned length per head."""
        own: Any = self
        return bool(own.attn_l2_norm)

    def query_weight(self) -> Tensor:
        """(H · D, C) of the projection to q."""
        weight: Tensor = getattr(self, self.projection).weight
        return weight[: self.num_heads * self.head_dim]

    def project(self, x: Tensor, layer: Any, told: Any) -> QKV:
        """q (B, n, H, D), k and v (B, n, Hkv, D) of x (B, n, C), normalised and rotated; layer is the `Layer`."""
        constants, weight = layer.constants, getattr(self, self.projection).weight
        cos, sin = layer.patch.rotation(told, x)
        heads = self.num_heads
        qkv = F.linear(x, weight, constants.bias).view(*x.shape[:2], 3 * heads, self.head_dim)
        if not constants.l2_norm and cos is None:
            q, k, v = qkv.split(heads, dim=2)
            return q, k, v
        return *prepared(qkv, heads, constants.length, cos, sin, constants.l2_norm), qkv[:, :, 2 * heads :]

    @eager
    def attend(self, x: Tensor, told: Any = None) -> Tensor:
        """From the module's input x (B, n, C) to its attention's output (B, n, C), before the last projection.

        Args:
            x: of one scale.
            told: what the model tells beside it, for `Patch.schedule_of` and `Patch.rotation`.
        """
        layer = self._amskv.of(self)
        patch, scale = layer.patch, layer.constants.scale
        q, k, v = self.project(x, layer, told)
        if patch.observe is not None:
            patch.observe(layer.number, q, k, v, scale)
        cache = patch.ready(told, k)
        if patch.plan is not None and patch.plan.selection is not None and patch.plan.selection.raw_queries:
            cache.prepare(layer.number, x, self.query_weight())
        return patch.attended(cache, layer.number, (q, k, v), scale, told).flatten(2)


def in_generation(module: nn.Module, mask: Any) -> bool:
    """Whether a call is one of a generation; with a mask it is training or teacher forcing, and the model's own.

    A function: whoever kept the patch's forward may call it with a module that is patched no more.
    """
    layer = getattr(module, "_amskv", None)
    return layer is not None and mask is None and layer.patch.caching


class PerStep:
    """What the first layer of a step works out, kept for the others: they bring the very same objects."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Let go of what the last generation brought."""
        self._brought: tuple[Any, ...] = ()
        self._found: Any = None

    def of(self, brought: tuple[Any, ...], work: Callable[[], T]) -> T:
        """`work()`, unless the last call brought the same."""
        same = len(brought) == len(self._brought) and all(
            new is old or (isinstance(new, int | torch.device) and new == old)
            for new, old in zip(brought, self._brought, strict=True)
        )
        if not same:
            self._found, self._brought = work(), brought
        found: T = self._found
        return found


def complex_turns(freqs: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines (n, D / 2) of unit complex numbers of that many elements, whatever leads them."""
    flat = freqs.reshape(-1, freqs.shape[-1])
    return flat.real.float().contiguous(), flat.imag.float().contiguous()


def prepared(
    qkv: Tensor, kv_heads: int, length: Tensor | None, cos: Tensor | None, sin: Tensor | None, l2_norm: bool
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`torch.ops.amskv.prepare_qk`, which knows of one angle per token and has kernels for some head sizes: angles of
    each sequence are given in a row, heads between two sizes in the larger one."""
    batch, n, _, head_dim = qkv.shape
    if head_dim not in HEAD_DIMS:
        more = row_size("head_dim", head_dim) - head_dim  # zeros, which any angle turns into zeros
        cos, sin = (None if each is None else F.pad(each, (0, more // 2)) for each in (cos, sin))
        q, k = prepared(F.pad(qkv, (0, more)), kv_heads, length, cos, sin, l2_norm)
        return q[..., :head_dim], k[..., :head_dim]
    if cos is None or len(cos) == n:
        q, k = torch.ops.amskv.prepare_qk(qkv, kv_heads, length, cos, sin, l2_norm)
        return q, k
    row = qkv.flatten(0, 1)[None]
    q, k = torch.ops.amskv.prepare_qk(row, kv_heads, length, cos, sin, l2_norm)
    return q.view(batch, n, *q.shape[2:]), k.view(batch, n, *k.shape[2:])
