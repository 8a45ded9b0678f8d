"""Builds the CUDA library where it can; everything else about the package stands in pyproject.toml.

One switch, the environment variable AMSKV_CUDA:
    unset   build the library if an nvcc is found (CUDA_HOME, PATH, /usr/local/cuda), else go without it
    0       go without it: the Triton and CPU backends need no compiler
    1       build it; fail if there is no nvcc
    pip     build it with nvcc and CUDA's headers from their PyPI packages
"""

from __future__ import annotations

import importlib
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
    """What to do where the build tools are missing or too old; None where they are there, or pip will fetch them."""
    if all(find_tool(name) for name in ("cmake", "ninja")) or "egg_info" in sys.argv:
        return None
    return f"building the CUDA library needs newer tools: pip install {quoted(BUILD_TOOLS)}"


def wanted() -> bool:
    """Whether to build the library."""
    switch = os.environ.get("AMSKV_CUDA", "")
    if switch not in ("", "0", "1", "pip"):
        raise SystemExit(f"AMSKV_CUDA is {switch!r}; it must be 0, 1, pip or unset")
    if switch == "" and find_nvcc() is None:
        say("no nvcc found, so no CUDA library; the Triton and CPU backends remain (AMSKV_CUDA=pip takes PyPI's nvcc)")
    if switch == "1" and find_nvcc() is None:
        raise SystemExit("AMSKV_CUDA=1, but no nvcc in CUDA_HOME, PATH or /usr/local/cuda; AMSKV_CUDA=pip takes PyPI's")
    return switch in ("1", "pip") or (switch == "" and find_nvcc() is not None)


def buildable() -> bool:
    """Whether the library is wanted and its tools are there; fails where it was insisted on."""
    if not wanted() or (missing := tools_missing()) is None:
        return wanted()
    if os.environ.get("AMSKV_CUDA", ""):
        raise SystemExit(missing)
    say(f"{missing}; installing without it, the Triton and CPU backends remain")
    return False


def build_requirements() -> list[str]:
    if not wanted():
        return []
    return [TORCH, *BUILD_TOOLS, *(CUDA_FROM_PIP if os.environ.get("AMSKV_CUDA") == "pip" else [])]


def build_library(tree: Path, nvcc: Path | None, *options: str) -> Path:
    """libamskv.so, built in `tree` against this Python's torch; `options` are CMake's."""
    import torch

    say(f"building the CUDA library with {nvcc}")
    configure = [
        find_tool("cmake"), "-S", str(ROOT), "-B", str(tree), "-G", "Ninja",
        f"-DCMAKE_MAKE_PROGRAM={find_tool('ninja')}", f"-DCMAKE_CUDA_COMPILER={nvcc}",
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
        nvcc = find_pip_nvcc() if from_pip else find_nvcc()
        library = build_library(ROOT / "build" / ("cuda-pip" if from_pip else "cuda"), nvcc)
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(library, target)


class AnyPythonWheel(bdist_wheel):
    """The library sees no Python: its wheel depends on the platform alone."""

    def get_tag(self) -> tuple[str, str, str]:
        return ("py3", "none", super().get_tag()[2])


if __name__ == "__main__":
    setup(
        ext_modules=[Extension("amskv_kernels.libamskv", sources=[])] if buildable() else [],
        cmdclass={"build_ext": BuildLibrary, "bdist_wheel": AnyPythonWheel},
        setup_requires=build_requirements() if "egg_info" in sys.argv else [],
    )
