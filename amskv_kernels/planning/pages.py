"""Pages of an arena: handing them out, runs of rows in them, and their slot entries."""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from amskv_kernels.planning.layout import MOST_PAGES, PAGE_SIZES, ROWS_BITS, ROWS_MASK
from amskv_kernels.planning.tables import Extent, Slots, sealed

# Larger pages mean fewer, longer copies (the Hopper kernel loads a tile from pages of 64 rows in half the clocks that
# it takes from pages of 16), but more rounding: take the largest page whose pool is at most 2 % above the smallest pool
# any page size gives, and at most 3 % above the tokens retained.
PAGE_SLACK = 0.02
MOST_ROUNDING = 0.03

NO_SLOTS: Slots = sealed(np.empty(0, dtype=np.int32))


def page_slots(pages: Slots, rows: int, page_size: int) -> Slots:
    """Slot entries of `rows` rows stored back to back in `pages`: all full but the last."""
    table = (pages << ROWS_BITS) + np.int32(page_size)
    if table.size:
        table[-1] -= len(pages) * page_size - rows
    return table


@dataclass
class Run:
    """Entries of one layer that die together, stored back to back."""

    pages: Slots
    rows: int = 0

    def slots(self, page_size: int, first_page: int = 0) -> Slots:
        """The run's filled pages from `first_page` on, as slot entries."""
        return page_slots(self.pages[first_page:], self.rows - first_page * page_size, page_size)


class Pages:
    """Free pages of an arena, lowest first, so that a scale's pages tend to lie side by side."""

    def __init__(self) -> None:
        self.count = 0
        self.free: list[int] = []

    def take(self, number: int) -> Slots:
        """`number` pages, new ones where none is free."""
        taken = [heapq.heappop(self.free) for _ in range(min(number, len(self.free)))]
        fresh = range(self.count, self.count + number - len(taken))
        self.count += len(fresh)
        return np.array([*taken, *fresh], dtype=np.int32)

    def count_with(self, number: int) -> int:
        """Pages of the arena once `number` more are taken."""
        return self.count + max(0, number - len(self.free))

    def give_back(self, pages: Slots) -> None:
        """Free `pages` for others."""
        for page in pages.tolist():
            heapq.heappush(self.free, page)

    @property
    def live(self) -> int:
        """Pages taken and not given back."""
        return self.count - len(self.free)


def store(run: Run, count: int, page_size: int, pages: Pages) -> tuple[Slots, tuple[Extent, ...]]:
    """Add `count` rows to the run: its write slots, and where the rows lie."""
    first_page, first_row = divmod(run.rows, page_size)
    run.rows += count
    run.pages = np.concatenate([run.pages, pages.take(-(-run.rows // page_size) - len(run.pages))])
    slots = run.slots(page_size, first_page)
    extents = []
    for slot in slots.tolist():
        end = slot & ROWS_MASK
        extents.append(Extent(slot >> ROWS_BITS, first_row, end - first_row))
        first_row = 0
    return slots, tuple(extents)


def choose_page_size(pages: Mapping[int, int], tokens: int) -> int:
    """The page size to take of those asked for, given the pages that an arena needs with each, and the tokens
    it retains.

    Raises:
        ValueError: more pages than a slot can name, whichever the size.
    """
    fitting = {size: count for size, count in pages.items() if count <= MOST_PAGES}
    if not fitting:
        size = max(pages)
        raise ValueError(
            f"the cache needs {pages[size]} pages of {size} rows in an arena; a slot can name at most {MOST_PAGES}"
            + (", take a larger page_size" if size < PAGE_SIZES[-1] else "")
        )
    rows = {size: count * size for size, count in fitting.items()}
    least = min(rows.values())
    most = max(least, min((1 + PAGE_SLACK) * least, (1 + MOST_ROUNDING) * tokens))
    return max(size for size, count in rows.items() if count <= most)
