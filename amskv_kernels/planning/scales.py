"""The scan over time that gives whole scales their pages: a linear scan of register allocation."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from amskv_kernels.planning.layout import ROWS_MASK
from amskv_kernels.planning.pages import NO_SLOTS, Pages, Run, store
from amskv_kernels.planning.tables import Extent, PageTables, Slots
from amskv_kernels.schedule import ScaleSchedule


def retained_by_scales(schedule: ScaleSchedule, last_read: npt.NDArray[np.int64]) -> int:
    """The most tokens held from one step to the next."""
    tokens = np.asarray(schedule.tokens)
    return max(int(((last_read[:, : step + 1] > step) * tokens[: step + 1]).sum()) for step in range(len(tokens)))


def count_scale_pages(
    schedule: ScaleSchedule, last_read: npt.NDArray[np.int64], page_size: int, heads: int
) -> int:  # fmt: skip
    """The most pages live during any call, by counting alone; arguments as for `scan_scales`."""
    return max(_live_pages(schedule, last_read, page_size, heads))


def _live_pages(
    schedule: ScaleSchedule, last_read: npt.NDArray[np.int64], page_size: int, heads: int
) -> Iterator[int]:  # fmt: skip
    """Pages live during each call, by counting alone."""
    tokens = schedule.tokens
    runs: list[dict[int, int]] = [{} for _ in last_read]
    deaths = last_read.tolist()
    live = freed = 0
    for step, count in enumerate(tokens):
        for row, rows in enumerate(runs):
            dies = deaths[row][step]
            if dies >= 0:
                before = rows.get(dies, 0)
                rows[dies] = before + count
                live += -(-(before + count) // page_size) - -(-before // page_size)
            freed += -(-rows.pop(step, 0) // page_size)
            if (row + 1) % heads == 0:
                yield live
                live, freed = live - freed, 0


def scan_scales(
    schedule: ScaleSchedule, last_read: npt.NDArray[np.int64], page_size: int, heads: int
) -> PageTables:  # fmt: skip
    """Hand out pages call by call. A call is all heads of a layer: what one of them frees, only the next call takes.

    Args:
        schedule: the model's schedule.
        last_read: (L · heads, K), see `lifetimes`.
        page_size: rows of a page.
        heads: how many heads of a layer are planned on their own.
    """
    steps, num_layers = len(schedule), len(last_read) // heads
    pages = Pages()
    runs: list[dict[int, Run]] = [{} for _ in last_read]
    read: list[tuple[Slots, ...]] = []
    write: list[tuple[Slots, ...]] = []
    extents: dict[tuple[int, int], tuple[Extent, ...]] = {}
    live, live_pages = np.zeros((2, steps, num_layers), dtype=np.int64)
    retained = np.zeros(steps, dtype=np.int64)
    tokens_live = 0
    deaths = last_read.tolist()
    for step, count in enumerate(schedule.tokens):
        reads, writes, dead = [], [], []
        for row, held in enumerate(runs):
            reads.append(_full_first([run.slots(page_size) for run in held.values()], page_size) if held else NO_SLOTS)
            dies = deaths[row][step]
            if dies < 0:
                writes.append(NO_SLOTS)
            else:
                run = held.setdefault(dies, Run(NO_SLOTS))
                slots, extents[row, step] = store(run, count, page_size, pages)
                writes.append(slots)
                tokens_live += count
            if step in held:
                dead.append(held.pop(step))
            if (row + 1) % heads == 0:
                layer = row // heads
                live[step, layer], live_pages[step, layer] = tokens_live, pages.live
                tokens_live -= sum(run.rows for run in dead)
                for run in dead:
                    pages.give_back(run.pages)
                dead.clear()
        read.append(_by_layer(reads, heads))
        write.append(_by_layer(writes, heads))
        retained[step] = tokens_live
    return PageTables(
        pages=pages.count, retained=retained, live=live, live_pages=live_pages,
        read=tuple(read), write=tuple(write), extents=extents,
    )  # fmt: skip


def _full_first(tables: list[Slots], page_size: int) -> Slots:
    """One table, full pages before partial ones: kernels need no mask up to the first that is not full."""
    table = np.concatenate(tables)
    full = (table & ROWS_MASK) == page_size
    return np.concatenate([table[full], table[~full]])


def _by_layer(tables: list[Slots], heads: int) -> tuple[Slots, ...]:
    """One table per layer: those of its heads as rows, the shorter ones padded with empty slots."""
    if heads == 1:
        return tuple(tables)
    found = []
    for first in range(0, len(tables), heads):
        own = tables[first : first + heads]
        table = np.zeros((heads, max(len(each) for each in own)), dtype=np.int32)
        for row, each in zip(table, own, strict=True):
            row[: len(each)] = each
        found.append(table)
    return tuple(found)
