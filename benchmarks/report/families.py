"""What the docs say of the families that can be patched: checks on their public code, and InfinityStar's bytes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from tabulate import tabulate

from amskv_kernels.models.infinitystar import RESOLUTIONS, references, video_schedule
from amskv_kernels.planning.plan import CachePlan
from amskv_kernels.policies import Full, Visible
from amskv_kernels.policies.around import Around, placed
from amskv_kernels.schedule import ScaleSchedule

REPORT = Path(__file__).parents[2] / "tests" / "integrations" / "families.json"
GIB = 2**30
# InfinityStar 8B: layers, query heads, KV heads, head size; K and V of two bytes each; guidance doubles the sequences.
LAYERS, HEADS, KV_HEADS, HEAD_DIM, PAIR, SEQUENCES = 36, 32, 8, 128, 4, 2
TEXT = 512  # tokens, the most that its text encoder gives
REPORTED = {"480p": 42, "720p": 65}  # GB of the whole process, weights included: FoundationVision/InfinityStar issue 12


def stock_tokens(maps: ScaleSchedule, seen: Sequence[Sequence[int]], text: int) -> list[tuple[int, int]]:
    """What stock code holds in a layer at each map, the map itself included, and what it concatenates to attend.

    It keeps every map until a later one begins that is beyond the last which looks at it, and the text to the end.
    """
    tokens = maps.tokens
    users = [[later for later, each in enumerate(seen) if scale in each] for scale in range(len(maps))]
    last_use = [max(each, default=-1) for each in users]
    found = []
    for scale, own in enumerate(tokens):
        held = sum(tokens[each] for each in range(scale) if last_use[each] >= scale)
        read = sum(tokens[each] for each in seen[scale])
        found.append((text + held + own, text + read + own))
    return found


def videos() -> str:
    """InfinityStar's cache at its published sizes, ours beside stock's."""
    token = LAYERS * KV_HEADS * HEAD_DIM * PAIR * SEQUENCES
    wide = (KV_HEADS + HEADS) * HEAD_DIM * PAIR * SEQUENCES  # a token concatenated, then repeated for every query head
    rows = []
    for resolution in RESOLUTIONS:
        for seconds in (5, 10):
            maps = video_schedule(resolution, seconds)
            seen = references(maps)
            stock = stock_tokens(maps, seen, TEXT)
            whole = ScaleSchedule([(1, TEXT), *zip(maps.frames, *zip(*maps.sizes, strict=True), strict=True)])
            rule = Visible(tuple(map(tuple, seen)))
            plan = CachePlan.build(whole, placed(Full(), Around(maps, rule=rule), whole), LAYERS)
            cache = max(held for held, _ in stock) * token
            peak = max(held * token + read * wide for held, read in stock)
            pool, flight = plan.allocated_tokens * token // LAYERS, max(maps.tokens) * token // LAYERS
            rows.append(
                (
                    resolution, f"{seconds} s", f"{len(maps)}", f"{max(maps.tokens):,}", f"{cache / GIB:.2f}",
                    f"{peak / GIB:.2f}", f"{pool / GIB:.2f}", f"{(pool + flight) / GIB:.2f}",
                    f"{1 - (pool + flight) / peak:.0%}", f"{REPORTED[resolution]} GB",
                )
            )  # fmt: skip
    headers = (
        "", "video", "maps", "largest, tokens", "stock cache, GiB", "and its copies", "our pool, GiB",
        "and the map in flight", "saved", "users report, in all",
    )  # fmt: skip
    table = tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True, colalign=("left", *["right"] * 9))
    return (
        f"{table}\n\nInfinityStar 8B: {LAYERS} layers, {HEADS} query heads on {KV_HEADS} KV heads of {HEAD_DIM}, bf16, "
        f"one video with guidance, a text of {TEXT} tokens; every figure follows from schedule and rule, at the step "
        f"where it is largest. Stock's copies are those of one layer: it concatenates what a map looks at and repeats "
        f"it for {HEADS // KV_HEADS} query heads each. What users report is the whole process, weights included "
        f"(FoundationVision/InfinityStar, issue 12)."
    )


def checked() -> str:
    """The committed checks on clones of the public code."""
    if not REPORT.exists():
        return "*Not run yet: no result is committed.*"
    result = json.loads(REPORT.read_text(encoding="utf-8"))
    rows = [
        (
            name, row["full"], row["policies"], row["undo"], row["copies"], f"{row['graphs']}",
            f"{row['largest_difference']:.1e}", row["commit"],
        )
        for name, row in result["families"].items()
    ]  # fmt: skip
    headers = (
        "family", "Full() is stock", "policies are masked truth", "undo", "copies", "graphs", "largest difference",
        "of commit",
    )  # fmt: skip
    table = tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True)
    return f"{table}\n\n{result['note']}"
