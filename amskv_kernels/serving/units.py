"""What a plan asks of the pool step by step, and its tables once pages have been handed out.

A plan's tables name *logical* pages, 0 … plan.pages − 1. In serving every sequence has a map from logical pages to
*units* of a pool that all sequences share. Where a plan's heads are alike, a unit is one page of every KV head, else
a page. A sequence takes a unit when a step first touches the page and gives it back after the step that no later one
carries it over; since the plan is known, so is the number of units it holds at every step.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from amskv_kernels.arguments import instance_of
from amskv_kernels.planning.layout import ROWS_BITS, ROWS_MASK
from amskv_kernels.planning.plan import CachePlan
from amskv_kernels.planning.tables import Slots

Pages = npt.NDArray[np.int32]


@dataclass(frozen=True, eq=False)
class StepUnits:
    """One step of a plan.

    Attributes:
        tokens: n of the step's map.
        fresh: logical pages that are taken before it, ascending.
        carried: those held from the step before.
        released: those given back after it.
        read: (L, heads, S) slots of the history, by logical page, padded with 0.
        write: (L, heads, S2) slots that take the current map.
    """

    tokens: int
    fresh: Pages
    carried: Pages
    released: Pages
    read: Slots
    write: Slots

    @property
    def held(self) -> int:
        """Units that a sequence holds during the step."""
        return len(self.fresh) + len(self.carried)


class PlanUnits:
    """Every step of a plan, for one sequence.

    Args:
        plan: of whole scales; which tokens a token policy keeps is decided on the device, for all sequences at once.

    Raises:
        TypeError: no plan.
        ValueError: a plan of a token policy.
    """

    def __init__(self, plan: CachePlan) -> None:
        instance_of("plan", plan, CachePlan)
        if plan.selection is not None:
            raise ValueError(f"plan is {plan!r} of a token policy; serving runs policies that keep whole scales")
        self.plan = plan
        steps = range(len(plan.schedule))
        lives = list(_lives(plan))
        held = [np.unique([page for page, born, dies in lives if born <= step <= dies]) for step in steps]
        carried = [
            np.unique([page for page, born, dies in lives if born < step <= dies]) for step in (*steps, len(steps))
        ]
        self.steps = tuple(
            StepUnits(
                tokens=plan.schedule.tokens[step],
                fresh=_pages(np.setdiff1d(held[step], carried[step])),
                carried=_pages(carried[step]),
                released=_pages(np.setdiff1d(held[step], carried[step + 1])),
                read=_padded([plan.read_slots(step, layer) for layer in range(plan.num_layers)], plan.heads),
                write=_padded([plan.write_slots(step, layer) for layer in range(plan.num_layers)], plan.heads),
            )
            for step in steps
        )

    @property
    def curve(self) -> npt.NDArray[np.int64]:
        """(K,) units that a sequence holds during each step."""
        return np.array([step.held for step in self.steps])


def remapped(slots: Slots, maps: Pages) -> Slots:
    """A step's slots (L, heads, S), by unit: maps (N, plan.pages) of N sequences -> (L, N, heads, S)."""
    units = maps[:, slots >> ROWS_BITS]  # (N, L, heads, S); what is no entry looks up page 0
    return np.where(slots & ROWS_MASK, units << ROWS_BITS | slots & ROWS_MASK, 0).swapaxes(0, 1).astype(np.int32)


def _lives(plan: CachePlan) -> Iterator[tuple[int, int, int]]:
    """(page, step that writes it first, last step that touches it), for everything that ever lies in a page."""
    born: dict[int, int] = {}
    touched: dict[int, int] = {}
    for step in range(len(plan.schedule)):
        for layer in range(plan.num_layers):
            reads, writes = _named(plan.read_slots(step, layer)), _named(plan.write_slots(step, layer))
            for page in writes - reads:  # a page that grows is read by the same call
                if page in born:
                    yield page, born[page], touched[page]
                born[page] = step
            touched |= dict.fromkeys(reads | writes, step)
    for page, step in born.items():
        yield page, step, touched[page]


def _named(slots: Slots) -> set[int]:
    """Logical pages of a table's entries."""
    return set((slots[slots & ROWS_MASK > 0] >> ROWS_BITS).tolist())


def _pages(pages: npt.NDArray) -> Pages:
    return pages.astype(np.int32)


def _padded(tables: list[Slots], heads: int) -> Slots:
    """Tables (S,) or (heads, S) as one, (L, heads, S) of the longest S."""
    rows = [table.reshape(heads, -1) for table in tables]
    found = np.zeros((len(rows), heads, max(row.shape[1] for row in rows)), dtype=np.int32)
    for all_layers, row in zip(found, rows, strict=True):
        all_layers[:, : row.shape[1]] = row
    return found
