"""`amskv doctor`: what this machine has, and which backend serves which op on it."""

from __future__ import annotations

import argparse
import json
import platform
import textwrap
from importlib import metadata
from typing import Any

import torch
import torch.distributed as dist

from amskv_kernels import ops
from amskv_kernels.cli.arguments import command
from amskv_kernels.ops.backends import library
from amskv_kernels.planning.memory import counted
from amskv_kernels.version import __version__

WIDTH = 100  # columns of the printed report

EPILOG = "next: amskv plan --model var-d30 --policy ams-kv:75 --images 64"


def add(commands: Any) -> None:
    """Add the command to the parser's."""
    doctor = command(commands, "doctor", "versions, devices, and which backend serves which op", EPILOG)
    doctor.add_argument("--json", action="store_true", help="print all of it as JSON")
    doctor.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Look around, and print what was found."""
    facts = diagnose()
    print(json.dumps(facts, indent=2) if arguments.json else render(facts))
    return 0


def diagnose() -> dict[str, dict[str, str]]:
    """Versions, devices, and per device type and op the backend chosen with its reason."""
    devices = {"cpu": f"{platform.machine()}, {counted(torch.get_num_threads(), 'thread')}"}
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        devices[f"cuda:{i}"] = (
            f"{properties.name}, sm_{properties.major}{properties.minor}, {properties.total_memory / 2**30:.0f} GiB"
        )
    kinds = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    backends = {}
    for kind in kinds:
        for op in ops.SCHEMAS:
            choice = ops.choose(op, kind)
            backends[f"{op} on {kind}"] = f"{choice.backend} ({choice.reason})"
        choice = ops.choose("attn", kind, pages=torch.int8)
        backends[f"attn on {kind}, int8 pages"] = f"{choice.backend} ({choice.reason})"
    if "cuda" not in kinds:
        backends["on cuda"] = "no CUDA device is visible to this torch"
    return {
        "versions": {
            "amskv_kernels": __version__,
            "python": platform.python_version(),
            "torch": f"{torch.__version__} (CUDA {torch.version.cuda or 'none'})",
            "triton": _version("triton"),
            "numpy": _version("numpy"),
            "libamskv.so": _library(),
            "process groups": _groups(),
        },
        "devices": devices,
        "backends": backends,
    }


def render(facts: dict[str, dict[str, str]]) -> str:
    """What `diagnose` found, for people: a column of names, and what belongs to each wrapped beside it."""
    column = max(len(name) for entries in facts.values() for name in entries)
    lines = []
    for section, entries in facts.items():
        lines.append(section)
        for name, value in entries.items():
            start = f"  {name:<{column}}  "
            lines += textwrap.wrap(
                value, WIDTH, initial_indent=start, subsequent_indent=" " * len(start), break_on_hyphens=False
            )
    return "\n".join(lines)


def _library() -> str:
    if (reason := library.why_not_loaded()) is not None:
        return reason.removeprefix("libamskv.so ")
    sets = f"loaded, for the CPU with {', '.join(library.instruction_sets())}"
    if (reason := library.why_no_cuda()) is not None:
        return f"{sets}; {reason.removeprefix('libamskv.so was ')}"
    built = library.build_info()
    return f"{sets}; built with CUDA {built['cuda']} for {built['architectures']}"


def _groups() -> str:
    """What sharded models may speak over."""
    known = ("gloo", "nccl", "mpi", "xccl") if dist.is_available() else ()
    return ", ".join(name for name in known if dist.is_backend_available(name)) or "none: this torch has no distributed"


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"
