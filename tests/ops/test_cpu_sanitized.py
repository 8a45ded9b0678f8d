"""The CPU kernels without torch, under AddressSanitizer and UndefinedBehaviorSanitizer."""

import platform
import re
import shutil
import subprocess
from collections.abc import Container
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CSRC = ROOT / "csrc"
CALLS = 12  # of each kernel, type of element and instruction set
X86_SETS = ("avx2", "avx512", "avx512bf16", "amx")

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ on this machine")


def flags_of(source: str) -> list[str]:
    """What CMakeLists.txt compiles a file of csrc/cpu with, beside the flags of all."""
    text = (ROOT / "CMakeLists.txt").read_text(encoding="utf-8")
    found = re.search(rf"csrc/cpu/{source}\.cpp PROPERTIES\s+COMPILE_OPTIONS \"([^\"]+)\"", text)
    shared = re.search(r"set\(avx512 ([^)]+)\)", text)
    assert shared is not None
    return found[1].replace("${avx512}", shared[1].replace(" ", ";")).split(";") if found else []


def sets() -> list[str]:
    """The instruction sets that this g++ has for this machine's kind."""
    if platform.machine() != "x86_64":
        return ["plain"]
    newest = {name: ["g++", *flags_of(name), "-E", "-x", "c++", "/dev/null"] for name in ("avx512bf16", "amx")}
    known = [name for name, command in newest.items() if subprocess.run(command, capture_output=True).returncode == 0]
    return ["plain", "avx2", "avx512", *known]


def compile_kernels(folder: Path, *flags: str, without: Container[str] = ()) -> list[Path]:
    """Objects of csrc/cpu; those `without` flags of their own are as from a compiler that does not know them."""
    names = ("cpu", "plain") if platform.machine() != "x86_64" else ("cpu", "plain", *X86_SETS)
    known, jobs = sets(), []
    for name in names:
        own = flags_of(name) if name in known and name not in without else []
        command = ["g++", "-std=c++20", "-ffp-contract=fast", *flags, *own, f"-I{CSRC}", f"-I{CSRC}/include"]
        source, target = CSRC / "cpu" / f"{name}.cpp", folder / f"{name}.o"
        command += ["-Wall", "-Wextra", "-Werror", "-c", str(source), "-o", str(target)]
        jobs.append(subprocess.Popen(command, stderr=subprocess.PIPE, text=True))
    for job in jobs:
        errors = job.communicate()[1]
        assert job.returncode == 0, errors
    return [folder / f"{name}.o" for name in names]


def build_driver(folder: Path, objects: list[Path], *flags: str) -> Path:
    """The program that makes random calls."""
    command = ["g++", "-std=c++20", *flags, f"-I{CSRC}", f"-I{CSRC}/include"]
    source = Path(__file__).with_name("cpu_driver.cpp")
    subprocess.run([*command, str(source), *map(str, objects), "-o", str(folder / "driver")], check=True)
    return folder / "driver"


def test_random_calls_touch_nothing_but_their_own(tmp_path):
    flags = ("-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
    driver = build_driver(tmp_path, compile_kernels(tmp_path, *flags), *flags)
    done = subprocess.run([driver, str(CALLS)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.split()[0] == "plain"


@pytest.mark.skipif(platform.machine() != "x86_64", reason="one set alone")
def test_a_compiler_that_does_not_know_a_set_leaves_it_out(tmp_path):
    driver = build_driver(tmp_path, compile_kernels(tmp_path, "-O0", without=("avx512bf16", "amx")))
    done = subprocess.run([driver, "1"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert {"plain"} <= set(done.stdout.split()) <= {"plain", "avx2", "avx512"}


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
