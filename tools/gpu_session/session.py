"""What the phases share: where the files are, how much time is left, the environment of what runs."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from tools.gpu_session import records, supervise

ROOT = Path(__file__).parents[2]
PACK = ROOT / "build" / "gpu-pack"
LIBRARY = ROOT / "amskv_kernels" / "libamskv.so"
TEST_SECONDS = 60.0  # the longest, Infinity-1M's last step, takes a few; the first of a process compiles
LEAVE_SECONDS = 5.0  # between the end of what runs and the phase's


class Session:
    """One phase: its journal and log in `out`, and the time it has.

    Args:
        phase: names the files, OUT/PHASE.jsonl and OUT/PHASE.log.
        out: made if it is not there.
        seconds: for all of it.
        earlier: a folder with the files of an earlier run of the phase, which is gone on with.
        test_seconds: how long a test may be silent before its process is stopped.
    """

    def __init__(
        self, phase: str, out: Path, seconds: float, earlier: Path | None = None, test_seconds: float = TEST_SECONDS
    ) -> None:
        self.phase, self.out, self.end = phase, out, time.monotonic() + seconds - LEAVE_SECONDS
        self.test_seconds = test_seconds
        manifest = PACK / "manifest.json"
        self.manifest: records.Row = json.loads(manifest.read_text(encoding="utf-8")) if manifest.exists() else {}
        out.mkdir(parents=True, exist_ok=True)
        self._begin(earlier)
        commit = {name: self.manifest[name] for name in ("commit", "changed", "sources") if name in self.manifest}
        self.add({"phase": phase, "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), **commit})

    @property
    def journal(self) -> Path:
        """What came of it, a row a line."""
        return self.out / f"{self.phase}.jsonl"

    @property
    def log(self) -> Path:
        """All that was printed."""
        return self.out / f"{self.phase}.log"

    def _begin(self, earlier: Path | None) -> None:
        """Files of an earlier run go; where one is gone on with, they are where this one starts."""
        journal = [] if earlier is None else self._kept(records.read(earlier / self.journal.name))
        results = {} if earlier is None else {p.name: p.read_bytes() for p in earlier.glob(f"{self.phase}-result.*")}
        for path in (*self.out.glob(f"{self.phase}-*"), self.journal, self.log):
            path.unlink(missing_ok=True)
        for name, content in results.items():
            (self.out / name).write_bytes(content)
        for row in journal:
            self.add(row)

    def _kept(self, rows: list[records.Row]) -> list[records.Row]:
        """What of an earlier journal need not be done again: all that went well, with the same sources."""
        sources = {row["sources"] for row in rows if "sources" in row}
        if self.manifest and sources - {self.manifest["sources"]}:
            self.say(f"{self.phase}: the earlier run was of other sources, so it is begun anew")
            return []
        return [row for row in rows if row.get("outcome") in ("passed", "skipped") or "metrics" in row]

    def left(self) -> float:
        """Seconds."""
        return self.end - time.monotonic()

    def add(self, row: records.Row) -> None:
        """A row for the journal."""
        records.add(self.journal, row)

    def say(self, line: str) -> None:
        """A line for whoever waits."""
        print(line, flush=True)

    def environment(self) -> dict[str, str]:
        """This process's, with the project and the pack on Python's path."""
        paths = [str(ROOT), *([str(PACK / "site")] if (PACK / "site").is_dir() else []), os.environ.get("PYTHONPATH")]
        added = {
            "PYTHONPATH": os.pathsep.join(path for path in paths if path),
            "PYTHONUNBUFFERED": "1",
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",  # what that machine's pytest loads besides takes a second a process
        }
        if "commit" in self.manifest:
            added["AMSKV_COMMIT"] = self.manifest["commit"]
        return {**os.environ, **added}

    def run(
        self, command: Sequence[str], seconds: float = float("inf"), watch: Callable[[], str | None] = lambda: None,
        folder: Path = ROOT,
    ) -> supervise.Ending:  # fmt: skip
        """A command, for `seconds` or what time is left."""
        limit = max(min(seconds, self.left()), 0.0)
        return supervise.run(command, self.log, limit, self.environment(), watch, folder)

    def serialised(self, name: str) -> bool:
        """Whether ptxas made the products of this build's Hopper kernel wait for each other: it shows no speed."""
        return name in self.manifest.get("serialised", ())

    def use_library(self, name: str) -> str | None:
        """Put one build of the CUDA library where the package looks for it; why that cannot be.

        Without a pack the library of this checkout serves, which has no build whose waits trap.
        """
        packed = PACK / name
        if packed.exists():
            beside = LIBRARY.with_suffix(".new")
            shutil.copyfile(packed, beside)
            beside.replace(LIBRARY)
            return None
        if name == LIBRARY.name and LIBRARY.exists():
            return None
        return f"no {name}: make gpu-pack builds it" if self.manifest or name != LIBRARY.name else "no CUDA library"
