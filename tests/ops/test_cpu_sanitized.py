"""The CPU kernels without torch, under AddressSanitizer and UndefinedBehaviorSanitizer."""

import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CSRC = ROOT / "csrc"
CALLS = 12  # of each kernel and instruction set

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ on this machine")


def flags_of(source: str) -> list[str]:
    """What CMakeLists.txt compiles a file of csrc/cpu with, beside the flags of all."""
    text = (ROOT / "CMakeLists.txt").read_text(encoding="utf-8")
    found = re.search(rf"csrc/cpu/{source}\.cpp PROPERTIES\s+COMPILE_OPTIONS \"([^\"]+)\"", text)
    return found[1].split(";") if found else []


def compile_kernels(folder: Path, *flags: str) -> list[Path]:
    """Objects of csrc/cpu."""
    sets = ["plain", "avx2", "avx512"] if platform.machine() == "x86_64" else ["plain"]
    jobs = []
    for name in ("cpu", *sets):
        command = ["g++", "-std=c++20", "-ffp-contract=fast", *flags, *flags_of(name), f"-I{CSRC}", f"-I{CSRC}/include"]
        command += [
            "-Wall",
            "-Wextra",
            "-Werror",
            "-c",
            str(CSRC / "cpu" / f"{name}.cpp"),
            "-o",
            str(folder / f"{name}.o"),
        ]
        jobs.append(subprocess.Popen(command, stderr=subprocess.PIPE, text=True))
    for job in jobs:
        errors = job.communicate()[1]
        assert job.returncode == 0, errors
    return [folder / f"{name}.o" for name in ("cpu", *sets)]


def test_random_calls_touch_nothing_but_their_own(tmp_path):
    flags = ("-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
    objects = compile_kernels(tmp_path, *flags)
    driver = [
        "g++",
        "-std=c++20",
        *flags,
        f"-I{CSRC}",
        f"-I{CSRC}/include",
        str(Path(__file__).with_name("cpu_driver.cpp")),
    ]
    subprocess.run([*driver, *map(str, objects), "-o", str(tmp_path / "driver")], check=True)
    done = subprocess.run([tmp_path / "driver", str(CALLS)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.split()[0] == "plain"


def test_nothing_compiled_for_one_instruction_set_leaves_its_file(tmp_path):
    """A function that the linker may share between files would run where its instructions are not known."""
    for path in compile_kernels(tmp_path, "-O0")[1:]:
        names = subprocess.run(
            ["nm", "-C", "--defined-only", str(path)], capture_output=True, text=True, check=True
        ).stdout
        shared = [line for line in names.splitlines() if line.split()[1] not in "tdrb"]
        assert [line.split()[2] for line in shared if not line.split()[2].startswith("DW.ref")] == [
            f"amskv::cpu::k{path.stem.capitalize()}"
        ], shared
