"""The files that measurements read and write: every mistake names file and field, and a failed save changes nothing."""

from __future__ import annotations

import json
import math
import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from amskv_kernels.arguments import real_number, shown
from amskv_kernels.schedule import ScaleSchedule

T = TypeVar("T")

LARGEST_JSON = 1 << 26  # bytes; a checkpoint given in place of a measurement is refused unread
# What a parser raises for content that is not what it expects.
MISTAKES = (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)
LONGEST_NAME = 120  # letters of a file's name in an error message


def parse_json(text: str) -> Any:
    """What JSON says: finite numbers, integers of at most 64 bits.

    Raises:
        ValueError: it is not such JSON, or nested too deeply.
    """
    try:
        return json.loads(text, parse_int=_whole, parse_float=_finite, parse_constant=_finite)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _whole(digits: str) -> int:
    if len(digits) > 20 or not -(1 << 63) <= int(digits) < 1 << 63:
        raise ValueError(f"{_short(digits)} is out of range; integers have at most 64 bits")
    return int(digits)


def _finite(text: str) -> float:
    if not math.isfinite(float(text)):
        raise ValueError(f"{_short(text)} is not finite")
    return float(text)


def _short(text: str) -> str:
    return text if len(text) <= 24 else f"{text[:20]}…"


def read_json(path: str | Path, kind: str) -> Any:
    """The file's content.

    Raises:
        ValueError: it cannot be read, is too large for a measurement, or is not JSON as `parse_json` takes it.
    """
    try:
        if (size := os.stat(path).st_size) > LARGEST_JSON:
            raise ValueError(f"it has {size} bytes; such a file has at most {LARGEST_JSON}")
        with open(path, "rb") as file:
            content = file.read(LARGEST_JSON + 1)
        if len(content) > LARGEST_JSON:  # a device or a pipe, which have no size of their own
            raise ValueError(f"it goes on after {LARGEST_JSON} bytes; such a file has no more")
        return parse_json(content.decode("utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{kind} {_named(path)} cannot be read: {reason(error)}") from error


def read_fields(path: str | Path, kind: str, expected: str, parse: Callable[[dict[str, Any]], T]) -> T:
    """What `parse` makes of a JSON object of format `expected`.

    Raises:
        ValueError: not such a file, or `parse` finds a field missing or wrong.
    """
    raw = read_json(path, kind)
    if not isinstance(raw, dict) or raw.get("format") != expected:
        found = raw.get("format") if isinstance(raw, dict) else type(raw).__name__
        raise ValueError(f"{kind} {_named(path)} has format {_short(repr(found))}; it must be {expected!r}")
    try:
        return parse(raw)
    except MISTAKES as error:
        raise ValueError(f"{kind} {_named(path)} is corrupt: {reason(error)}") from error


def _named(path: str | Path) -> str:
    """The file's name as an error message shows it."""
    text = str(path)
    return text if len(text) <= LONGEST_NAME else f"{text[: LONGEST_NAME // 2]}…{text[-LONGEST_NAME // 2 :]}"


def reason(error: BaseException) -> str:
    """What an error says, in one line: a KeyError stands for a missing field, an OSError for what the system says."""
    if isinstance(error, KeyError):
        return f"field {error} is missing"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A file beside `path` to write to, in its folder, which is made; when the block ends well it takes the place.

    When the block fails, what was at `path` stays, and nothing else does. What is no regular file, such as /dev/null,
    is written to directly; a link keeps pointing where it did.

    Raises:
        OSError: from the system, where no such file can be made, or the old one is not to be written to.
    """
    path = Path(os.path.realpath(path))
    if _exists(path) and not path.is_file():
        yield path
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = _beside(path)
    try:
        yield beside
        if _exists(path):
            shutil.copymode(path, beside)
        with open(beside, "rb") as written:
            os.fsync(written.fileno())  # on the disk before the name points at it
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def _exists(path: Path) -> bool:
    """Whether anything is there; what `path.exists` keeps to itself, a name too long above all, is raised."""
    try:
        os.stat(path)
    except FileNotFoundError:
        return False
    return True


def _beside(path: Path, folder: Path | None = None) -> Path:
    """A new name in the folder of a file that may be written.

    Raises:
        PermissionError: it may not.
    """
    if _exists(path) and not os.access(path, os.W_OK):
        raise PermissionError(13, "Permission denied", str(path))
    return (folder or path.parent) / f".amskv-{secrets.token_hex(8)}.new"


def write_text(path: str | Path, text: str) -> None:
    """Write a text file as `replacing` does."""
    with replacing(path) as beside:
        beside.write_text(text, encoding="utf-8")


def write_json(path: str | Path, value: Any, indent: int | None = 1, **options: Any) -> None:
    """Write `value` as JSON as `replacing` does; `options` are those of `json.dumps`.

    Raises:
        ValueError: a number is not finite, which JSON has no word for.
    """
    write_text(path, json.dumps(value, indent=indent, allow_nan=False, **options) + "\n")


def check_writable(path: str | Path) -> None:
    """Raise ValueError where no file can be written to `path`; tried before hours of measuring, and nothing is left.

    Folders that are missing are made when the file is.
    """
    text = str(path)
    if not Path(path).name or text.endswith("/"):
        raise ValueError(f"{_named(path)!r} is {'a directory' if text else 'empty'}; it must name a file")
    target = Path(os.path.realpath(path))
    try:
        if target.is_dir():
            raise ValueError(f"{_named(path)!r} is a directory; it must name a file")
        if not _exists(target) or target.is_file():
            _try_to_write(target)
    except OSError as error:
        raise ValueError(f"{_named(path)!r} cannot be written: {reason(error)}") from error


def check_folder(path: str | Path) -> None:
    """Raise ValueError where no files can be written to a folder `path`, which is made when they are."""
    if not str(path):
        raise ValueError("'' is empty; it must name a folder")
    target = Path(os.path.realpath(path))
    try:
        if _exists(target) and not target.is_dir():
            raise ValueError(f"{_named(path)!r} is no directory; it must name a folder")
        _try_to_write(target / "file")
    except OSError as error:
        raise ValueError(f"{_named(path)!r} cannot be written to: {reason(error)}") from error


def _try_to_write(target: Path) -> None:
    """Write a file into the innermost of the target's folders that is there, and remove it; errors are the system's."""
    folder = next(folder for folder in target.parents if _exists(folder))
    for part in target.relative_to(folder).parts:  # each of a length that the file system takes
        _exists(folder / part)
    beside = _beside(target, folder)
    beside.touch()
    beside.unlink()


def finite_number(name: str, raw: object) -> float:
    """`raw` as a float, or an error naming it.

    Raises:
        TypeError: no number.
        ValueError: it is not finite.
    """
    if not math.isfinite(number := real_number(name, raw)):
        raise ValueError(f"{name} is {number}; it must be finite")
    return number


def finite_table(name: str, raw: Any, columns: int | None = None) -> tuple[tuple[float, ...], ...]:
    """`raw` as a table of finite numbers, one row per layer.

    Raises:
        TypeError: no table, or one of something else.
        ValueError: no row, a row of another length, or a number that is not finite.
    """
    if not isinstance(raw, Iterable) or isinstance(raw, str | bytes):
        raise TypeError(f"{name} is {shown(raw)}; it must be a table of numbers, one row per layer")
    rows = tuple(raw)
    for row in rows:
        if not isinstance(row, Iterable) or isinstance(row, str | bytes):
            raise TypeError(f"{name} has a row {shown(row)}; it must be a table of numbers, one row per layer")
    table = tuple(tuple(real_number(name, x) for x in row) for row in rows)
    if columns is None:
        columns = len(table[0]) if table else 0
    if not table or any(len(row) != columns for row in table):
        raise ValueError(f"{name} must have {columns} entries, one per scale, in each of one or more layers")
    if not all(math.isfinite(x) for row in table for x in row):
        raise ValueError(f"{name} holds a number that is not finite")
    return table


def check_fits(
    what: str, sizes: tuple[tuple[int, int], ...], layers: int, schedule: ScaleSchedule, num_layers: int
) -> None:  # fmt: skip
    """Raise ValueError when a measurement, which is of images, was made for another depth or schedule."""
    if not schedule.still:
        raise ValueError(f"{what} was made for images; schedule {schedule.name} has frames")
    if layers != num_layers:
        raise ValueError(f"{what} was made for {layers} layers; this model has {num_layers}")
    if sizes != schedule.sizes:
        made, asked = (" ".join(f"{h}×{w}" for h, w in each) for each in (sizes, schedule.sizes))
        raise ValueError(f"{what} was made for maps {made}; this schedule has {asked}")
