"""One tick's work on the host: who is at which step, and what the device needs to know of them.

How many images are at which step is a tick's *mixture*. All that depends on nothing else is worked out once per
mixture; what names images, their classes, pages and limits is filled anew every tick, in the same memory. So the calls
of a mixture's ticks are the same calls on the same addresses, and may be replayed as one graph.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from amskv_kernels.serving.pool import UnitPool
from amskv_kernels.serving.requests import Request
from amskv_kernels.serving.units import remapped

Rows = npt.NDArray[np.int64]

# A matrix product of fewer rows may sum in another order, on the CPU: an image's numbers would depend on who else is
# there. So packed rows are never fewer.
LEAST_ROWS = 16
MOST_MIXTURES = 64  # remembered; many images that come evenly make one or two


@dataclass(frozen=True, eq=False)
class Group:
    """The images that are at one step, those with guidance first.

    Of all packed rows the first are those of sequences with their class, one for each image; so they are the rows of
    all images' maps as well. Those of sequences without follow, in the same order.

    Attributes:
        step: of the schedule.
        tokens: n of its map.
        places: (images,) of the engine's places.
        pairs: how many have guidance.
        image: which of all images it begins with, and its first sequence with the class.
        row: packed row that this one begins with.
        other: the first sequence without.
        other_row: packed row that this one begins with.
    """

    step: int
    tokens: int
    places: Rows
    pairs: int
    image: int
    row: int
    other: int
    other_row: int

    @property
    def images(self) -> slice:
        """Its images, of all."""
        return slice(self.image, self.image + len(self.places))

    @property
    def others(self) -> slice:
        """Its sequences without the class."""
        return slice(self.other, self.other + self.pairs)

    @property
    def rows(self) -> slice:
        """Its packed rows of sequences with the class."""
        return slice(self.row, self.row + len(self.places) * self.tokens)

    @property
    def members(self) -> tuple[Rows, Rows]:
        """Rows of the pool's maps: 2 · place of sequences with the class, 2 · place + 1 of those without."""
        return 2 * self.places, 2 * self.places[: self.pairs] + 1


def groups_of(steps: npt.NDArray[np.int64], guided: npt.NDArray[np.bool_], tokens: Sequence[int]) -> list[Group]:
    """The images inside, by their step.

    Args:
        steps: (places,) each place's next step, −1 where nobody is.
        guided: (places,) whether its image has guidance.
        tokens: of every scale.
    """
    inside = steps >= 0
    other, other_row = int(inside.sum()), sum(tokens[step] for step in steps[inside].tolist())
    image, row, found = 0, 0, []
    for step in np.unique(steps[inside]).tolist():
        own, n = steps == step, tokens[step]
        pairs = np.flatnonzero(own & guided)
        places = np.concatenate([pairs, np.flatnonzero(own & ~guided)])
        found.append(Group(step, n, places, len(pairs), image, row, other, other_row))
        image, row, other, other_row = (
            image + len(places), row + len(places) * n, other + len(pairs), other_row + len(pairs) * n
        )  # fmt: skip
    return found


class Mirror:
    """A host array and its copy on a device; neither ever moves. On the CPU they are one."""

    def __init__(self, array: npt.NDArray, device: torch.device) -> None:
        self.host, self._source = array, torch.from_numpy(array)
        self.device = self._source if device.type == "cpu" else self._source.to(device)

    def send(self) -> None:
        """What the host wrote goes to the device."""
        if self.device is not self._source:
            self.device.copy_(self._source)


class Limits(NamedTuple):
    """How the maps of each image are sampled: (images,) each.

    Attributes:
        gain: fp32, what logits with the class count.
        loss: fp32, what those without count against them.
        kept: int64, how many of the most likely tokens are in the running.
        floor: fp32, the share of probability below which the least likely are not.
    """

    gain: Mirror
    loss: Mirror
    kept: Mirror
    floor: Mirror


