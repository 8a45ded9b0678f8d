"""Tells what the compiled kernels are made of: registers, spills and the instructions that matter, per kernel.

    python csrc/tools/disassemble.py [build/cuda/libamskv.so]

Needs cuobjdump, of a CUDA toolkit or of the triton package. Exits with an error where a kernel
touches local memory or lacks an instruction it is written for.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[2]
# SASS mnemonic → what it is: 16-byte asynchronous copy, ldmatrix, matrix product, exp2, local memory.
WATCHED = {
    "LDGSTS": "cp.async", "LDSM": "ldmatrix", "HMMA": "mma", "MUFU.EX2": "exp2", "LDL": "spill", "STL": "spill",
}  # fmt: skip
# What every attention kernel must show.
WANTED = ("LDGSTS", "LDSM", "HMMA", "MUFU.EX2")


def cuobjdump() -> str:
    found = shutil.which("cuobjdump")
    if found is None and (triton := importlib.util.find_spec("triton")) is not None:
        found = shutil.which("cuobjdump", path=str(Path(triton.origin).parent / "backends" / "nvidia" / "bin"))
    if found is None:
        raise SystemExit("no cuobjdump: put a CUDA toolkit on PATH, or pip install triton")
    return found


def counts(sass: str) -> dict[tuple[str, str], Counter[str]]:
    """(architecture, kernel) → how often each watched mnemonic stands in it."""
    found: dict[tuple[str, str], Counter[str]] = {}
    architecture, current = "", Counter()
    for line in sass.splitlines():
        if match := re.search(r"arch = sm_(\d+a?)", line):
            architecture = match[1]
        elif match := re.search(r"Function : (\w+)", line):
            current = found.setdefault((architecture, match[1]), Counter())
        elif match := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z0-9.]+)", line):
            current["instructions"] += 1
            for mnemonic in WATCHED:
                current[mnemonic] += match[1].startswith(mnemonic)
    return found


def main() -> None:
    sys.path.insert(0, str(Path(__file__).parent))
    from build_info import readable

    library = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "build" / "cuda" / "libamskv.so"
    sass = subprocess.run([cuobjdump(), "-sass", str(library)], capture_output=True, text=True, check=True).stdout
    columns = {"instructions": "instructions", **{m: f"{m} ({what})" for m, what in WATCHED.items()}}
    print(f"{'kernel':50} {'sm':>4}  " + "  ".join(columns.values()))
    wrong = []
    for (architecture, symbol), count in sorted(
        counts(sass).items(), key=lambda item: (readable(item[0][1]), item[0][0])
    ):
        name = readable(symbol)
        print(f"{name:50} {architecture:>4}  " + "  ".join(f"{count[c]:>{len(title)}}" for c, title in columns.items()))
        wrong += [f"{name} has local memory" for m in ("LDL", "STL") if count[m]]
        wrong += [f"{name} has no {m}" for m in WANTED if name.startswith("attn<") and not count[m]]
    if wrong:
        raise SystemExit("\n".join(wrong))


if __name__ == "__main__":
    main()
