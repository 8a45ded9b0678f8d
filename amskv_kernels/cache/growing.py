"""A pool whose pages are handed out as a generation goes; it grows when it must."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from amskv_kernels import ops  # noqa: F401 - registers torch.ops.amskv
from amskv_kernels.cache.rows import HeadRows
from amskv_kernels.planning.layout import MOST_PAGES, MOST_POOL_PAGES
from amskv_kernels.planning.pages import NO_SLOTS, Pages, choose_page_size, page_slots
from amskv_kernels.planning.tables import Slots

Extent = tuple[Slots, int]  # pages, and rows stored back to back in them


class GrowingPool:
    """Pages of every sequence and head alike, taken and given back by number.

    Args:
        batch: sequences B.
        kv_heads: Hkv.
        page_size: rows of a page.
        rows: how heads lie in the pages.
        dtype: of the pages.
        device: where they lie.
    """

    def __init__(
        self, batch: int, kv_heads: int, page_size: int, rows: HeadRows, dtype: torch.dtype, device: torch.device | str
    ) -> None:  # fmt: skip
        self.page_size, self._rows = page_size, rows
        with torch.inference_mode(False):  # usable inside inference mode and outside
            self._pool = torch.zeros(batch * kv_heads, 0, 2, page_size, rows.size, dtype=dtype, device=device)
            self._scales = (
                self._pool.new_zeros(self._pool.shape[:4], dtype=torch.float32) if dtype == torch.int8 else None
            )
        self._arena = torch.zeros(batch, kv_heads, dtype=torch.int32, device=device)
        self.reset()

    def reset(self) -> None:
        """Every page is free again, and every sequence goes on."""
        self._free, self._batch = Pages(), len(self._arena)

    def keep_first(self, batch: int) -> None:
        """Go on with the first sequences alone, until `reset`."""
        self._batch = batch

    @property
    def nbytes(self) -> int:
        """Bytes of the pool so far, its scales included."""
        return self._pool.nbytes + (0 if self._scales is None else self._scales.nbytes)

    def __str__(self) -> str:
        dtype, device = self._pool.dtype, self._pool.device
        return f"batch={self._batch}, {self._rows}, {dtype} on {device}: {self.nbytes} bytes so far"

    def take(self, rows: int) -> Slots:
        """Pages for so many rows; the pool grows first where it must, so that one that cannot loses none.

        Raises:
            ValueError: more pages than a slot or the pool can name.
        """
        number = -(-rows // self.page_size)
        arenas, pages = self._pool.shape[:2]
        needed = self._free.count_with(number)
        if needed > pages:
            check_page_numbers(needed, self.page_size, arenas)
            room = max(needed, min(2 * pages, MOST_PAGES, MOST_POOL_PAGES // arenas))
            pool, scales = _grown(self._pool, room), None if self._scales is None else _grown(self._scales, room)
            first = torch.arange(arenas, dtype=torch.int32, device=pool.device) * room
            self._pool, self._scales, self._arena = pool, scales, first.view(self._arena.shape)
        return self._free.take(number)

    def give_back(self, pages: Slots) -> None:
        """Free pages for others."""
        self._free.give_back(pages)

    def attn(
        self, q: Tensor, k: Tensor, v: Tensor, read: Iterable[Extent], write: Iterable[Extent], softmax_scale: float
    ) -> Tensor:  # fmt: skip
        """Attention to what lies in `read` and to k, v, which go to `write`: see `torch.ops.amskv.attn`."""
        pages = self._pool.flatten(0, 1)
        scales = None if self._scales is None else self._scales.flatten(0, 1)
        tables = (self._arena[: self._batch], self._table(read), self._table(write))
        out, _ = torch.ops.amskv.attn(*self._rows.pad(q, k, v), pages, *tables, softmax_scale, scales)
        return self._rows.cut(out)

    def _table(self, extents: Iterable[Extent]) -> Tensor:
        tables = [page_slots(pages, rows, self.page_size) for pages, rows in extents]
        flat = np.concatenate([NO_SLOTS, *tables])
        return torch.from_numpy(flat).to(self._pool.device).view(1, 1, -1)


def check_page_numbers(count: int, page_size: int, arenas: int) -> None:
    """Raise ValueError for an arena of so many pages, or a pool of so many arenas, that slots cannot name them."""
    choose_page_size({page_size: count}, count * page_size)
    if arenas * count > MOST_POOL_PAGES:
        raise ValueError(f"the pool may need {arenas * count} pages; page numbers are 32-bit")


def _grown(pool: Tensor, pages: int) -> Tensor:
    """A larger pool that begins with what this one (arenas, pages, …) holds."""
    with torch.inference_mode(False):
        grown = pool.new_zeros(pool.shape[0], pages, *pool.shape[2:])
    grown[:, : pool.shape[1]] = pool
    return grown
