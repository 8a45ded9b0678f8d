"""One run's file: valid JSON whenever it is looked at, and the place where the next start goes on.

While a run is under way its rows go, a line each, into a journal beside the file, NAME.jsonl; the file itself is
written at the start and at the end. A killed run leaves both, which together are its result.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from amskv_kernels.files import read_json, write_json

FOLDER = Path(__file__).parents[1] / "results"
FORMAT = 1
# A file continues only what these say is the same run.
SAME_RUN = ("format", "sources", "machine", "quick")
# Why a row is missing that a process was at when it died or was killed; it is not tried again.
DIED = "its process ended before it was done"
# What every reader of a result asks for.
REQUIRED = {"commit": str, "machine": dict, "missing": dict, "quick": bool, "rows": list, "started": str}

Row = dict[str, Any]


class UnreadableResultError(ValueError):
    """A file that is no result; the message names it."""


class Run:
    """The rows of one run by key, and what could not be measured with the reason.

    Args:
        path: of the JSON file; one of the same sources and machine is continued.
        header: machine, commit and what else tells runs apart.
        fresh: start anew even so.
    """

    def __init__(self, path: Path, header: dict[str, Any], fresh: bool = False) -> None:
        self.path = path
        self.header = {"format": FORMAT, "started": _now(), "finished": None, "done": [], **header}
        self.rows: dict[str, Row] = {}
        self.missing: dict[str, str] = {}
        self._noting = False
        before = None if fresh else _existing(path)
        if before is not None and all(before.get(name) == self.header.get(name) for name in SAME_RUN):
            self.rows = {row["key"]: row for row in before.pop("rows")}
            self.missing = before.pop("missing")
            self.header |= {name: value for name, value in before.items() if name != "finished"}

    def __contains__(self, key: str) -> bool:
        return key in self.rows

    @property
    def journal(self) -> Path:
        """Where rows go until the run is saved."""
        return journal_of(self.path)

    def start(self, key: str) -> None:
        """A row is under way: if the process dies of it, the next start leaves it out."""
        self._note({"under way": key})

    def add(self, key: str, row: Row) -> None:
        """Keep a row."""
        self.rows[key] = {"key": key, **row}
        self.missing.pop(key, None)
        self._note({"row": self.rows[key]})

    def begin(self, suites: Sequence[str], keys: Iterable[str]) -> None:
        """What is already done is measured anew; anything else goes on where it stopped."""
        if set(suites) <= set(self.header["done"]):
            self.header["done"] = [suite for suite in self.header["done"] if suite not in suites]
            for key in keys:
                self.rows.pop(key, None)

    def miss(self, what: str, why: str) -> None:
        """Name what could not be measured."""
        self.missing[what] = why
        self._note({"missing": {what: why}})

    def _note(self, entry: dict[str, Any]) -> None:
        """A line in the journal, once the run has begun."""
        if self._noting:
            with open(self.journal, "a", encoding="utf-8") as journal:
                journal.write(json.dumps(entry, default=float) + "\n")

    def save(self) -> None:
        """Write everything; a save that fails leaves the old file. The journal begins anew."""
        write_json(self.path, {**self.header, "missing": self.missing, "rows": list(self.rows.values())}, default=float)
        self.journal.unlink(missing_ok=True)

    def finish(self, suites: Sequence[str]) -> None:
        """Nothing of these suites is left to measure."""
        self.header |= {"finished": _now(), "done": sorted({*self.header["done"], *suites})}

    def __enter__(self) -> Run:
        self.save()
        self._noting = True
        self._note({"run": self.header["started"]})
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:  # fmt: skip
        self._noting = False
        self.save()


def journal_of(path: Path) -> Path:
    """The journal beside a result file."""
    return path.with_suffix(".jsonl")


def _with_journal(found: dict[str, Any], path: Path) -> dict[str, Any]:
    """A result with what a killed run of it noted since; a line that was not finished is none."""
    entries = []
    if path.exists():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                entries.append(json.loads(line))
            except ValueError:
                continue
    if not entries or entries[0] != {"run": found["started"]}:
        return found
    rows, missing = {row["key"]: row for row in found["rows"]}, dict(found["missing"])
    under_way = None
    for entry in entries[1:]:
        under_way = entry.get("under way", under_way)
        if "row" in entry:
            rows[entry["row"]["key"]] = entry["row"]
            missing.pop(entry["row"]["key"], None)
        missing |= entry.get("missing", {})
    if under_way is not None and under_way not in rows:
        missing.setdefault(under_way, DIED)
    return {**found, "rows": list(rows.values()), "missing": missing}


def _now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def _existing(path: Path) -> dict[str, Any] | None:
    try:
        return read(path)
    except UnreadableResultError:
        return None


def read(path: Path) -> dict[str, Any]:
    """A result file.

    Raises:
        UnreadableResultError: it is not one, or cannot be read.
    """
    try:
        found = read_json(path, "result")
    except ValueError as error:
        raise UnreadableResultError(str(error)) from error
    if not _is_result(found):
        raise UnreadableResultError(f"{path} is not a result of python -m benchmarks (format {FORMAT})")
    return _with_journal(found, journal_of(path))


def _is_result(found: object) -> bool:
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        return False
    if not all(isinstance(found.get(name), kind) for name, kind in REQUIRED.items()):
        return False
    return "device" in found["machine"] and all(isinstance(row, dict) and "key" in row for row in found["rows"])


def committed(paths: Iterable[Path] | None = None) -> list[dict[str, Any]]:
    """The results given, or all in the folder, the newest first; each knows its file's name.

    Raises:
        UnreadableResultError: one of them is not a result.
    """
    found = []
    for path in FOLDER.glob("*.json") if paths is None else paths:
        found.append({**read(path), "file": path.name})
    return sorted(found, key=lambda result: (not result["quick"], result["started"]), reverse=True)


def rows(result: dict[str, Any], suite: str, **wanted: object) -> list[Row]:
    """A result's rows of one suite whose fields have these values."""
    return [
        row
        for row in result["rows"]
        if row["suite"] == suite and all(row.get(name) == value for name, value in wanted.items())
    ]


def newest(results: Sequence[dict[str, Any]], suite: str, device: str | None = None) -> dict[str, Any] | None:
    """The first of `results` that has rows of a suite, on one kind of device if given."""
    for result in results:
        if (device is None or result["machine"]["device"] == device) and rows(result, suite):
            return result
    return None
