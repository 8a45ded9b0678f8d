"""The op library: its argument checks, its place behind the dispatcher, how it is found, and C++ without Python."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from amskv_kernels import native

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests" / "host"))

import cases  # noqa: E402
import hostlib  # noqa: E402
from cases import Case  # noqa: E402


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=os.environ | environment
    )


CHECKS = """
import sys, torch
from amskv_kernels import checks
torch.ops.load_library(LIBRARY)

def arguments(dtype=torch.bfloat16, D=64, batch=1, n=4, heads=2, kv_heads=2, page_size=16):
    table = lambda *shape: torch.zeros(shape, dtype=torch.int32)
    q, k = torch.zeros(batch, n, heads, D, dtype=dtype), torch.zeros(batch, n, kv_heads, D, dtype=dtype)
    pages = torch.zeros(4, 2, page_size, D, dtype=dtype)
    return [q, k, k.clone(), pages, table(batch, kv_heads), table(1, 1, 0), table(1, 1, 2), 1.0]

def changed(index, value):
    args = arguments()
    args[index] = value(args[index]) if callable(value) else value
    return args

wrong = {
    "q": [changed(0, lambda x: x[0]), changed(0, lambda x: x.half()), changed(0, lambda x: x[:, :3]),
          arguments(heads=3)],
    "k": [changed(1, lambda x: x[..., :1].expand(x.shape)), changed(1, lambda x: x.half())],
    "v": [changed(2, lambda x: x[:, :, :1]), changed(2, lambda x: x.half())],
    "pages": [changed(3, lambda x: x[:, :1]), changed(3, lambda x: x[:, :, :8]), changed(3, lambda x: x[:, :, ::2])],
    "arena": [changed(4, lambda x: x[:, :1]), changed(4, lambda x: x.long())],
    "read_slots": [changed(5, lambda x: x[0]), changed(5, lambda x: x.expand(1, 3, 0))],
    "write_slots": [changed(6, lambda x: x.long()), changed(6, lambda x: x.repeat(1, 1, 2)[..., ::2])],
    "softmax_scale": [changed(7, 0.0), changed(7, float("nan"))],
}
for name, calls in wrong.items():
    for args in calls:
        try:
            checks.check_attn(*args)
        except (TypeError, ValueError) as error:
            expected = str(error).split(" ")[0]
        else:
            raise SystemExit(f"Python's checks take a wrong {name}")
        try:
            torch.ops.amskv.attn_cuda(*args)
        except ValueError as error:
            assert str(error).split(" ")[0] == expected, (expected, str(error))
        else:
            raise SystemExit(f"the library takes a wrong {name}")

for args, what in ((arguments(D=80), "head_dim 80"), (arguments(torch.float32), "Float")):
    try:
        torch.ops.amskv.attn_cuda(*args)
    except ValueError as error:
        assert what in str(error), error
    else:
        raise SystemExit(f"the library takes {what}")

import json
info = json.loads(torch.ops.amskv.build_info())
assert [(t["head_dim"], t["rows_per_warp"]) for t in info["tiles"]] == [(d, r) for d in (64, 96, 128) for r in (16, 32)]
assert all(2 * (t["shared"] + 1024) <= 164 * 1024 for t in info["tiles"]), "two blocks must fit an sm_80"

cuda = lambda: [x for x in torch._C._dispatch_dump("amskv::attn").splitlines() if x.startswith("CUDA: ")]
before = cuda()
torch.ops.amskv.serve_cuda(True)
assert "ops.cpp" in cuda()[0], cuda()
torch.ops.amskv.serve_cuda(False)
assert cuda() == before
print("fine")
"""


CALLS = """
import sys
sys.path.insert(0, "tests/host")
import torch, cases
from cases import Case
torch.ops.load_library(LIBRARY)

def same(case, change=lambda inputs: None):
    library, python = cases.make(case), cases.make(case)
    change(library), change(python)
    out, lse = torch.ops.amskv.attn_cuda(*library.tables, library.scale)
    expected_out, expected_lse = torch.ops.amskv.attn(*python.tables, python.scale)
    assert out.is_contiguous() and lse.dtype == torch.float32
    torch.testing.assert_close(out, expected_out, atol=2e-2, rtol=2e-2)
    torch.testing.assert_close(lse, expected_lse, atol=2e-2, rtol=0)
    assert torch.equal(library.pages.view(torch.int16), python.pages.view(torch.int16))

def misalign(inputs):  # rows that begin at odd elements
    for name in "qkv":
        x = getattr(inputs, name)
        wide = torch.zeros(*x.shape[:3], x.shape[3] + 1, dtype=x.dtype)
        wide[..., 1:] = x
        setattr(inputs, name, wide[..., 1:])

same(Case())
same(Case(n=40, heads=6, kv_heads=2, head_dim=96, dtype=torch.float16, per_head=True, grow=3))
same(Case(n=1, batch=1, heads=1, kv_heads=1, history=(16,) * 60))  # split keys: needs a workspace
same(Case(n=20), misalign)
same(Case(n=5, stores=False, history=()))

