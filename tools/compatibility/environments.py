"""Virtual environments that are made for one try and are gone afterwards."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from tools.make_wheel import ROOT, SMOKE

WORK = ROOT / "build" / "compatibility"
VERSIONS = """
import importlib.metadata, json, platform, torch
version = lambda name: next((d.version for d in importlib.metadata.distributions(name=name)), None)
print(json.dumps({"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda,
                  "triton": version("triton"), "numpy": version("numpy")}))
"""


class FailedError(RuntimeError):
    """A command failed; the message is the end of what it said."""


def run(*command: object, cwd: Path | None = None, **environment: str) -> str:
    """A command's standard output.

    Raises:
        FailedError: it failed.
    """
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=os.environ | environment, capture_output=True, text=True
    )
    if done.returncode:
        raise FailedError(" ".join((done.stdout + done.stderr).split())[-300:] or f"exit status {done.returncode}")
    return done.stdout


def interpreter(version: str) -> Path | None:
    """The newest patch of Python `version` that pyenv has, or the one on PATH."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    found = shutil.which(f"python{version}")
    for path in [*sorted(pyenv.glob(f"{version}.*/bin/python"), reverse=True), *([Path(found)] if found else [])]:
        try:
            said = run(path, "-c", "import sys; print(*sys.version_info[:2], sep='.')")
        except (FailedError, OSError):
            continue
        if said.strip() == version:
            return path
    return None


def uv(*command: object) -> None:
    """uv, from PATH or fetched. What it unpacks lies once in WORK/cache, environments link to it."""
    tools = WORK / "tools" / "bin"
    found = shutil.which("uv", path=os.pathsep.join([str(tools), os.environ["PATH"]]))
    if found is None:
        run(sys.executable, "-m", "venv", tools.parent)
        run(tools / "python", "-m", "pip", "install", "--quiet", "uv")
        found = str(tools / "uv")
    settings = {"UV_CACHE_DIR": str(WORK / "cache"), "UV_NO_CONFIG": "1", "UV_PYTHON_DOWNLOADS": "never"}
    run(found, *command, "--quiet", cwd=WORK, **settings)


def forget_downloads() -> None:
    """Frees the disk for another torch's."""
    shutil.rmtree(WORK / "cache", ignore_errors=True)


class Environment:
    """`with Environment(python, name) as env`: a virtual environment under WORK."""

    def __init__(self, base: Path, name: str) -> None:
        self.base, self.folder = base, WORK / name
        self.python = self.folder / "bin" / "python"

    def __enter__(self) -> Environment:
        WORK.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(self.folder, ignore_errors=True)
        uv("venv", "--python", self.base, self.folder)
        return self

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def install(self, *what: object) -> None:
        """Packages, wheels, or options of `uv pip install`."""
        uv("pip", "install", "--python", self.python, *what)

    def facts(self) -> dict[str, Any]:
        """The versions installed."""
        return json.loads(run(self.python, "-c", VERSIONS, cwd=WORK))

    def smoke(self, wheel: Path) -> str:
        """Install the wheel and run its op; what its library says it was built for, or why it is not there."""
        self.install("--reinstall-package", "amskv_kernels", wheel)
        return run(self.python, "-c", SMOKE, cwd=self.folder).strip().partition(" - ")[2]
