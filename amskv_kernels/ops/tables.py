"""Slot tables held against the pool, row by row: reads them on the host, so it waits for the device."""

from __future__ import annotations

import torch
from torch import Tensor

from amskv_kernels.planning.layout import ROWS_BITS, ROWS_MASK


def check_tables(pages: Tensor, arena: Tensor, read_slots: Tensor, write_slots: Tensor, n: int) -> None:
    """Raise ValueError for slots that point outside the pool, overlap, or read what the same call writes.

    Reads the tables on the host: on a GPU this waits for the device, so there it runs in debug mode only.
    """
    num_pages, _, page_size, _ = pages.shape
    read_page, read_rows = _named("read_slots", arena, read_slots, num_pages, page_size)
    write_page, write_rows = _named("write_slots", arena, write_slots, num_pages, page_size)
    if write_rows.numel() == 0:
        return
    total, lead = write_rows.sum(-1), (write_rows > 0).int().argmax(-1, keepdim=True)
    first_rows, first_page = write_rows.gather(-1, lead)[..., 0], write_page.gather(-1, lead)[..., 0]
    stores, kept = total > 0, total - n  # `kept`: rows that the first page already holds
    wrong = stores & ((kept < 0) | (kept >= first_rows))
    if wrong.any():
        raise ValueError(
            f"write_slots name {int(total[wrong][0])} rows for the {n} rows of k; they must name {n}, plus the rows "
            f"that the first page already holds"
        )
    written = write_page[write_rows > 0]
    if written.unique().numel() != written.numel():
        raise ValueError("write_slots name one page twice; every page written must be another one")
    readable = torch.full((num_pages,), page_size, dtype=torch.int64, device=pages.device)
    readable[written] = 0
    readable[first_page[stores]] = kept[stores]
    clash = read_rows > readable[read_page]
    if clash.any():
        raise ValueError(
            f"page {int(read_page[clash][0])} is both read and written in one call; read_slots and write_slots must "
            f"not name the same rows"
        )


def check_keep(
    pages: Tensor, arena: Tensor, src_slots: Tensor, keep: Tensor, dst_slots: Tensor, n: int
) -> None:  # fmt: skip
    """Raise ValueError for tables of `compact` that point outside, overlap, or keep rows that are not there.

    Reads them on the host, as `check_tables`.
    """
    num_pages, _, page_size, _ = pages.shape
    src_page, src_rows = _named("src_slots", arena, src_slots, num_pages, page_size)
    dst_page, dst_rows = _named("dst_slots", arena, dst_slots, num_pages, page_size)
    wrong = dst_rows.sum(-1) != keep.shape[2]
    if wrong.any():
        raise ValueError(
            f"dst_slots name {int(dst_rows.sum(-1)[wrong][0])} rows; they must name the {keep.shape[2]} of keep"
        )
    written = dst_page[dst_rows > 0]
    if written.unique().numel() != written.numel():
        raise ValueError("dst_slots name one page twice; every page written must be another one")
    clash = torch.isin(written, src_page[src_rows > 0])
    if clash.any():
        raise ValueError(f"page {int(written[clash][0])} is in src_slots and in dst_slots; it must not be in both")
    there = (torch.arange(page_size, device=pages.device) < src_rows[..., None]).flatten(2)
    there = torch.cat([there, there.new_ones(*there.shape[:2], n)], dim=2)
    inside = (keep >= 0) & (keep < there.shape[2])
    if not inside.all():
        raise ValueError(f"keep holds {int(keep[~inside][0])}; the keys have indices 0 … {there.shape[2] - 1}")
    absent = ~there.gather(2, keep.long())
    if absent.any():
        raise ValueError(f"keep holds {int(keep[absent][0])}, a row that src_slots do not name")
    if (keep.diff(dim=-1) <= 0).any():
        raise ValueError("keep does not ascend; its indices must ascend, each once")


def _named(
    name: str, arena: Tensor, slots: Tensor, num_pages: int, page_size: int
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(B, Hkv, S) pages and rows that the slots name; pages of empty slots read 0."""
    rows = (slots & ROWS_MASK).long()
    if (slots < 0).any() or (rows > page_size).any():
        bad = slots[(slots < 0) | (rows > page_size)][0]
        raise ValueError(
            f"{name} hold {int(bad)} (page_offset {int(bad) >> ROWS_BITS}, {int(bad) & ROWS_MASK} rows); an entry "
            f"must be page_offset << {ROWS_BITS} | rows with at most page_size = {page_size} rows"
        )
    page = arena.long()[:, :, None] + (slots >> ROWS_BITS)
    rows = rows.expand_as(page)
    outside = (rows > 0) & ((page < 0) | (page >= num_pages))
    if outside.any():
        raise ValueError(f"{name} point to page {int(page[outside][0])}; the pool has pages 0 … {num_pages - 1}")
    return torch.where(rows > 0, page, 0), rows