library, python = cases.make(Case(n=30)), cases.make(Case(n=30))
for inputs, append in ((library, torch.ops.amskv.append_cuda), (python, torch.ops.amskv.append)):
    append(inputs.k, inputs.v, inputs.pages, inputs.arena, inputs.write)
assert torch.equal(library.pages.view(torch.int16), python.pages.view(torch.int16))
print("fine")
"""


@pytest.mark.parametrize("code", [CHECKS, CALLS], ids=["checks and dispatch", "calls"])
def test_op_library_in_the_executor(code):
    done = run(f"LIBRARY = {str(hostlib.op_library())!r}\n{code}")
    assert done.stdout == "fine\n", done.stderr


@pytest.fixture
def forget():
    native.why_not_loaded.cache_clear()
    yield
    native.why_not_loaded.cache_clear()


def test_missing_library_is_one_clear_reason(forget, monkeypatch, tmp_path):
    monkeypatch.setattr(native, "LIBRARY", tmp_path / "libamskv.so")
    assert "was not built" in native.unavailable("cuda", forced=True)
    assert "not cpu" in native.unavailable("cpu", forced=True)
    with pytest.raises(RuntimeError, match="was not built"):
        native.build_info()


def test_torch_too_old_and_broken_library_are_named(forget, monkeypatch, tmp_path):
    broken = tmp_path / "libamskv.so"
    broken.write_bytes(b"not a library")
    monkeypatch.setattr(native, "LIBRARY", broken)
    assert "does not load" in native.why_not_loaded()
    native.why_not_loaded.cache_clear()
    monkeypatch.setattr(torch, "__version__", "2.9.1+cu128")
    assert native.why_not_loaded() == "libamskv.so needs torch ≥ 2.10; found torch 2.9.1"


def test_build_switch_refuses_what_it_does_not_know():
    setup = [sys.executable, "setup.py", "--name"]
    done = subprocess.run(setup, capture_output=True, text=True, cwd=ROOT, env=os.environ | {"AMSKV_CUDA": "yes"})
    assert done.returncode and "AMSKV_CUDA is 'yes'; it must be 0, 1, pip or unset" in done.stderr


def test_every_ptx_instruction_stands_in_the_primitives():
    for source in hostlib.CSRC.rglob("*"):
        if source.suffix in (".cu", ".cuh", ".h", ".cpp") and source.name != "primitives.cuh":
            assert not re.search(r"\basm\b|__shfl|__ballot|__sync", source.read_text()), source


def cuda_headers() -> Path | None:
    """CUDA's headers: a toolkit's, Triton's, or those of NVIDIA's PyPI packages."""
    roots = [Path("/usr/local/cuda"), *(Path(p) / "triton/backends/nvidia" for p in sys.path)]
    roots += [nvidia for p in sys.path for nvidia in Path(p).glob("nvidia/*")]
    return next((root / "include" for root in roots if (root / "include/cuda_runtime_api.h").exists()), None)


def test_cpp_example_compiles():
    headers = cuda_headers()
    if headers is None:
        pytest.skip("no CUDA headers on this machine")
    command = ["g++", "-std=c++17", "-Wall", "-Wextra", "-Werror", "-fsyntax-only", f"-I{hostlib.CSRC}/include"]
    done = subprocess.run(
        [*command, "-isystem", str(headers), "examples/cpp/attend.cpp"], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr


built = pytest.mark.skipif(native.why_not_loaded() is not None, reason=str(native.why_not_loaded()))


@built
def test_build_has_no_spills_and_few_kernels():
    kernels = native.build_info()["kernels"]
    assert [k for k in kernels if k["spill"]] == []
    for architecture in {k["architecture"] for k in kernels}:
        assert 0 < sum(k["architecture"] == architecture for k in kernels) <= 16


GPU_CASES = [
    Case(),
    Case(n=1, batch=1, heads=1, kv_heads=1, history=(16,) * 60),
    Case(n=16, heads=8, kv_heads=2, head_dim=128, page_size=64, history=(64, 64, 9), grow=7),
    Case(n=100, head_dim=96, page_size=32, history=(32, 1), per_head=True, packed=False, dtype=torch.float16),
    Case(n=300, head_dim=128, page_size=128, history=(128,) * 5 + (77,)),
]


@pytest.mark.gpu
@built
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("case", GPU_CASES, ids=str)
def test_on_a_gpu_stream_and_in_a_graph(case):
    """The call itself, on a stream of its own; then captured, its outputs poisoned, and replayed."""
    inputs = cases.make(case)
    on_gpu = [x.cuda() for x in inputs.tables]
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        out, lse = torch.ops.amskv.attn_cuda(*on_gpu, inputs.scale)
    stream.synchronize()
    inputs.out, inputs.lse, inputs.pages = out.cpu(), lse.cpu(), on_gpu[3].cpu()
    cases.judge(case, inputs)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = torch.ops.amskv.attn_cuda(*on_gpu, inputs.scale)
    for result in (out, lse):
        result.fill_(torch.nan)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(out.cpu(), inputs.out) and torch.equal(lse.cpu(), inputs.lse)
