"""A clean folder in which a GPU session can be rehearsed: the session's own files, and stand-ins for all that it runs.

The stand-ins pass, fail, hang, die and break the GPU's context; what is under test is what the session makes of it.
"""

from __future__ import annotations

import shutil
from pathlib import Path

ROOT = Path(__file__).parents[2]
REAL = ("pyproject.toml", "tools/__init__.py", "tools/gpu_session", "tests/gpu/conftest.py",
        "amskv_kernels/cli/console.py")  # fmt: skip

TORCH = """
class cuda:
    broken = False
    is_available = staticmethod(lambda: True)

    @staticmethod
    def synchronize():
        if cuda.broken:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
"""
MACHINE = """
describe = lambda device: {"name": "Stand-in GPU"}
slug = lambda facts: "stand-in-gpu"
commit = lambda: ("0" * 40, False)
sources = lambda: "abc"
"""
# Every test leaves a line in ran.txt when it is done, which is held against what was written down of it.
PREAMBLE = """
import os, signal, time, pytest, torch
pytestmark = pytest.mark.gpu

@pytest.fixture(autouse=True)
def ran(request):
    yield
    with open("ran.txt", "a") as file:
        file.write(request.node.nodeid + "\\n")
"""
TRITON = """
def test_first_triton(): pass
@pytest.mark.parametrize("i", range(20))
def test_attn(i): time.sleep(0.05)
def test_hangs(): time.sleep(600)
def test_dies(): os.kill(os.getpid(), signal.SIGSEGV)
def test_breaks_the_context():
    torch.cuda.broken = True
    raise RuntimeError("launch failed")
def test_after_the_break(measured): measured["worst"] = 1.5
def test_fails(): assert 1 == 2, "one is not two"
"""
NATIVE = """
def test_first_portable(): pass
def test_first_hopper(): assert open("amskv_kernels/libamskv.so").read() == "traps"
@pytest.mark.parametrize("i", range(10))
def test_portable_random(i): assert open("amskv_kernels/libamskv.so").read() == "release"
def test_hopper(): assert False, "wrong"
def test_hopper_large(): pass
def test_hopper_random(): pass
"""
POLICIES = "def test_keeps(): pass\ndef test_second_gpu(): pytest.skip('one GPU')\n"
# Dies the first time, as a call that kills its process; goes on from its file the second time.
BENCHMARKS = """
import json, os, signal, sys
out = sys.argv[sys.argv.index("--out") + 1]
rows = json.load(open(out))["rows"] if os.path.exists(out) else []
with open(out, "w") as file:
    json.dump({"rows": rows + [len(rows)]}, file)
if not rows:
    os.kill(os.getpid(), signal.SIGKILL)
"""
TUNE = """
import sys
with open(sys.argv[sys.argv.index("--out") + 1], "a") as file:
    file.write('{"best": 1}\\n')
"""
NCU = """#!/bin/sh
for last; do [ "$before" = --log-file ] && out=$last; before=$last; done
[ "$last" = hopper ] && exit 1
cat > "$out" <<EOF
==PROF== connected
"ID","Metric Name","Metric Unit","Metric Value"
"0","Duration","us","12.5"
"0","Other","","1"
EOF
"""
SANITIZER = """#!/bin/sh
tool=$2
shift 4
"$@" || exit $?
[ "$tool" != racecheck ] || exit 9
"""


def write(path: Path, text: str, mode: int = 0o644) -> None:
    """A file, with its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    path.chmod(mode)


def build(tree: Path) -> Path:
    """Make the folder; its `bin` has all programs that the session may find."""
    for name in REAL:
        source, target = ROOT / name, tree / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, target)
    files = {
        "torch.py": TORCH, "benchmarks/__init__.py": "", "benchmarks/harness/__init__.py": "",
        "benchmarks/harness/machine.py": MACHINE, "benchmarks/__main__.py": BENCHMARKS, "tools/tune.py": TUNE,
        "tests/gpu/test_triton_gpu.py": PREAMBLE + TRITON, "tests/gpu/test_native_gpu.py": PREAMBLE + NATIVE,
        "tests/gpu/test_policies_gpu.py": PREAMBLE + POLICIES,
        "amskv_kernels/__init__.py": "", "amskv_kernels/cli/__init__.py": "",
        "build/gpu-pack/libamskv.so": "release", "build/gpu-pack/libamskv-traps.so": "traps",
        "build/gpu-pack/manifest.json": '{"commit": "abc", "changed": false, "sources": "abc"}',
        # Found by every Python that the session starts: nothing may ask for the network.
        "build/gpu-pack/site/sitecustomize.py": "import socket\nsocket.socket.connect = None\n",
    }  # fmt: skip
    for name, text in files.items():
        write(tree / name, text)
    for name, text in {"ncu": NCU, "compute-sanitizer": SANITIZER}.items():
        write(tree / "bin" / name, text, 0o755)
    return tree
