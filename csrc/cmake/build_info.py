"""Writes build_info.h: what the library was built for and what its kernels take, read from ptxas's own reports."""

from __future__ import annotations

import argparse
import json
import re
import subprocess
from pathlib import Path

ENTRY = re.compile(r"Compiling entry function '(\w+)' for 'sm_(\d+a?)'")
FRAME = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")
USED = re.compile(r"Used (\d+) registers(?:.*?(\d+) bytes smem)?")
SERIALISED = re.compile(r"wgmma.mma_async instructions are serialized .* function '(\w+)'")
NAME = re.compile(r"(hopper::)?(\w+)_kernel(?:<amskv::\w*Tile<(?:amskv::)?(\w+), (\d+)(?:, (\d+), (\w+))?>\s*>)?")


def kernels(log: str) -> list[dict[str, object]]:
    """One entry per kernel and architecture; `shared` counts static bytes, the rest is asked for at the launch.

    `serialised` tells whether ptxas found no way to keep products under way.
    """
    found: list[dict[str, object]] = []
    serialised = set(SERIALISED.findall(log))
    for line in log.splitlines():
        if match := ENTRY.search(line):
            found.append({"name": readable(match[1]), "architecture": _dotted(match[2])})
            found[-1]["serialised"] = match[1] in serialised
        elif match := FRAME.search(line):
            found[-1]["spill"] = int(match[1]) + int(match[2])
        elif match := USED.search(line):
            found[-1]["registers"] = int(match[1])
            found[-1]["shared"] = int(match[2] or 0)
    return found


def readable(symbol: str) -> str:
    full = subprocess.run(["c++filt", symbol], capture_output=True, text=True, check=True).stdout.strip()
    match = NAME.search(full)
    if match is None:
        return full
    hopper, name, dtype, head_dim, rows, int8_pages = match.groups()
    if dtype is None:
        return name
    pages = ", int8 pages" if int8_pages == "true" else ""
    return f"{name}<{dtype}, head_dim {head_dim}, {'Hopper' if hopper else f'{rows} rows per warp{pages}'}>"


def _dotted(architecture: str) -> str:
    """ "90a" → "9.0a"."""
    return re.sub(r"(\d)(a?)$", r".\1\2", architecture)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--version", required=True)
    parser.add_argument("--cuda", required=True)
    parser.add_argument("--architectures", required=True, help="for people: 8.0, 9.0a, PTX 8.0")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("logs", nargs="+", type=Path)
    args = parser.parse_args()
    entries = [entry for log in args.logs for entry in kernels(log.read_text())]
    info = {
        "version": args.version,
        "cuda": args.cuda,
        "architectures": args.architectures,
        "kernels": sorted(entries, key=lambda e: (e["name"], e["architecture"])),
    }
    lines = ",\n".join(json.dumps(entry) for entry in info.pop("kernels"))
    text = f'{json.dumps(info)[:-1]}, "kernels": [\n{lines}\n]}}'
    args.out.write_text(
        "// Written by csrc/cmake/build_info.py.\n#pragma once\n\nnamespace amskv {\n\n"
        f"inline constexpr char kCudaVersion[] = {json.dumps(args.cuda)};\n"
        f"inline constexpr char kArchitectures[] = {json.dumps(args.architectures)};\n"
        f'inline constexpr char kBuildInfo[] = R"json({text})json";\n\n}}  // namespace amskv\n'
    )


if __name__ == "__main__":
    main()
