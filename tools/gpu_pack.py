"""`make gpu-pack`: what a GPU machine without a network lacks, in build/gpu-pack, beside this checkout.

    python -m tools.gpu_pack [--wheel NAME==VERSION …]

Two builds of the CUDA library, the one that ships and one whose waits trap instead of hanging; the wheels named, for
Python 3.12, unpacked into site/ without their needs; and manifest.json with the commit, the sources' digest, every
file's size, and which build's products ptxas serialised. `python -m tools.gpu_session` finds it there.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from amskv_kernels.cli import console
from benchmarks.harness import machine
from tools.gpu_session.run_tests import RELEASE, TRAPS
from tools.gpu_session.session import PACK, ROOT
from tools.make_wheel import audit

MOST_BYTES = 64 << 20
# A wait polls every 20 ns to 20 µs, the longest that a right one lasts is a kernel's run: milliseconds.
TRAP_AFTER = 1 << 20
# What its Python is: 3.12 on x86-64, of any glibc up to Ubuntu 24.04's.
PLATFORMS = ("manylinux2014_x86_64", *(f"manylinux_2_{minor}_x86_64" for minor in (17, 24, 27, 28, 31, 34, 35, 39)))


def build(pack: Path) -> list[str]:
    """Both libraries, each from a build folder of its own; those in which ptxas serialised products."""
    sys.path[:0] = [str(ROOT), str(ROOT / "csrc" / "cmake")]
    from build_info import kernels

    from setup import build_library, find_nvcc

    nvcc = find_nvcc()
    if nvcc is None:
        raise SystemExit("gpu-pack needs nvcc, in CUDA_HOME, PATH or /usr/local/cuda")
    serialised = []
    for name, folder, options in (
        (RELEASE, "cuda", ()),
        (TRAPS, "cuda-traps", (f"-DAMSKV_TRAP_AFTER={TRAP_AFTER}",)),
    ):
        library = build_library(ROOT / "build" / folder, nvcc, *options)
        audit(library)
        shutil.copyfile(library, pack / name)
        logs = [log.read_text(encoding="utf-8") for log in library.parent.rglob("*.cu.o.log")]
        if any(kernel["serialised"] for log in logs for kernel in kernels(log)):
            serialised.append(name)
    return serialised


def fetch(wheels: Sequence[str], site: Path) -> None:
    """The wheels alone, unpacked."""
    with tempfile.TemporaryDirectory() as folder:
        platforms = [f"--platform={name}" for name in PLATFORMS]
        subprocess.run(
            [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--pre",
             "--python-version=3.12", "--implementation=cp", *platforms, "--dest", folder, *wheels],
            check=True,
        )  # fmt: skip
        for wheel in Path(folder).glob("*.whl"):
            shutil.unpack_archive(wheel, site, "zip")


def manifest(pack: Path) -> dict[str, object]:
    """What is in it, and of which state of the project."""
    commit, changed = machine.commit()
    files = {str(path.relative_to(pack)): path.stat().st_size for path in sorted(pack.rglob("*")) if path.is_file()}
    shown = {name: size for name, size in files.items() if not name.startswith("site/")}
    return {
        "commit": commit, "changed": changed, "sources": machine.sources(),
        "made": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "bytes": sum(files.values()), "files": shown,
    }  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Make the pack anew; 1 where it is too large to be carried."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wheel", nargs="*", default=[], help="what that machine's Python lacks; its needs too")
    options = parser.parse_args(argv)
    shutil.rmtree(PACK, ignore_errors=True)
    PACK.mkdir(parents=True)
    serialised = build(PACK)
    if options.wheel:
        fetch(options.wheel, PACK / "site")
    facts = manifest(PACK) | {"wheels": options.wheel, "serialised": serialised}
    (PACK / "manifest.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    print(f"{PACK.relative_to(ROOT)}: {facts['bytes'] / 2**20:.1f} MiB of {facts['commit'][:12]}")
    if facts["bytes"] > MOST_BYTES:
        print(f"more than {MOST_BYTES >> 20} MiB cannot be carried", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(console.run(main))
