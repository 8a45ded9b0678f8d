"""What the patches share."""

from __future__ import annotations

from types import TracebackType
from typing import TypeVar

from torch import Tensor

from amskv_kernels.cache.paged import PagedKVCache

P = TypeVar("P", bound="Patch")


class Patch:
    """A patch in force; leaving a `with` block undoes it."""

    def undo(self) -> None:
        """Put the model's own attention back and free the cache; doing it twice does no harm."""
        raise NotImplementedError

    def __enter__(self: P) -> P:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:  # fmt: skip
        self.undo()


def require(owner: object, name: str, attributes: tuple[str, ...], whose: str) -> None:
    """Raise TypeError where `owner` lacks what a patch needs of `whose` public class."""
    missing = [attribute for attribute in attributes if not hasattr(owner, attribute)]
    if missing:
        raise TypeError(
            f"{name} is a {type(owner).__name__} without {', '.join(missing)}; it must be the public {whose}'s"
        )


def fits(cache: PagedKVCache, k: Tensor) -> bool:
    """Whether a cache made for an earlier generation takes the keys (B, n, Hkv, D) of this one."""
    same_arena = tuple(cache.arena.shape) == (k.shape[0], k.shape[2])
    return same_arena and cache.pages.dtype == k.dtype and cache.pages.device == k.device
