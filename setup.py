"""Builds libamskv.so where it can; everything else about the package stands in pyproject.toml.

A C++ compiler is enough for its CPU kernels. Whether it has the CUDA kernels too is one switch, the environment
variable AMSKV_CUDA:
    unset   with them if an nvcc is found (CUDA_HOME, PATH, /usr/local/cuda), else without
    0       without them
    1       with them; fail if there is no nvcc
    pip     with them, built by nvcc and CUDA's headers from their PyPI packages
Without a compiler or its tools the package has no library: Triton and plain PyTorch serve.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).parent
TORCH = "torch>=2.10"
BUILD_TOOLS = ["cmake>=3.27", "ninja>=1.11"]
LEAST_CMAKE = (3, 27)  # what CMakeLists.txt asks for
# One major version: its minor ones run on each other's drivers.
CUDA_FROM_PIP = [f"nvidia-{part}==13.*" for part in ("cuda-nvcc", "cuda-crt", "cuda-runtime", "nvvm")]


def say(message: str) -> None:
    print(f"amskv_kernels: {message}", file=sys.stderr)


def find_nvcc() -> Path | None:
    """The toolkit's own nvcc."""
    roots = [Path(os.environ["CUDA_HOME"]) / "bin"] if "CUDA_HOME" in os.environ else []
    on_path = shutil.which("nvcc")
    candidates = [
        *(root / "nvcc" for root in roots),
        *([Path(on_path)] if on_path else []),
        Path("/usr/local/cuda/bin/nvcc"),
    ]
    return next((c for c in candidates if c.exists()), None)


def find_pip_nvcc() -> Path:
    """The nvcc of the PyPI packages, which unpack side by side under nvidia/cu<major>."""
    for site in dict.fromkeys([sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *sys.path]):
        for nvcc in sorted(Path(site).glob("nvidia/cu*/bin/nvcc")):
            return nvcc
    raise SystemExit(
        f"AMSKV_CUDA=pip, but no nvcc is installed: pip install {quoted(CUDA_FROM_PIP)} first, or leave out "
        f"--no-build-isolation"
    )


def quoted(packages: list[str]) -> str:
    return " ".join(f"'{package}'" for package in packages)


def find_tool(name: str) -> str | None:
    """cmake or ninja: the one of the PyPI package before the system's; None where there is none, or too old a cmake."""
    try:
        package = importlib.import_module(name)
    except ImportError:
        found = shutil.which(name)
    else:
        found = str(Path(package.CMAKE_BIN_DIR if name == "cmake" else package.BIN_DIR) / name)
    if name == "cmake" and found is not None:
        told = subprocess.run([found, "--version"], capture_output=True, text=True).stdout
        version = re.search(r"(\d+)\.(\d+)", told)
        if version is None or (int(version[1]), int(version[2])) < LEAST_CMAKE:
            return None
    return found


def tools_missing() -> str | None:
    """What to do where something to build with is missing or too old; None where it is there, or pip will fetch it."""
    if shutil.which(os.environ.get("CXX", "c++")) is None and shutil.which("g++") is None:
        return "no C++ compiler found (apt install g++)"
    if "egg_info" in sys.argv:
        return None
    packages = [each for each in BUILD_TOOLS if find_tool(each.split(">")[0]) is None]
    if importlib.util.find_spec("torch") is None:
        packages.append(TORCH)
    return f"building libamskv.so needs newer tools: pip install {quoted(packages)}" if packages else None


def with_cuda() -> bool:
    """Whether the library is to have the CUDA kernels."""
    switch = os.environ.get("AMSKV_CUDA", "")
    if switch not in ("", "0", "1", "pip"):
        raise SystemExit(f"AMSKV_CUDA is {switch!r}; it must be 0, 1, pip or unset")
    if switch == "1" and find_nvcc() is None:
        raise SystemExit("AMSKV_CUDA=1, but no nvcc in CUDA_HOME, PATH or /usr/local/cuda; AMSKV_CUDA=pip takes PyPI's")
    return switch in ("1", "pip") or (switch == "" and find_nvcc() is not None)


def insisted() -> bool:
    """Whether an install without the library would not be what was asked for."""
    return os.environ.get("AMSKV_CUDA", "") in ("1", "pip")


def buildable() -> bool:
    """Whether there is what the library is built with; fails where it was insisted on."""
    cuda, missing = with_cuda(), tools_missing()
    if missing is None:
        if not cuda:
            say("libamskv.so without CUDA kernels: no nvcc, or AMSKV_CUDA=0 (AMSKV_CUDA=pip takes PyPI's nvcc)")
        return True
    if insisted():
        raise SystemExit(missing)
    say(f"{missing}; installing without it, Triton and plain PyTorch serve")
    return False


def build_requirements() -> list[str]:
    if not buildable():
        return []
    return [TORCH, *BUILD_TOOLS, *(CUDA_FROM_PIP if os.environ.get("AMSKV_CUDA") == "pip" else [])]


def build_library(tree: Path, nvcc: Path | None, *options: str) -> Path:
    """libamskv.so, built in `tree` for this torch, with CUDA kernels where nvcc is given; `options` are CMake's."""
    import torch

    say(f"building libamskv.so {f'with {nvcc}' if nvcc else 'for the CPU'}")
    cuda = f"-DCMAKE_CUDA_COMPILER={nvcc}" if nvcc else "-DAMSKV_CUDA=OFF"
    configure = [
        find_tool("cmake"), "-S", str(ROOT), "-B", str(tree), "-G", "Ninja",
        f"-DCMAKE_MAKE_PROGRAM={find_tool('ninja')}", cuda,
        f"-DAMSKV_TORCH_ROOT={Path(torch.__file__).parent}", f"-DPython3_EXECUTABLE={sys.executable}", *options,
    ]  # fmt: skip
    for command in (configure, [configure[0], "--build", str(tree), "--target", "amskv_torch"]):
        subprocess.run(command, check=True)
    return tree / "libamskv.so"


class BuildLibrary(build_ext):
    """Runs CMake and puts libamskv.so into the package."""

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split(".")).with_suffix(".so"))

    def build_extension(self, ext: Extension) -> None:
        from_pip = os.environ.get("AMSKV_CUDA") == "pip"
        nvcc = None if not with_cuda() else find_pip_nvcc() if from_pip else find_nvcc()
        tree = ROOT / "build" / ("cuda-pip" if from_pip else "cuda" if nvcc else "cpu")
        try:
            library = build_library(tree, nvcc)
        except subprocess.CalledProcessError as error:  # setuptools goes on without an extension that is optional
            raise CompileError(f"libamskv.so was not built: {error}") from error
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(library, target)


class AnyPythonWheel(bdist_wheel):
    """The library sees no Python: its wheel depends on the platform alone."""

    def get_tag(self) -> tuple[str, str, str]:
        return ("py3", "none", super().get_tag()[2])


if __name__ == "__main__":
    setup(
        ext_modules=[Extension("amskv_kernels.libamskv", sources=[], optional=not insisted())] if buildable() else [],
        cmdclass={"build_ext": BuildLibrary, "bdist_wheel": AnyPythonWheel},
        setup_requires=build_requirements() if "egg_info" in sys.argv else [],
    )
