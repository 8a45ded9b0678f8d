"""Who may enter when: the units of everyone inside are known for every coming tick, and never exceed the pool.

A request enters at the first tick at which its whole curve fits on top of what is booked, in order of arrival. Requests
that enter together also reach the widest step together, so that a pool filled at once holds no more than peak × count.
Entries are therefore *paced*: so many sequences within so many ticks, evenly spread, as the pool could take for ever.
Then the wide steps of some fall on the narrow steps of others.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Curve = npt.NDArray[np.int64]
PAIR = 2  # sequences of an image with guidance
LONGEST = 2  # steps of an image, times this: the longest period of entries that is tried


class Pace(NamedTuple):
    """`sequences` enter within `ticks` ticks, evenly spread: one no sooner than `ticks / sequences` after another."""

    sequences: int
    ticks: int

    @classmethod
    def of(cls, curve: Curve, units: int) -> Pace:
        """The fastest that a pool of `units` takes for ever, in whole pairs where one fits; the smoothest of several.

        Raises:
            ValueError: not even one sequence fits.
        """
        least = PAIR if units >= PAIR * curve.max() else 1
        if least * curve.max() > units:
            raise ValueError(f"a sequence holds up to {curve.max()} units; the pool has {units}")
        found = []
        for ticks in range(1, LONGEST * len(curve) + 1):
            phases = np.pad(curve, (0, -len(curve) % ticks)).reshape(-1, ticks).sum(0)
            most = units * ticks // (least * int(curve.sum()))
            fitting = (count for count in range(most, 0, -1) if least * _fullest(phases, count) <= units)
            found.append(cls(least * next(fitting, 0), ticks))
        return max(found, key=lambda pace: (pace.sequences / pace.ticks, -pace.ticks))

    def inside(self, steps: int) -> float:
        """Sequences inside at once, on average, while many wait."""
        return self.sequences / self.ticks * steps


def _fullest(phases: Curve, count: int) -> int:
    """Units at the fullest tick of a period, where so many sequences begin within it, evenly spread."""
    ticks = len(phases)
    begin = np.bincount(np.arange(count) * ticks // count, minlength=ticks)
    at = np.arange(ticks)
    return int((phases[at[:, None] - at] @ begin).max())


class Admission:
    """The book of units over the coming ticks.

    Args:
        curve: (K,) units that a sequence holds during each of its steps.
        units: of the pool.

    Raises:
        ValueError: not even one sequence fits.
    """

    def __init__(self, curve: Curve, units: int) -> None:
        self.curve, self.units = curve, units
        self.pace = Pace.of(curve, units)
        self.clear()

    def clear(self) -> None:
        """Nobody is inside."""
        self._booked = np.zeros(len(self.curve), dtype=np.int64)
        self._wait = 0  # until the next may begin, in parts of a tick as many as the pace has sequences

    @property
    def coming(self) -> Curve:
        """(K,) units booked for this tick and those that follow; a copy."""
        return self._booked.copy()

    def never(self, sequences: int) -> str | None:
        """Why a request of so many sequences can never enter, None if it can."""
        peak = int(self.curve.max())
        if sequences * peak <= self.units:
            return None
        needs = f"{sequences} · {peak} = {sequences * peak} pages at its widest step"
        return f"the image needs {needs}; the pool has {self.units}"

    def enter(self, sequences: int) -> bool:
        """Book a request that begins with this tick, if it may."""
        wanted = self._booked + sequences * self.curve
        if wanted.max() > self.units or self._wait >= self.pace.sequences:
            return False
        self._booked = wanted
        self._wait = max(self._wait, 0) + sequences * self.pace.ticks
        return True

    def leave(self, sequences: int, step: int) -> None:
        """Cancel the bookings of a request that has finished `step` steps."""
        left = self.curve[step:]
        self._booked[: len(left)] -= sequences * left
        self._wait -= max(sequences * self.pace.ticks - step * self.pace.sequences, 0)  # what others still wait for it

    def advance(self) -> None:
        """A tick is over."""
        self._booked = np.append(self._booked[1:], 0)
        self._wait -= self.pace.sequences
