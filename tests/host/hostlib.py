"""Builds csrc/ for the host executor with g++, and loads it; the build is kept under build/host."""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from types import ModuleType

import pybind11
import torch

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
BUILD = HERE.parents[1] / "build" / "host"
KERNELS = ("portable/attn.cu", "hopper/attn.cu", "portable/append.cu", "common/plan.cpp")
EXECUTOR = ("executor.cpp", "executor_async.cpp")
# A GPU's compiler fuses multiplications with additions: so must this one, where the CPU can.
FUSES = "fma" in Path("/proc/cpuinfo").read_text().split()
FLAGS = ("-std=c++20", "-O2", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas",
         "-DTORCH_TARGET_VERSION=0x020a000000000000", *(("-mfma", "-ffp-contract=fast") if FUSES else ()))  # fmt: skip


@cache
def load() -> ModuleType:
    """The kernels as they are."""
    return _module(CSRC)


def load_with_fault(file: str, text: str, replacement: str, scratch: Path) -> ModuleType:
    """The kernels with one line of one file changed; everything that does not see it is reused."""
    source = (CSRC / file).read_text()
    assert source.count(text) == 1, f"{text!r} stands {source.count(text)} times in {file}"
    faulty = scratch / "csrc"
    shutil.copytree(CSRC, faulty)
    (faulty / file).write_text(source.replace(text, replacement))
    return _module(faulty)


@cache
def op_library() -> Path:
    """libamskv.so with the executor in CUDA's place: binding/ops.cpp as it is, loaded in a process of its own."""
    sources = [
        *(CSRC / name for name in (*KERNELS, "binding/ops.cpp")),
        *(HERE / n for n in (*EXECUTOR, "host_device.cpp")),
    ]
    torch_root = Path(torch.__file__).parent
    return _link(sources, CSRC, "libamskv.so", [f"-L{torch_root}/lib", "-ltorch_cpu", "-ldl"])


def _module(csrc: Path) -> ModuleType:
    sources = [*(csrc / name for name in KERNELS), *(HERE / name for name in (*EXECUTOR, "binding.cpp"))]
    library = _link(sources, csrc, f"amskv_host{sysconfig.get_config_var('EXT_SUFFIX')}", [])
    # A name of its own: pybind11 hands back the module it has already made under a name.
    spec = importlib.util.spec_from_file_location(f"{library.parent.name}.amskv_host", library)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _link(sources: list[Path], csrc: Path, name: str, flags: list[str]) -> Path:
    BUILD.mkdir(parents=True, exist_ok=True)
    with open(BUILD / "lock", "w") as lock:  # test processes run side by side
        fcntl.flock(lock, fcntl.LOCK_EX)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(lambda source: _compile(source, csrc), sources))
        library = BUILD / _digest(objects) / name
        if not library.exists():
            library.parent.mkdir(exist_ok=True)
            _run(["g++", "-shared", *map(str, objects), *flags, "-o", str(library)])
    return library


def _compile(source: Path, csrc: Path) -> Path:
    includes = [csrc, csrc / "include", HERE]
    system = [pybind11.get_include(), sysconfig.get_path("include"), Path(torch.__file__).parent / "include"]
    seen = [source, *HERE.glob("*.h"), *csrc.glob("include/amskv/*")]
    if source.parent != HERE:
        seen += [*csrc.rglob("*.cuh"), *csrc.rglob("*.h")]
    target = BUILD / f"{source.stem}-{_digest(seen)}.o"
    if not target.exists():
        paths = [*(f"-I{path}" for path in includes), *(f"-isystem{path}" for path in system)]
        _run(["g++", *FLAGS, *paths, "-x", "c++", "-c", str(source), "-o", f"{target}.part"])
        os.replace(f"{target}.part", target)
    return target


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")


def _digest(paths: list[Path]) -> str:
    digest = hashlib.sha256(" ".join(FLAGS).encode())
    for path in sorted(paths, key=lambda p: p.name):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]
