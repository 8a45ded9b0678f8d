"""Scale schedules: the token-map sizes a next-scale model draws, known before the first token."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from itertools import accumulate
from typing import Any

_SIZE = "two positive integers (h, w)"


@cache
def _published() -> dict[str, tuple[tuple[int, int], ...]]:
    text = resources.files("amskv_kernels").joinpath("data/schedules.json").read_text(encoding="utf-8")
    return {name: tuple((h, w) for h, w in sizes) for name, sizes in json.loads(text)["schedules"].items()}


def _members(name: str, value: Iterable[Any], expected: str) -> tuple[Any, ...]:
    try:
        return tuple(value)
    except TypeError as error:
        raise TypeError(f"{name} is {value!r}; it must be {expected}") from error


@dataclass(frozen=True)
class ScaleSchedule:
    """The sizes (h, w) of a model's token maps, coarsest first; step k generates scale k (0-based).

    Maps need not be square. Equality and hashing look at the sizes only.

    Raises:
        TypeError: no sequence of sizes, or a size that is no sequence, such as a bare side.
        ValueError: no scale at all, or a size that is not two positive integers.
    """

    sizes: tuple[tuple[int, int], ...]
    name: str = field(default="custom", compare=False)

    def __init__(self, sizes: Iterable[Iterable[int]], name: str = "custom") -> None:
        checked = []
        for i, size in enumerate(_members("sizes", sizes, "a sequence of (h, w), one per scale")):
            pair = _members(f"sizes[{i}]", size, _SIZE)
            if len(pair) != 2 or any(not isinstance(x, int) or isinstance(x, bool) or x < 1 for x in pair):
                raise ValueError(f"sizes[{i}] is {pair!r}; it must be {_SIZE}")
            checked.append(pair)
        if not checked:
            raise ValueError("sizes is empty; a schedule has at least one scale")
        object.__setattr__(self, "sizes", tuple(checked))
        object.__setattr__(self, "name", name)

    @classmethod
    def named(cls, name: str) -> ScaleSchedule:
        """A published schedule, for example "var-256" or "infinity-1m-1.000" (see `names`).

        Raises:
            ValueError: no schedule of that name.
        """
        if name not in _published():
            raise ValueError(f"schedule {name!r} is not a published one; known: {', '.join(cls.names())}")
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
