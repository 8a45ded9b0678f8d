"""VAREdit on Infinity: the image to edit comes first, and every map sees it.

In all layers but the first it is a prefix as any other, scale 0 of the cache. The first layer sees it averaged down to
the size of the map at hand, anew at every scale: beside the cache, which holds the maps.
"""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from amskv_kernels.integrations.common import QKV, PagedSelfAttention, in_generation
from amskv_kernels.integrations.infinity import FAMILY as INFINITY
from amskv_kernels.integrations.infinity import InfinityAttention, PatchedInfinity, Told
from amskv_kernels.integrations.modules import stock
from amskv_kernels.models.infinity import Triples
from amskv_kernels.policies.around import Around
from amskv_kernels.schedule import ScaleSchedule


class _Which(NamedTuple):
    first_layer: bool
    source: bool


class _SelfAttention(InfinityAttention):
    def forward(  # type: ignore[override]
        self, x: Tensor, attn_bias_or_two_vector: Any = None, attn_fn: Any = None,
        scale_schedule: Triples | None = None, rope2d_freqs_grid: dict[str, Tensor] | None = None,
        start_layer: bool = False, scale_ind: int = 0, src: bool = True,
    ) -> Tensor:  # fmt: skip
        if not in_generation(self, attn_bias_or_two_vector):
            return stock(self).forward(
                self, x, attn_bias_or_two_vector, attn_fn, scale_schedule, rope2d_freqs_grid, start_layer, scale_ind,
                src,
            )  # fmt: skip
        told = Told(scale_schedule, rope2d_freqs_grid, scale_ind, _Which(start_layer, src))
        return self.proj_drop(self.proj(self.attend(x, told)))


class PatchedVAREdit(PatchedInfinity):
    """A patched VAREdit: see `Patch`."""

    attention: ClassVar[type[PagedSelfAttention]] = _SelfAttention

    def read(self, model: Any, modules: list[Any]) -> None:
        if self._caches.online:
            raise ValueError("online is True; it is for models whose generation begins with a map, not with an image")
        self._source: tuple[Tensor, Tensor] | None = None
        super().read(model, modules)

    def begin(self, enable: bool) -> None:
        """The model says so for every layer before and after each generation."""
        super().begin(enable)
        self._source = None

    def schedule_of(self, told: Told) -> ScaleSchedule:
        """The image in the size of the last map, then the maps."""
        maps = super().schedule_of(told)
        self._caches.around = Around(maps, prefix=1, beside=(0,))
        return ScaleSchedule((maps.sizes[-1], *maps.sizes))

    def begins(self, told: Told) -> int:
        """The image's own places come first in the model's table."""
        assert told.sizes is not None
        if told.more.source:
            return 0
        _, h, w = told.sizes[-1]
        return h * w + super().begins(told)

    def rotation(self, told: Told, x: Tensor) -> Any:
        """The model's own, which all layers of a step share."""
        return super().rotation(told._replace(scale=-1) if told.more.source else told, x)

    def attended(self, cache: Any, layer: int, qkv: QKV, scale: float, told: Told) -> Tensor:
        """The first layer attends to the cache and to the averaged image; each part counts by its lse."""
        if told.more.first_layer != (layer == 0):
            raise RuntimeError(
                f"start_layer is {told.more.first_layer} in layer {layer}; the first layer alone says so"
            )
        if layer or told.more.source:
            if layer == 0:
                self._source = qkv[1].clone(), qkv[2].clone()
            return super().attended(cache, layer, qkv, scale, told)
        assert self._source is not None and told.sizes is not None
        out, lse = cache.attend_with_lse(layer, *qkv, scale)
        k, v = (_averaged(each, told.sizes[-1], told.sizes[told.scale]).to(out.dtype) for each in self._source)
        return _joined(out, lse, *cache.attend_beside(qkv[0], k, v, scale))


def _averaged(x: Tensor, size: tuple[int, int, int], to: tuple[int, int, int]) -> Tensor:
    """(B, n, H, D) of a map of one size, averaged down to that of another."""
    if size == to:
        return x
    batch, _, heads, width = x.shape
    image = x.permute(0, 2, 3, 1).reshape(batch, heads * width, *size[1:])
    small = F.interpolate(image, size=to[1:], mode="area")
    return small.flatten(2).transpose(1, 2).unflatten(2, (heads, width)).contiguous()


def _joined(out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> Tensor:
    """Attention to two sets of keys, (B, n, H, D), from attention to each and its lse (B, H, n)."""
    weight = torch.sigmoid(lse - other_lse).transpose(1, 2)[..., None]  # of the first, in fp32
    return (weight * out + (1 - weight) * other).to(out.dtype)


FAMILY = INFINITY._replace(
    name="VAREdit",
    takes=(*INFINITY.takes[:-1], "start_layer", "scale_ind", "src"),
    patch=PatchedVAREdit,
)
