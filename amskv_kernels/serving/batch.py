"""One tick's work on the host: whose rows stand where, and all the tables of its calls."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from amskv_kernels.serving.pool import UnitPool
from amskv_kernels.serving.requests import Request
from amskv_kernels.serving.units import remapped

Rows = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Group:
    """The images that are at one step. Their sequences with their class come first, then those without, of images
    with guidance.

    Attributes:
        step: of the schedule.
        tokens: n of its map.
        places: (images,) of the engine's places, ascending.
        guided: indices in `places` of those with guidance.
        first: sequence of the batch that the group begins with.
        row: packed row that it begins with.
        map_row: row of all images' maps that it begins with.
    """

    step: int
    tokens: int
    places: Rows
    guided: Rows
    first: int
    row: int
    map_row: int

    @property
    def sequences(self) -> int:
        """Of all its images."""
        return len(self.places) + len(self.guided)

    @property
    def last(self) -> int:
        """One past its last sequence."""
        return self.first + self.sequences

    @property
    def rows(self) -> slice:
        """Its packed rows."""
        return slice(self.row, self.row + self.sequences * self.tokens)

    @property
    def map_rows(self) -> slice:
        """Its rows of all images' maps."""
        return slice(self.map_row, self.map_row + len(self.places) * self.tokens)

    @property
    def members(self) -> Rows:
        """(sequences,) rows of the pool's maps: 2 · place with the class, 2 · place + 1 without."""
        return np.concatenate([2 * self.places, 2 * self.places[self.guided] + 1])

    @property
    def conditions(self) -> Rows:
        """(sequences,) rows of the table of conditions: place + 1 with the class, 0 without."""
        return np.concatenate([self.places + 1, np.zeros(len(self.guided), dtype=np.int64)])


def groups_of(steps: npt.NDArray[np.int64], guided: npt.NDArray[np.bool_], tokens: Sequence[int]) -> list[Group]:
    """The images inside, by their step.

    Args:
        steps: (places,) each place's next step, −1 where nobody is.
        guided: (places,) whether its image has guidance.
        tokens: of every scale.
    """
    found: list[Group] = []
    first = row = map_row = 0
    for step in np.unique(steps[steps >= 0]).tolist():
        places = np.flatnonzero(steps == step)
        group = Group(step, tokens[step], places, np.flatnonzero(guided[places]), first, row, map_row)
        found.append(group)
        first, row, map_row = group.last, group.rows.stop, group.map_rows.stop
    return found


class Tables:
    """Slot tables of all layers and where rows begin, filled anew every tick in the same memory.

    Attributes:
        read: (L, sequences at most, heads, S) slots of the history; those of a tick are the first of them.
        write: as read, with its own S.
        starts: (sequences at most + 1,) packed row that each begins with.
    """

    def __init__(self, pool: UnitPool, rows: int) -> None:
        steps, plan = pool.plan.steps, pool.plan.plan
        sizes = (max(step.read.shape[2] for step in steps), max(step.write.shape[2] for step in steps))
        self.read, self.write = (np.zeros((plan.num_layers, rows, plan.heads, size), dtype=np.int32) for size in sizes)
        self.starts = np.zeros(rows + 1, dtype=np.int32)
        self._pool = pool

    def fill(self, groups: Sequence[Group]) -> None:
        """The tables of a tick whose units have been taken."""
        for group in groups:
            step, maps = self._pool.plan.steps[group.step], self._pool.maps[group.members]
            for table, slots in ((self.read, step.read), (self.write, step.write)):
                own = table[:, group.first : group.last]
                own[..., : slots.shape[2]] = remapped(slots, maps)
                own[..., slots.shape[2] :] = 0
            self.starts[group.first : group.last + 1] = group.row + group.tokens * np.arange(group.sequences + 1)


@dataclass(frozen=True, eq=False)
class Limits:
    """How each row of all images' maps is sampled.

    Attributes:
        pair: (rows,) packed row with the class, and (rows,) the one without, its own where there is no guidance.
        weights: (2, rows, 1) fp32, what the logits with and without the class count.
        kept: (rows, 1) how many of the most likely tokens are in the running.
        floor: (rows, 1) fp32, the share of probability below which the least likely are not.
    """

    pair: tuple[Rows, Rows]
    weights: npt.NDArray[np.float32]
    kept: Rows
    floor: npt.NDArray[np.float32]

    @classmethod
    def of(cls, groups: Sequence[Group], requests: Sequence[Request | None], vocab_size: int, steps: int) -> Limits:
        """The limits of a tick; `requests` by place."""
        own, other, settings, counts = [], [], [], []
        for group in groups:
            n, images = group.tokens, len(group.places)
            rows = group.row + np.arange(images * n).reshape(images, n)
            without = rows.copy()
            without[group.guided] = group.row + np.arange(images * n, group.sequences * n).reshape(-1, n)
            own.append(rows.ravel())
            other.append(without.ravel())
            for place in group.places.tolist():
                request = requests[place]
                assert request is not None
                t = request.guidance * (group.step / (steps - 1)) if steps > 1 else 0.0
                kept, floor = request.top_k or vocab_size, 1 - request.top_p if request.top_p else -1.0
                settings.append((1 + t, t, kept, floor))
                counts.append(n)
        gain, loss, kept, floor = (np.repeat(np.array(x), counts)[:, None] for x in zip(*settings, strict=True))
        weights = np.stack([gain, loss]).astype(np.float32)
        pair = (np.concatenate(own), np.concatenate(other))
        return cls(pair, weights, kept.astype(np.int64), floor.astype(np.float32))
