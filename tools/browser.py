"""A headless Chromium at the end of a pipe: its DevTools protocol, as far as pictures and tests of a page need it."""

from __future__ import annotations

import base64
import contextlib
import fcntl
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--hide-scrollbars",
    "--remote-debugging-pipe",
    "--no-first-run",
)


def find() -> str | None:
    """A Chromium of this machine."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Page:
    """One page; calls wait for their answers."""

    def __init__(self, to: Any, back: Any) -> None:
        self._to, self._back, self._count, self._session = to, back, 0, {}
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        self._session = {"sessionId": self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]}

    def _call(self, method: str, **params: Any) -> dict[str, Any]:
        self._count += 1
        message = {"id": self._count, "method": method, "params": params, **self._session}
        self._to.write(json.dumps(message).encode() + b"\0")
        self._to.flush()
        while (answer := self._read()).get("id") != self._count:
            pass
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']['message']}")
        return answer["result"]

    def _read(self) -> dict[str, Any]:
        found = bytearray()
        while (byte := self._back.read(1)) != b"\0":
            if not byte:
                raise RuntimeError("the browser is gone")
            found += byte
        return json.loads(found)

    def open(self, url: str, width: int, height: int) -> None:
        """Show an address."""
        self._call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        self._call("Page.navigate", url=url)

    def ask(self, expression: str) -> Any:
        """The value of a JavaScript expression."""
        return self._call("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")

    def picture(self, path: Path) -> None:
        """Write what is shown as PNG."""
        path.write_bytes(base64.b64decode(self._call("Page.captureScreenshot", format="png")["data"]))


@contextlib.contextmanager
def page() -> Iterator[Page]:
    """A page of a browser of its own.

    Raises:
        RuntimeError: there is no Chromium.
    """
    if (chromium := find()) is None:
        raise RuntimeError(f"none of {', '.join(NAMES)} is installed")
    (reads, to), (back, writes) = os.pipe(), os.pipe()

    def wire() -> None:  # to the descriptors that Chromium expects; first out of their way
        high = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in (reads, writes)]
        os.dup2(high[0], 3)
        os.dup2(high[1], 4)

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        own = [chromium, *FLAGS, f"--user-data-dir={profile}"]
        with subprocess.Popen(own, close_fds=False, preexec_fn=wire, stderr=subprocess.DEVNULL) as process:
            os.close(reads)
            os.close(writes)
            try:
                with open(to, "wb") as speaks, open(back, "rb") as listens:
                    yield Page(speaks, listens)
            finally:
                process.kill()
