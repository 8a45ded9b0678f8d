"""The scan over time of a token policy: a layer's tokens are one run; what is chosen of them moves to a fresh one."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from amskv_kernels.arguments import instance_of, shown, whole_number
from amskv_kernels.planning.pages import NO_SLOTS, Pages, Run, store
from amskv_kernels.planning.tables import Compaction, PageTables, Slots
from amskv_kernels.policies.base import Selection, TokenPolicy
from amskv_kernels.schedule import ScaleSchedule

Held = tuple[tuple[int, ...], ...]


def held_tokens(policy: TokenPolicy, schedule: ScaleSchedule, num_layers: int) -> Held:
    """What `policy.held` gives, checked.

    Raises:
        TypeError: the policy's selection is no Selection.
        ValueError: it is no (K, L) table of whole numbers, or asks for tokens that a layer does not have.
    """
    instance_of(f"{type(policy).__name__}.selection", policy.selection, Selection)
    name, found = f"{type(policy).__name__}.held", policy.held(schedule, num_layers)
    steps = len(schedule)
    try:
        rows = tuple(tuple(row) for row in found)
    except TypeError as error:
        raise ValueError(f"{name} gives {shown(found)}; it must be ({steps}, {num_layers}) numbers") from error
    if len(rows) != steps or any(len(row) != num_layers for row in rows):
        widths = " and ".join(str(width) for width in sorted({len(row) for row in rows}))
        raise ValueError(
            f"{name} gives {len(rows)} rows of {widths} numbers; it must give {steps}, one per step, of {num_layers}, "
            f"one per layer"
        )
    for step, row in enumerate(rows):
        for layer, tokens in enumerate(row):
            before = rows[step - 1][layer] if step else 0
            brought = schedule.tokens[step - 1] if step else 0
            if whole_number(f"{name} of layer {layer} at step {step}", tokens, 0) > before + brought:
                raise ValueError(
                    f"{type(policy).__name__} wants {tokens} tokens in layer {layer} after step {step - 1}; it holds "
                    f"{before} and the step brings {brought}"
                )
    return tuple(tuple(int(tokens) for tokens in row) for row in rows)


def count_token_pages(schedule: ScaleSchedule, held: Held, page_size: int) -> int:
    """The most pages live during any call, by counting alone; arguments as for `scan_tokens`."""
    return max(_live_pages(schedule, held, page_size))


def _live_pages(schedule: ScaleSchedule, held: Held, page_size: int) -> Iterator[int]:
    live = 0
    for count, now, later in zip(schedule.tokens, held, (*held[1:], (0,) * len(held[0])), strict=True):
        for rows, kept in zip(now, later, strict=True):
            old, new = -(-rows // page_size), -(-kept // page_size)
            grows = kept == rows + count
            yield live + new - (old if grows else 0)
            live += new - old


def scan_tokens(schedule: ScaleSchedule, policy: TokenPolicy, held: Held, page_size: int) -> PageTables:
    """Hand out pages call by call.

    Args:
        schedule: the model's schedule.
        policy: how tokens are chosen.
        held: (K, L), see `held_tokens`.
        page_size: rows of a page.

    Raises:
        ValueError: a budget without room for what is always kept.
    """
    steps, num_layers = len(schedule), len(held[0])
    pages, runs = Pages(), [Run(NO_SLOTS) for _ in range(num_layers)]
    read: list[tuple[Slots, ...]] = []
    write: list[tuple[Slots, ...]] = []
    compactions: dict[tuple[int, int], Compaction] = {}
    live, live_pages = np.zeros((2, steps, num_layers), dtype=np.int64)
    retained = np.zeros(steps, dtype=np.int64)
    for step, count in enumerate(schedule.tokens):
        read.append(tuple(run.slots(page_size) for run in runs))
        writes = []
        for layer, run in enumerate(runs):
            kept = held[step + 1][layer] if step + 1 < steps else 0
            writes.append(NO_SLOTS)
            old = run
            if kept == run.rows + count:
                writes[-1], _ = store(run, count, page_size, pages)
            else:
                runs[layer] = Run(pages.take(-(-kept // page_size)), kept)
                if kept:
                    slots = runs[layer].slots(page_size)
                    compactions[step, layer] = _compaction(schedule, policy.selection, step, run.rows, kept, slots)
            # Until a compaction is done its source is still there.
            both = sum(each.rows for each in runs) + (old.rows if runs[layer] is not old else 0)
            live[step, layer], live_pages[step, layer] = both, pages.live
            if runs[layer] is not old:
                pages.give_back(old.pages)
        write.append(tuple(writes))
        retained[step] = sum(run.rows for run in runs)
    return PageTables(
        pages=pages.count, retained=retained, live=live, live_pages=live_pages,
        read=tuple(read), write=tuple(write), compactions=compactions,
    )  # fmt: skip


def _compaction(
    schedule: ScaleSchedule, selection: Selection, step: int, held: int, kept: int, slots: Slots
) -> Compaction:  # fmt: skip
    size = schedule.sizes[step]
    return Compaction(held, kept, selection.observing(size), selection.always_kept(size, held, kept), slots)
