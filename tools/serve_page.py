"""A picture of the page that `amskv serve` shows, of the digits half drawn: python -m tools.serve_page"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import time
from pathlib import Path

from amskv_kernels.cli import console
from tools import browser

OUT = Path(__file__).parents[1] / "docs" / "images" / "serve.png"
SIZE = (1000, 700)  # pixels
SHOWN = 10  # images done when the picture is taken; as many are still drawn or wait
PATIENCE = 120  # seconds


def main() -> None:
    """Serve, draw, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=OUT)
    out = parser.parse_args().out
    command = [
        sys.executable,
        "-m",
        "amskv_kernels",
        "serve",
        "--port",
        "0",
        "--memory",
        "8MiB",
        "--policy",
        "ams-kv:75",
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            said = "".join(server.stdout.readline() for _ in range(3))
            port = re.search(r":(\d+)$", said)
            if port is None:
                raise SystemExit(f"the server said {said!r}")
            with browser.page() as page:
                page.open(f"http://127.0.0.1:{port[1]}/?prompt=three&count=21&seed=1", *SIZE)
                end = time.monotonic() + PATIENCE
                while (page.ask("document.querySelectorAll('img[data-done=true]').length") or 0) < SHOWN:
                    if time.monotonic() > end:
                        raise SystemExit("the images never came")
                page.picture(out)
        finally:
            server.terminate()


if __name__ == "__main__":
    sys.exit(console.run(main))
