"""What a scan over time finds: the pages and slot tables of every call."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Slots = npt.NDArray[np.int32]


def sealed(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """A copy that nobody can write to: its memory is a bytes object, which NumPy never makes writable again."""
    return np.ndarray(array.shape, array.dtype, buffer=array.tobytes())


class Extent(NamedTuple):
    """Rows [first_row, first_row + rows) of the page at `page_offset` in an arena."""

    page_offset: int
    first_row: int
    rows: int


@dataclass(frozen=True, eq=False)
class Compaction:
    """What becomes of a layer's keys in a call that does not keep all of them; the same for all its heads.

    Attributes:
        held: rows in the layer's pages; keys count from here, then the current map's.
        kept: how many keys stay.
        observers: positions of the scoring queries in the current map.
        always: keys that stay whatever their score, ascending.
        slots: (S,) slots of the fresh pages that take the kept keys; read-only, in copies too.
    """

    held: int
    kept: int
    observers: tuple[int, ...]
    always: tuple[int, ...]
    slots: Slots

    def __post_init__(self) -> None:
        object.__setattr__(self, "slots", sealed(self.slots))

    def __setstate__(self, state: dict[str, Any]) -> None:
        """NumPy forgets that an array was read-only when it copies or unpickles it."""
        self.__dict__.update(state)
        self.__post_init__()


@dataclass(frozen=True, eq=False, kw_only=True)
class PageTables:
    """The pages of one arena and the slots of every call; what arrays it holds are read-only, in copies too.

    Attributes:
        pages: the most pages that are ever live at once.
        retained: (K,) tokens held from each step to the next.
        live: (K, L) tokens in pages during each call: what it and later calls read, and what it writes.
        live_pages: (K, L) pages these take.
        read: by step and layer, (S,) or (heads, S) slots of the history.
        write: by step and layer, those that take the current scale.
        extents: by (layer · heads + head, scale), where a whole scale lies.
        compactions: by (step, layer), what a token policy does after the call.
    """

    pages: int
    retained: npt.NDArray[np.int64]
    live: npt.NDArray[np.int64]
    live_pages: npt.NDArray[np.int64]
    read: tuple[tuple[Slots, ...], ...]
    write: tuple[tuple[Slots, ...], ...]
    extents: dict[tuple[int, int], tuple[Extent, ...]] = field(default_factory=dict)
    compactions: dict[tuple[int, int], Compaction] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("retained", "live", "live_pages"):
            object.__setattr__(self, name, sealed(getattr(self, name)))
        for name in ("read", "write"):
            steps = tuple(tuple(map(sealed, step)) for step in getattr(self, name))
            object.__setattr__(self, name, steps)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """As of `Compaction`."""
        self.__dict__.update(state)
        self.__post_init__()
