"""What a run ran on: written into every result, so that no figure goes without its machine."""

from __future__ import annotations

import hashlib
import os
import platform
import re
import subprocess
from importlib import metadata
from pathlib import Path

import torch

from amskv_kernels.planning.memory import counted

SOURCES = (".py", ".json", ".cu", ".cuh", ".h", ".cpp")
ROOT = Path(__file__).parents[2]


def cpu_name() -> str:
    """The processor's own name where the system tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def describe(device: str) -> dict[str, object]:
    """The device, its processor and its software."""
    facts: dict[str, object] = {
        "device": device,
        "name": cpu_name(),
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "isa": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "cuda": torch.version.cuda,
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        facts |= {
            "name": properties.name,
            "arch": f"sm_{properties.major}{properties.minor}",
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "processors": properties.multi_processor_count,
            "l2_mib": properties.L2_cache_size / 2**20,
            "driver": (_nvidia_smi("driver_version") or ["unknown"])[0],
        }
    return facts


def summary(machine: dict) -> str:
    """One phrase for captions."""
    if machine["device"] == "cpu":
        return f"{machine['name']}, {counted(machine['threads'], 'thread')}, torch {machine['torch']}"
    return f"{machine['name']}, driver {machine['driver']}, torch {machine['torch']}, Triton {machine['triton']}"


def slug(machine: dict) -> str:
    """The machine's name as a file name."""
    name = machine["name"] if machine["device"] == "cuda" else f"{machine['name']} {machine['threads']} threads"
    return re.sub(r"[^a-z0-9]+", "-", str(name).lower()).strip("-")


def clocks(device: str) -> dict[str, str]:
    """The GPU's clocks, temperature and power now; read, never set."""
    fields = ("clocks.sm", "clocks.mem", "temperature.gpu", "power.draw")
    values = _nvidia_smi(",".join(fields)) if device == "cuda" else None
    return dict(zip(fields, values, strict=False)) if values else {}


def commit() -> tuple[str, bool]:
    """The commit measured, and whether the tree differs from it; AMSKV_COMMIT names it where there is no git."""
    head = _output("git", "rev-parse", "HEAD")
    if head is None:
        return os.environ.get("AMSKV_COMMIT", "unknown"), False
    changed = _output(
        "git", "status", "--porcelain", "--untracked-files=no", "--", "amskv_kernels", "csrc", "benchmarks"
    )
    return head, bool(changed)


def sources() -> str:
    """A digest of everything that decides what is measured; it tells two states of one commit apart."""
    digest = hashlib.sha256()
    for folder in ("amskv_kernels", "benchmarks", "csrc"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in SOURCES and path.is_file() and "results" not in path.parts:
                digest.update(str(path.relative_to(ROOT)).encode())
                digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def _nvidia_smi(fields: str) -> list[str] | None:
    line = _output("nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader", "--id=0")
    return [value.strip() for value in line.split(",")] if line else None


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
