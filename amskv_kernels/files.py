"""Reading the small JSON files that measurements write: every mistake names the file and the field."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from amskv_kernels.schedule import ScaleSchedule

T = TypeVar("T")


def read_json(path: str | Path, kind: str) -> Any:
    """The file's content.

    Raises:
        ValueError: it cannot be read or is not JSON.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{kind} {path} cannot be read: {error}") from error


def read_fields(path: str | Path, kind: str, expected: str, parse: Callable[[dict[str, Any]], T]) -> T:
    """What `parse` makes of a JSON object of format `expected`.

    Raises:
        ValueError: not such a file, or `parse` finds a field missing or wrong.
    """
    raw = read_json(path, kind)
    if not isinstance(raw, dict) or raw.get("format") != expected:
        found = raw.get("format") if isinstance(raw, dict) else type(raw).__name__
        raise ValueError(f"{kind} {path} has format {found!r}; it must be {expected!r}")
    try:
        return parse(raw)
    except (KeyError, TypeError, ValueError) as error:
        field = f"field {error} is missing" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"{kind} {path} is corrupt: {field}") from error


def finite_table(name: str, raw: Any, columns: int) -> tuple[tuple[float, ...], ...]:
    """`raw` as a table of finite numbers, one row per layer.

    Raises:
        ValueError: no row, a row of another length, or a number that is not finite.
    """
    table = tuple(tuple(float(x) for x in row) for row in raw)
    if not table or any(len(row) != columns for row in table):
        raise ValueError(f"{name} must have {columns} entries, one per scale, in each of one or more layers")
    if not all(math.isfinite(x) for row in table for x in row):
        raise ValueError(f"{name} holds a number that is not finite")
    return table


def check_fits(
    what: str, sizes: tuple[tuple[int, int], ...], layers: int, schedule: ScaleSchedule, num_layers: int
) -> None:  # fmt: skip
    """Raise ValueError when a measurement was made for another depth or schedule."""
    if layers != num_layers:
        raise ValueError(f"{what} was made for {layers} layers; this model has {num_layers}")
    if sizes != schedule.sizes:
        made, asked = (" ".join(f"{h}×{w}" for h, w in each) for each in (sizes, schedule.sizes))
        raise ValueError(f"{what} was made for maps {made}; this schedule has {asked}")
