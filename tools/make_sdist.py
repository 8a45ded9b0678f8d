"""Builds the source distribution into dist/, from the files that git tracks, and tries it in empty environments.

    python -m tools.make_sdist [--try python3.10 python3.12 …]

Each interpreter gets an environment of its own, which is removed again: `pip install` of the archive with all that it
needs, `amskv doctor`, one generation. AMSKV_CUDA chooses as for any install (see setup.py).
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path

from amskv_kernels.cli import console

ROOT = Path(__file__).parents[1]
DIST = ROOT / "dist"

GENERATION = """
import torch
from amskv_kernels import AMSKV, CachePlan, PagedKVCache, ScaleSchedule
from amskv_kernels.models import VAR, VQVAE, VARConfig, VQVAEConfig

schedule = ScaleSchedule([(1, 1), (2, 2), (3, 3), (4, 4)])
var = VAR(VARConfig(schedule, depth=2, embed_dim=128, num_heads=2, vocab_size=64, z_channels=8, num_classes=10)).eval()
vae = VQVAE(VQVAEConfig(ch=32, ch_mult=(1, 1), num_res_blocks=1, z_channels=8, vocab_size=64, schedule=schedule)).eval()
plan = CachePlan.build(schedule, AMSKV.for_saving(schedule, 2, 0.5), 2)
cache = PagedKVCache(plan, batch=4, kv_heads=2, head_dim=64, dtype=torch.float32)
images = var.generate(vae, torch.tensor([1, 2]), cache, top_k=16).images
assert images.shape == (2, 3, 8, 8) and bool(images.isfinite().all())
print("drawn", tuple(images.shape), "torch", torch.__version__)
"""


def build(out: Path = DIST) -> Path:
    """The archive, made from tracked files alone: an old list of sources, as builds leave it behind, plays no part."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    with tempfile.TemporaryDirectory() as folder:
        for name in filter(None, listed.split("\0")):
            if (ROOT / name).exists():
                (Path(folder) / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / name, Path(folder) / name)
        out.mkdir(parents=True, exist_ok=True)
        command = "import sys; from setuptools.build_meta import build_sdist; print(build_sdist(sys.argv[1]))"
        done = subprocess.run(
            [sys.executable, "-c", command, str(out)], cwd=folder, capture_output=True, text=True, check=True
        )
    return out / done.stdout.splitlines()[-1]


def names(archive: Path) -> set[str]:
    """The files in it, as they lie in the project."""
    with tarfile.open(archive) as content:
        return {member.name.partition("/")[2] for member in content if member.isfile()}


def attempt(archive: Path, python: str) -> None:
    """Install it into an empty environment of an interpreter, and use it there.

    Raises:
        subprocess.CalledProcessError: something failed; its output has been shown.
    """
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([python, "-m", "venv", folder], check=True)
        own = Path(folder) / "bin"
        for command in (
            [own / "pip", "install", "--quiet", "--no-cache-dir", archive],  # not a wheel of an earlier try
            [own / "amskv", "doctor"],
            [own / "python", "-c", GENERATION],
        ):
            subprocess.run(command, check=True, cwd=folder)  # not where the sources lie


def main(argv: Sequence[str] | None = None) -> int:
    """Build, then try; 1 where a try failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--try", dest="tried", nargs="*", default=[], metavar="PYTHON", help="interpreters to try it on"
    )
    options = parser.parse_args(argv)
    archive = build()
    print(f"{archive}: {archive.stat().st_size / 1e6:.1f} MB, {len(names(archive))} files", flush=True)
    failed = []
    for python in options.tried:
        try:
            attempt(archive, python)
        except (OSError, subprocess.CalledProcessError) as error:
            failed.append(f"{python}: {error}")
    print("\n".join(failed) or f"tried on {' '.join(options.tried) or 'no interpreter'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(console.run(main))