class Mixture:
    """The tables of every tick at which as many images are at each step.

    Attributes:
        rows: packed rows of all sequences; T is at least `LEAST_ROWS`.
        owner: (T,) image whose class each packed row has, as many as there are images where it has none.
        source: (T,) row of the inputs, those of the first scale and then all later maps, that each packed row takes.
        position: (T,) of each packed row in the schedule.
        other: (map rows,) packed row without the class, that with it where there is no guidance.
        image: (map rows,) whose each is.
        starts: (sequences + 1,) int32, packed row that each begins with.
        places: (images,) of the engine.
        conditions: (images + 1,) row of the table of conditions of each, and last that of no class.
        limits: of each image.
        read, write: (L, sequences, heads, S) slots.
    """

    def __init__(self, groups: Sequence[Group], pool: UnitPool, offsets: Sequence[int]) -> None:
        device, last, count = pool.pages.device, groups[-1], pool.plan.steps[0].tokens
        maps, images, sequences = last.rows.stop, last.images.stop, last.others.stop
        self.rows = last.other_row + last.pairs * last.tokens
        padded = max(self.rows, LEAST_ROWS)
        source, position, other = (np.zeros(size, dtype=np.int64) for size in (padded, padded, maps))
        owner = np.full(padded, images)
        lengths = np.zeros(sequences, dtype=np.int64)
        source[:maps], other[:] = count + np.arange(maps), np.arange(maps)
        for group in groups:
            n, own = group.tokens, np.arange(group.pairs * group.tokens)
            rows, within = group.other_row + own, offsets[group.step] + np.arange(n)
            position[group.rows], position[rows] = np.tile(within, len(group.places)), np.tile(within, group.pairs)
            source[rows] = count + group.row + own if group.step else own % n
            other[group.row + own] = rows
            owner[group.rows] = np.repeat(np.arange(images)[group.images], n)
            lengths[group.images] = lengths[group.others] = n
        source[self.rows :], position[self.rows :] = source[self.rows - 1], position[self.rows - 1]
        self.source, self.position, self.other, self.owner = (
            torch.from_numpy(x).to(device) for x in (source, position, other, owner)
        )
        self.image = self.owner[:maps]
        self.starts = torch.from_numpy(np.concatenate([[0], lengths.cumsum()]).astype(np.int32)).to(device)
        self._make_tables(groups, pool, images, sequences)

    def _make_tables(self, groups: Sequence[Group], pool: UnitPool, images: int, sequences: int) -> None:
        """Those that every tick fills."""
        device, plan, steps = pool.pages.device, pool.plan.plan, [pool.plan.steps[group.step] for group in groups]
        self.places = Mirror(np.zeros(images, dtype=np.int64), device)
        self.conditions = Mirror(np.zeros(images + 1, dtype=np.int64), device)
        types = (np.float32, np.float32, np.int64, np.float32)
        self.limits = Limits(*(Mirror(np.zeros(images, dtype=x), device) for x in types))
        longest = (max(step.read.shape[2] for step in steps), max(step.write.shape[2] for step in steps))
        self.read, self.write = (
            Mirror(np.zeros((plan.num_layers, sequences, plan.heads, size), dtype=np.int32), device) for size in longest
        )
        self._pool = pool

    def fill(self, groups: Sequence[Group], requests: Sequence[Request | None], vocab_size: int) -> None:
        """The images of a tick whose units have been taken; `requests` by place."""
        last_step = max(len(self._pool.plan.steps) - 1, 1)
        for group in groups:
            step = self._pool.plan.steps[group.step]
            for members, own in zip(group.members, (group.images, group.others), strict=True):
                for table, slots in ((self.read, step.read), (self.write, step.write)):
                    table.host[:, own, :, : slots.shape[2]] = remapped(slots, self._pool.maps[members])
            self.places.host[group.images] = group.places
            for image, place in enumerate(group.places.tolist(), group.image):
                request = requests[place]
                assert request is not None
                t = request.guidance * (group.step / last_step)
                floor = 1 - request.top_p if request.top_p else -1.0
                for limit, value in zip(self.limits, (1 + t, t, request.top_k or vocab_size, floor), strict=True):
                    limit.host[image] = value
        self.conditions.host[:-1] = self.places.host + 1
        for mirror in (self.places, self.conditions, *self.limits, self.read, self.write):
            mirror.send()


class Mixtures:
    """Those of late.

    Args:
        pool: whose pages hold the history.
        offsets: position in the schedule that each scale begins with.
    """

    def __init__(self, pool: UnitPool, offsets: Sequence[int]) -> None:
        self._pool, self._offsets = pool, offsets
        self._found: OrderedDict[tuple[tuple[int, int, int], ...], Mixture] = OrderedDict()

    def of(self, groups: Sequence[Group]) -> Mixture:
        """That of these groups, worked out where it is new."""
        key = key_of(groups)
        if key not in self._found:
            self._found[key] = Mixture(groups, self._pool, self._offsets)
            if len(self._found) > MOST_MIXTURES:
                self._found.popitem(last=False)
        self._found.move_to_end(key)
        return self._found[key]


def key_of(groups: Sequence[Group]) -> tuple[tuple[int, int, int], ...]:
    """(step, images, images with guidance) of each group."""
    return tuple((group.step, len(group.places), group.pairs) for group in groups)
