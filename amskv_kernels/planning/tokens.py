"""The scan over time of a token policy: a layer's tokens are one run; what is chosen of them moves to a fresh one."""

from __future__ import annotations

import numpy as np

from amskv_kernels.planning.layout import PAGE_SIZES
from amskv_kernels.planning.pages import NO_SLOTS, Pages, Run, Slots, largest_page_size, store
from amskv_kernels.planning.plan import CachePlan, Compaction
from amskv_kernels.policies.base import TokenPolicy
from amskv_kernels.schedule import ScaleSchedule


def plan_tokens(
    schedule: ScaleSchedule, policy: TokenPolicy, num_layers: int, page_size: int | None = None
) -> CachePlan:  # fmt: skip
    """The plan of a token policy, see `CachePlan.build`.

    Raises:
        ValueError: the policy asks for tokens that a layer does not have, or has no room for what is always kept.
    """
    held = policy.held(schedule, num_layers)
    if page_size is not None:
        return _scan_tokens(schedule, policy, held, page_size)
    plans = {size: _scan_tokens(schedule, policy, held, size) for size in PAGE_SIZES}
    return plans[largest_page_size({size: plan.allocated_tokens for size, plan in plans.items()})]


def _scan_tokens(
    schedule: ScaleSchedule, policy: TokenPolicy, held: tuple[tuple[int, ...], ...], page_size: int
) -> CachePlan:  # fmt: skip
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
                    compactions[step, layer] = _compaction(schedule, policy, step, layer, run.rows, kept, slots)
            # Until a compaction is done its source is still there.
            both = sum(each.rows for each in runs) + (old.rows if runs[layer] is not old else 0)
            live[step, layer], live_pages[step, layer] = both, pages.live
            if runs[layer] is not old:
                pages.give_back(old.pages)
        write.append(tuple(writes))
        retained[step] = sum(run.rows for run in runs)
    lossless = all(row == (offset,) * num_layers for row, offset in zip(held, schedule.offsets, strict=True))
    return CachePlan(
        schedule, num_layers, page_size, pages.count, retained, live, live_pages, tuple(read), tuple(write),
        {}, np.empty((0, steps), dtype=np.int64), 1, policy.selection, lossless, compactions,
    )  # fmt: skip


def _compaction(
    schedule: ScaleSchedule, policy: TokenPolicy, step: int, layer: int, held: int, kept: int, slots: Slots
) -> Compaction:  # fmt: skip
    size, selection = schedule.sizes[step], policy.selection
    if kept > held + size[0] * size[1]:
        raise ValueError(
            f"{type(policy).__name__} wants {kept} tokens in layer {layer} after step {step}; it holds {held} and "
            f"the step brings {size[0] * size[1]}"
        )
    return Compaction(held, kept, selection.observing(size), selection.always_kept(size, held, kept), slots)
