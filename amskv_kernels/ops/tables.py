"""Slot tables held against the pool, row by row, on the host: for a GPU's tables this waits for the device."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from amskv_kernels.arguments import shown
from amskv_kernels.planning.layout import ROWS_BITS, ROWS_MASK

Table = npt.NDArray[np.int64]


def check_row_starts(row_starts: Tensor, rows: int) -> Table:
    """(N,) rows of every sequence; a ValueError where they do not cover all the `rows` of q in order."""
    starts = _on_host(row_starts)
    if starts[0] != 0 or starts[-1] != rows or (np.diff(starts) < 0).any():
        raise ValueError(f"row_starts is {shown(starts.tolist())}; it must ascend from 0 to the {rows} rows of q")
    return np.diff(starts)


def check_tables(pages: Tensor, arena: Tensor, read_slots: Tensor, write_slots: Tensor, n: int | Table) -> None:
    """Raise ValueError for slots that point outside the pool, overlap, or read what the same call writes.

    `n` is one number or one per sequence, (B,).
    Runs for every raw call on the CPU, 30 µs, and elsewhere in debug mode only.
    """
    num_pages, _, page_size, _ = pages.shape
    first, rows = _on_host(arena), np.broadcast_to(np.reshape(n, (-1, 1)), (len(arena), 1))
    read_page, read_rows = _named("read_slots", first, read_slots, num_pages, page_size)
    write_page, write_rows = _named("write_slots", first, write_slots, num_pages, page_size)
    if write_rows.size == 0:
        return
    total, lead = write_rows.sum(-1), (write_rows > 0).argmax(-1)[..., None]
    first_rows, first_page = (np.take_along_axis(x, lead, -1)[..., 0] for x in (write_rows, write_page))
    stores, kept = total > 0, total - rows  # `kept`: rows that the first page already holds
    wrong = stores & ((kept < 0) | (kept >= first_rows))
    if wrong.any():
        raise ValueError(
            f"write_slots name {total[wrong][0]} rows for the {(n := (total - kept)[wrong][0])} rows of k; they must "
            f"name {n}, plus the rows that the first page already holds"
        )
    written = write_page[write_rows > 0]
    if np.unique(written).size != written.size:
        raise ValueError("write_slots name one page twice; every page written must be another one")
    if read_rows.size == 0:
        return
    readable = np.full(num_pages, page_size)
    readable[written] = 0
    readable[first_page[stores]] = kept[stores]
    clash = (read_rows > 0) & (read_rows > readable[read_page])
    if clash.any():
        raise ValueError(
            f"page {read_page[clash][0]} is both read and written in one call; read_slots and write_slots must "
            f"not name the same rows"
        )


def check_keep(
    pages: Tensor, arena: Tensor, src_slots: Tensor, keep: Tensor, dst_slots: Tensor, n: int
) -> None:  # fmt: skip
    """Raise ValueError for tables of `compact` that point outside, overlap, or keep rows that are not there."""
    num_pages, _, page_size, _ = pages.shape
    first, keys = _on_host(arena), _on_host(keep)
    src_page, src_rows = _named("src_slots", first, src_slots, num_pages, page_size)
    dst_page, dst_rows = _named("dst_slots", first, dst_slots, num_pages, page_size)
    named = dst_rows.sum(-1)
    if (named != keys.shape[2]).any():
        wrong = named[named != keys.shape[2]][0]
        raise ValueError(f"dst_slots name {wrong} rows; they must name the {keys.shape[2]} of keep")
    written = dst_page[dst_rows > 0]
    if np.unique(written).size != written.size:
        raise ValueError("dst_slots name one page twice; every page written must be another one")
    clash = np.isin(written, src_page[src_rows > 0])
    if clash.any():
        raise ValueError(f"page {written[clash][0]} is in src_slots and in dst_slots; it must not be in both")
    there = (np.arange(page_size) < src_rows[..., None]).reshape(*src_rows.shape[:2], src_rows.shape[2] * page_size)
    there = np.concatenate([there, np.ones((*there.shape[:2], n), dtype=bool)], axis=2)
    outside = (keys < 0) | (keys >= there.shape[2])
    if outside.any():
        raise ValueError(f"keep holds {keys[outside][0]}; the keys have indices 0 … {there.shape[2] - 1}")
    absent = ~np.take_along_axis(there, keys, 2)
    if absent.any():
        raise ValueError(f"keep holds {keys[absent][0]}, a row that src_slots do not name")
    if (np.diff(keys, axis=-1) <= 0).any():
        raise ValueError("keep does not ascend; its indices must ascend, each once")


def _on_host(table: Tensor) -> npt.NDArray[Any]:
    return table.cpu().numpy().astype(np.int64, copy=False)


def _named(
    name: str, first: Table, slots: Tensor, num_pages: int, page_size: int
) -> tuple[Table, Table]:  # fmt: skip
    """(B, Hkv, S) pages and rows that the slots name; pages of empty slots read 0."""
    entries = _on_host(slots)
    rows = entries & ROWS_MASK
    bad = (entries < 0) | (rows > page_size)
    if bad.any():
        entry = int(entries[bad][0])
        raise ValueError(
            f"{name} hold {entry} (page_offset {entry >> ROWS_BITS}, {entry & ROWS_MASK} rows); an entry "
            f"must be page_offset << {ROWS_BITS} | rows with at most page_size = {page_size} rows"
        )
    page = first[:, :, None] + (entries >> ROWS_BITS)
    rows = np.broadcast_to(rows, page.shape)
    outside = (rows > 0) & ((page < 0) | (page >= num_pages))
    if outside.any():
        raise ValueError(f"{name} point to page {page[outside][0]}; the pool has pages 0 … {num_pages - 1}")
    return np.where(rows > 0, page, 0), rows
