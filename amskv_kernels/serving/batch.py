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
from torch import Tensor

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
    """The images that are at one step, those with guidance first. Their sequences with their class come first, then
    those without, of images with guidance.

    Attributes:
        step: of the schedule.
        tokens: n of its map.
        places: (images,) of the engine's places.
        pairs: how many have guidance.
        first: sequence of the batch that the group begins with.
        row: packed row that it begins with.
        image: which of all images it begins with.
        map_row: row of all images' maps that it begins with.
    """

    step: int
    tokens: int
    places: Rows
    pairs: int
    first: int
    row: int
    image: int
    map_row: int

    @property
    def sequences(self) -> int:
        """Of all its images."""
        return len(self.places) + self.pairs

    @property
    def last(self) -> int:
        """One past its last sequence."""
        return self.first + self.sequences

    @property
    def rows(self) -> slice:
        """Its packed rows."""
        return slice(self.row, self.row + self.sequences * self.tokens)

    @property
    def images(self) -> slice:
        """Its images, of all."""
        return slice(self.image, self.image + len(self.places))

    @property
    def map_rows(self) -> slice:
        """Its rows of all images' maps."""
        return slice(self.map_row, self.map_row + len(self.places) * self.tokens)

    @property
    def members(self) -> Rows:
        """(sequences,) rows of the pool's maps: 2 · place with the class, 2 · place + 1 without."""
        return np.concatenate([2 * self.places, 2 * self.places[: self.pairs] + 1])


def groups_of(steps: npt.NDArray[np.int64], guided: npt.NDArray[np.bool_], tokens: Sequence[int]) -> list[Group]:
    """The images inside, by their step.

    Args:
        steps: (places,) each place's next step, −1 where nobody is.
        guided: (places,) whether its image has guidance.
        tokens: of every scale.
    """
    found: list[Group] = []
    first = row = image = map_row = 0
    for step in np.unique(steps[steps >= 0]).tolist():
        own = steps == step
        pairs, others = np.flatnonzero(own & guided), np.flatnonzero(own & ~guided)
        places = np.concatenate([pairs, others])
        group = Group(step, tokens[step], places, len(pairs), first, row, image, map_row)
        found.append(group)
        first, row, image, map_row = group.last, group.rows.stop, group.images.stop, group.map_rows.stop
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
        key: (step, images, images with guidance) of each group.
        sequence: (T,) of each packed row, at least `LEAST_ROWS`; the last is repeated.
        source: (T,) row of the inputs, those of the first scale and then all later maps, that each packed row takes.
        position: (T,) of each packed row in the schedule.
        own, other: (map rows,) packed row of each, with the class and without, its own where there is no guidance.
        image: (map rows,) whose each is.
        map_position: (map rows,) of each in the schedule.
        starts: (sequences + 1,) int32, packed row that each begins with.
        places: (images,) of the engine.
        conditions: (sequences,) rows of the table of conditions: place + 1 with the class, 0 without.
        limits: of each image.
        read, write: (L, sequences, heads, S) slots.
    """

    def __init__(self, groups: Sequence[Group], pool: UnitPool, offsets: Sequence[int]) -> None:
        device, last = pool.pages.device, groups[-1]
        self.key = key_of(groups)
        self.rows = last.rows.stop
        lengths = np.repeat([group.tokens for group in groups], [group.sequences for group in groups])
        starts = np.concatenate([[0], lengths.cumsum()]).astype(np.int32)
        begins = groups[0] if groups[0].step == 0 else None
        ahead = begins.rows.stop - begins.map_rows.stop if begins else 0  # of inputs, more than of maps
        parts = [_indices(group, offsets[group.step], ahead) for group in groups]
        source, position, own, other, map_position = (np.concatenate(x) for x in zip(*parts, strict=True))
        packed = (np.repeat(np.arange(last.last), lengths), source, position)
        self.sequence, self.source, self.position = (_on(_at_least(x, LEAST_ROWS), device) for x in packed)
        sizes = np.repeat([group.tokens for group in groups], [len(group.places) for group in groups])
        image = np.repeat(np.arange(last.images.stop), sizes)
        self.own, self.other, self.image, self.map_position = (
            _on(x, device) for x in (own, other, image, map_position)
        )
        self.starts = _on(starts, device)
        images = last.images.stop
        self.places = Mirror(np.zeros(images, dtype=np.int64), device)
        self.conditions = Mirror(np.zeros(last.last, dtype=np.int64), device)
        self.limits = Limits(
            *(Mirror(np.zeros(images, x), device) for x in (np.float32, np.float32, np.int64, np.float32))
        )
        steps, plan = [pool.plan.steps[group.step] for group in groups], pool.plan.plan
        longest = (max(step.read.shape[2] for step in steps), max(step.write.shape[2] for step in steps))
        self.read, self.write = (
            Mirror(np.zeros((plan.num_layers, last.last, plan.heads, size), dtype=np.int32), device) for size in longest
        )
        self._pool = pool

    def fill(self, groups: Sequence[Group], requests: Sequence[Request | None], vocab_size: int) -> None:
        """The images of a tick whose units have been taken; `requests` by place."""
        last_step = max(len(self._pool.plan.steps) - 1, 1)
        for group in groups:
            step, maps = self._pool.plan.steps[group.step], self._pool.maps[group.members]
            for table, slots in ((self.read, step.read), (self.write, step.write)):
                table.host[:, group.first : group.last, :, : slots.shape[2]] = remapped(slots, maps)
            self.places.host[group.images] = group.places
            self.conditions.host[group.first : group.last] = 0
            self.conditions.host[group.first : group.first + len(group.places)] = group.places + 1
            for image, place in enumerate(group.places.tolist(), group.image):
                request = requests[place]
                assert request is not None
                t = request.guidance * (group.step / last_step)
                floor = 1 - request.top_p if request.top_p else -1.0
                for limit, value in zip(self.limits, (1 + t, t, request.top_k or vocab_size, floor), strict=True):
                    limit.host[image] = value
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


def _indices(group: Group, offset: int, ahead: int) -> tuple[Rows, ...]:
    """Source and position of a group's packed rows; own, other and position of its map rows."""
    n, images, pairs = group.tokens, len(group.places), group.pairs
    owner = np.concatenate([np.arange(images), np.arange(pairs)])  # image of each sequence
    source = np.arange(group.sequences) if group.step == 0 else owner
    begin = group.map_row + ahead if group.step else 0
    within = np.arange(n)
    own = group.row + np.arange(images * n)
    other = own.copy()
    other[: pairs * n] += images * n
    return (
        (begin + source[:, None] * n + within).ravel(), np.tile(offset + within, group.sequences), own, other,
        np.tile(offset + within, images),
    )  # fmt: skip


def _at_least(x: Rows, count: int) -> Rows:
    """x with its last repeated until there are so many."""
    return np.pad(x, (0, max(count - len(x), 0)), mode="edge")


def _on(x: npt.NDArray, device: torch.device) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(x)).to(device)
