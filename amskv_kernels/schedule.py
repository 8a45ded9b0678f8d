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

_SIZE = "two positive integers (h, w)"
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

    Maps need not be square. Equality and hashing look at the sizes only.

    Raises:
        TypeError: no sequence of sizes, a size that is no sequence, such as a bare side, or a name that is no text.
        ValueError: no scale at all, more than `MOST_SCALES`, a size that is not two positive integers, or more than
            `MOST_TOKENS` tokens.
    """

    sizes: tuple[tuple[int, int], ...]
    name: str = field(default="custom", compare=False)

    def __init__(self, sizes: Iterable[Iterable[int]], name: str = "custom") -> None:
        instance_of("name", name, str)
        checked: list[tuple[int, int]] = []
        for i, size in enumerate(_members("sizes", sizes, MOST_SCALES, "a sequence of (h, w), one per scale")):
            pair = _members(f"sizes[{i}]", size, 2, _SIZE)
            if len(pair) != 2:
                raise ValueError(f"sizes[{i}] is {shown(pair)}; it must be {_SIZE}")
            try:
                checked.append((whole_number("h", pair[0], 1), whole_number("w", pair[1], 1)))
            except ValueError as error:
                raise ValueError(f"sizes[{i}] is {shown(pair)}; it must be {_SIZE}") from error
        if not checked:
            raise ValueError("sizes is empty; a schedule has at least one scale")
        if len(checked) > MOST_SCALES:
            raise ValueError(f"sizes has more than {MOST_SCALES} scales; a schedule has at most as many")
        if (total := sum(h * w for h, w in checked)) > MOST_TOKENS:
            raise ValueError(f"sizes has {shown(total)} tokens; a schedule has at most {MOST_TOKENS}")
        object.__setattr__(self, "sizes", tuple(checked))
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
        """Tokens per scale, h·w."""
        return tuple(h * w for h, w in self.sizes)

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
