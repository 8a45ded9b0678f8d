"""Scale schedules: the token-map sizes a next-scale model draws, known before the first token."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from itertools import accumulate, islice
from typing import Any

from amskv_kernels.arguments import instance_of, shown, whole_number

_SIZE = "two positive integers (h, w), or three (t, h, w)"
# Beyond every published model: video's longest schedules have some hundred scales, 8192 × 8192 tokens are 2^26.
MOST_SCALES = 1024
MOST_TOKENS = 2**31 - 1  # tokens are counted in 32 bits


@cache
def _published() -> dict[str, tuple[tuple[int, int], ...]]:
    text = resources.files("amskv_kernels").joinpath("data/schedules.json").read_text(encoding="utf-8")
    return {name: tuple((h, w) for h, w in sizes) for name, sizes in json.loads(text)["schedules"].items()}


def _members(name: str, value: Iterable[Any], most: int, expected: str) -> tuple[Any, ...]:
    """Up to `most` members, and one more where there are more."""
    try:
        return tuple(islice(value, most + 1))
    except TypeError as error:
        raise TypeError(f"{name} is {shown(value)}; it must be {expected}") from error


@dataclass(frozen=True)
class ScaleSchedule:
    """The sizes (h, w) of a model's token maps, coarsest first; step k generates scale k (0-based).

    Maps need not be square, and may have several frames: a size (t, h, w) is t maps of (h, w), drawn in one step.
    Equality and hashing look at sizes and frames only.

    Attributes:
        sizes: (h, w) of every scale.
        frames: t of every scale; 1 in images.

    Raises:
        TypeError: no sequence of sizes, a size that is no sequence, such as a bare side, or a name that is no text.
        ValueError: no scale at all, more than `MOST_SCALES`, a size that is not two or three positive integers, or more
            than `MOST_TOKENS` tokens.
    """

    sizes: tuple[tuple[int, int], ...]
    name: str = field(default="custom", compare=False)
    frames: tuple[int, ...] = field(default=(), repr=False)

    def __init__(self, sizes: Iterable[Iterable[int]], name: str = "custom") -> None:
        instance_of("name", name, str)
        checked: list[tuple[int, int, int]] = []
        for i, size in enumerate(_members("sizes", sizes, MOST_SCALES, "a sequence of (h, w), one per scale")):
            found = _members(f"sizes[{i}]", size, 3, _SIZE)
            if len(found) not in (2, 3):
                raise ValueError(f"sizes[{i}] is {shown(found)}; it must be {_SIZE}")
            try:
                t, h, w = (whole_number("each", number, 1) for number in (1, *found)[-3:])
            except ValueError as error:
                raise ValueError(f"sizes[{i}] is {shown(found)}; it must be {_SIZE}") from error
            checked.append((t, h, w))
        if not checked:
            raise ValueError("sizes is empty; a schedule has at least one scale")
        if len(checked) > MOST_SCALES:
            raise ValueError(f"sizes has more than {MOST_SCALES} scales; a schedule has at most as many")
        if (total := sum(t * h * w for t, h, w in checked)) > MOST_TOKENS:
            raise ValueError(f"sizes has {shown(total)} tokens; a schedule has at most {MOST_TOKENS}")
        object.__setattr__(self, "sizes", tuple((h, w) for _, h, w in checked))
        object.__setattr__(self, "frames", tuple(t for t, _, _ in checked))
        object.__setattr__(self, "name", name)

    @classmethod
    def named(cls, name: str) -> ScaleSchedule:
        """A published schedule, for example "var-256" or "infinity-1m-1.000" (see `names`).

        Raises:
            ValueError: no schedule of that name.
        """
        if not isinstance(name, str) or name not in _published():
            raise ValueError(f"schedule {shown(name)} is not a published one; known: {', '.join(cls.names())}")
        return cls(_published()[name], name)

    @staticmethod
    def names() -> tuple[str, ...]:
        """Names of all published schedules."""
        return tuple(_published())

    def __len__(self) -> int:
        return len(self.sizes)

    @property
    def tokens(self) -> tuple[int, ...]:
        """Tokens per scale, t·h·w."""
        return tuple(t * h * w for t, (h, w) in zip(self.frames, self.sizes, strict=True))

    @property
    def still(self) -> bool:
        """Whether every scale has one frame."""
        return self.frames == (1,) * len(self.sizes)

    @property
    def offsets(self) -> tuple[int, ...]:
        """Index of each scale's first token in the flat sequence of all scales."""
        return (0, *accumulate(self.tokens[:-1]))

    @property
    def total(self) -> int:
        """Tokens of all scales."""
        return sum(self.tokens)

    @property
    def prefix(self) -> int:
        """Tokens of all scales but the last, whose K, V nothing ever reads."""
        return self.total - self.tokens[-1]
