"""tools/reports/compatibility.json: what was tried, row by row, so that a later run goes on from there."""

from __future__ import annotations

import json
import platform
import shutil
from pathlib import Path
from typing import Any

from amskv_kernels.files import write_json
from benchmarks.harness import machine
from tools.compatibility.environments import WORK, FailedError, run
from tools.make_wheel import ROOT

Row = dict[str, Any]
PATH = ROOT / "tools" / "reports" / "compatibility.json"
PYTHONS = ("3.10", "3.11", "3.12", "3.13")
NEWEST = "newest"
TORCHES = ("2.10", "2.11", "2.13", NEWEST)
# The library built against a torch, the the wheel run beside it, a group of tests.
KINDS = ("build", "wheel", "suite")


def row(kind: str, torch: str, python: str, group: str = "") -> Row:
    """A row to be filled: what is asked for."""
    return {"kind": kind, "asked": {"torch": torch, "python": python} | ({"group": group} if group else {})}


def key(row: Row) -> tuple[int, int, int, str]:
    """What makes a row another one; rows are in this order."""
    asked = row["asked"]
    place = KINDS.index(row["kind"]), TORCHES.index(asked["torch"]), PYTHONS.index(asked["python"])
    return (*place, asked.get("group", ""))


def good(row: Row) -> bool:
    """Whether nothing failed."""
    return "failed" not in row and not row.get("suite", {}).get("broken")


def tell(row: Row) -> str:
    """A row in one line."""
    asked = row["asked"]
    what = row.get("failed") or row.get("suite") or row.get("library")
    return f"{row['kind']}: Python {asked['python']}, torch {asked['torch']} {asked.get('group', '')}: {what}"


class Report:
    """The file, and the wheel that it is about: the first that was built.

    Rows of other sources, and of a wheel that is no longer in WORK/wheel, are forgotten.
    """

    def __init__(self) -> None:
        self.content: Row = json.loads(PATH.read_text(encoding="utf-8")) if PATH.exists() else {}
        sources = machine.sources()
        if self.content.get("sources") == sources and self.wheel is not None:
            return
        shutil.rmtree(WORK / "wheel", ignore_errors=True)
        commit, _ = machine.commit()
        self.content = {
            "commit": commit, "sources": sources, "system": f"{platform.system()} {platform.machine()}",
            "nvcc": nvcc(), "rows": [],
        }  # fmt: skip

    @property
    def rows(self) -> list[Row]:
        """In the order of KINDS, TORCHES and PYTHONS."""
        return self.content["rows"]

    @property
    def wheel(self) -> Path | None:
        """The one that is tried."""
        return next((WORK / "wheel").glob("*.whl"), None) if "wheel" in self.content else None

    def has(self, kind: str, torch: str, python: str, group: str = "") -> bool:
        """Whether this was tried and went well."""
        wanted = key(row(kind, torch, python, group))
        return any(key(each) == wanted and good(each) for each in self.rows)

    def built(self, release: str) -> bool:
        """Whether the library was built against this very release of torch."""
        return any(each["kind"] == "build" and each.get("torch") == release and good(each) for each in self.rows)

    def keep(self, new: Row) -> None:
        """Into the file, in the place of the row of the same key."""
        self.content["rows"] = sorted([old for old in self.rows if key(old) != key(new)] + [new], key=key)
        if new["kind"] == "build" and good(new) and "wheel" not in self.content:
            self.content["wheel"] = {name: new[name] for name in ("file", "torch", "python")}
        write_json(PATH, self.content, ensure_ascii=False)
        print(tell(new), flush=True)


def nvcc() -> str | None:
    """Its version, None where there is none."""
    try:
        said = run("nvcc", "--version")
    except (FailedError, OSError):
        return None
    return said.split("release ")[1].split(",")[0]
