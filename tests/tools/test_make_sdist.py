"""The source distribution holds what the library is built from."""

import re
import subprocess
from pathlib import Path

from tools import make_sdist

ROOT = Path(__file__).parents[2]


def test_everything_that_the_build_reads_is_in_the_archive(tmp_path):
    found = make_sdist.names(make_sdist.build(tmp_path))
    cmake = (ROOT / "CMakeLists.txt").read_text(encoding="utf-8")
    named = set(re.findall(r"csrc/[\w./-]+\.\w+", cmake))
    assert named
    assert {"CMakeLists.txt", "amskv_command.py", "setup.py", "pyproject.toml", "LICENSE", "README.md"} | named <= found
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split(
        "\n"
    )
    assert {name for name in tracked if name.startswith(("csrc/", "amskv_kernels/"))} <= found
    assert not any(name.endswith((".so", ".pyc")) for name in found)


def test_the_generation_that_tries_an_install_runs():
    exec(compile(make_sdist.GENERATION, "generation", "exec"), {})
