"""The op library: its argument checks, its place behind the dispatcher, how it is found, and C++ without Python."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import amskv_kernels
from amskv_kernels import ops
from amskv_kernels.ops.backends import library
from amskv_kernels.ops.backends.library import hopper, portable

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests" / "host"))

import cases  # noqa: E402
import hostlib  # noqa: E402


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=os.environ | environment
    )


CHECKS = """
import sys, torch
from amskv_kernels.ops import checks
torch.ops.load_library(LIBRARY)

def arguments(dtype=torch.bfloat16, D=64, batch=1, n=4, heads=2, kv_heads=2, page_size=16):
    table = lambda *shape: torch.zeros(shape, dtype=torch.int32)
    q, k = torch.zeros(batch, n, heads, D, dtype=dtype), torch.zeros(batch, n, kv_heads, D, dtype=dtype)
    pages = torch.zeros(4, 2, page_size, D, dtype=dtype)
    return [q, k, k.clone(), pages, table(batch, kv_heads), table(1, 1, 0), table(1, 1, 2), 1.0, None]

def changed(index, value):
    args = arguments()
    args[index] = value(args[index]) if callable(value) else value
    return args

def eight_bit(change=lambda scales: scales):
    args = arguments()
    args[3], args[8] = args[3].to(torch.int8), change(torch.zeros(args[3].shape[:3]))
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
    "page_scales": [eight_bit(lambda s: None), eight_bit(lambda s: s.half()), eight_bit(lambda s: s[:3]),
                    eight_bit(lambda s: s.transpose(0, 2).contiguous().transpose(0, 2)),
                    changed(8, torch.zeros(4, 2, 16))],
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
shapes = [(t["head_dim"], t["rows_per_warp"]) for t in info["tiles"] if not t["int8_pages"]]
assert shapes == [(64, 16), (64, 32), (96, 16), (128, 16), (128, 32)], shapes
shapes = [(t["head_dim"], t["rows_per_warp"]) for t in info["tiles"] if t["int8_pages"]]
assert shapes == [(64, 32), (96, 16), (128, 32)], shapes
assert all(2 * (t["shared"] + 1024) <= 164 * 1024 for t in info["tiles"]), "two blocks must fit an sm_80"
assert all(t["shared"] <= 227 * 1024 for t in info["hopper_tiles"]), "a block must fit an sm_90"

print("fine")
"""


CALLS = """
import sys
sys.path.insert(0, "tests/host")
import torch, cases
from cases import Case
torch.ops.load_library(LIBRARY)

def same(case, change=lambda inputs: None, op=torch.ops.amskv.attn_cuda):
    library, python = cases.make(case), cases.make(case)
    change(library), change(python)
    out, lse = op(*library.call)
    expected_out, expected_lse = torch.ops.amskv.attn(*python.call)
    assert out.is_contiguous() and lse.dtype == torch.float32
    torch.testing.assert_close(out, expected_out, atol=2e-2, rtol=2e-2)
    torch.testing.assert_close(lse, expected_lse, atol=2e-2, rtol=0)
    assert cases.same(library.pages, python.pages) and cases.same(library.page_scales, python.page_scales)

def misalign(inputs):  # rows that begin at odd elements
    for name in "qkv":
        x = getattr(inputs, name)
        wide = torch.zeros(*x.shape[:3], x.shape[3] + 1, dtype=x.dtype)
        wide[..., 1:] = x
        setattr(inputs, name, wide[..., 1:])

def repeat_heads(inputs):  # stride 0
    inputs.k, inputs.v = (x[:, :, :1].expand(x.shape) for x in (inputs.k, inputs.v))

same(Case())
same(Case(n=40, heads=6, kv_heads=2, head_dim=96, dtype=torch.float16, per_head=True, grow=3))
same(Case(n=1, batch=1, heads=1, kv_heads=1, history=(16,) * 60))  # split keys: needs a workspace
same(Case(n=20), misalign)
same(Case(n=5, stores=False, history=()))
for n, head_dim in ((20, 64), (70, 64), (169, 128), (70, 96)):  # the portable kernel, the Hopper kernel, the former
    same(Case(n=n, head_dim=head_dim, hopper=(64, 1)), op=torch.ops.amskv.attn_hopper)
same(Case(n=70, hopper=(64, 1)), misalign, torch.ops.amskv.attn_hopper)
same(Case(n=70, hopper=(64, 1)), repeat_heads, torch.ops.amskv.attn_hopper)
for dtype in (torch.float16, torch.bfloat16):
    same(Case(n=40, heads=6, kv_heads=2, dtype=dtype, per_head=True, grow=3, int8=True))
same(Case(n=1, batch=1, heads=1, kv_heads=1, history=(16,) * 60, int8=True), misalign)
same(Case(n=169, head_dim=128, int8=True), op=torch.ops.amskv.attn_hopper)  # the portable kernel

for case in (Case(n=30), Case(n=30, int8=True), Case(n=30, dtype=torch.float16, int8=True)):
    library, python = cases.make(case), cases.make(case)
    for inputs, append in ((library, torch.ops.amskv.append_cuda), (python, torch.ops.amskv.append)):
        append(inputs.k, inputs.v, inputs.pages, inputs.arena, inputs.write, inputs.page_scales)
    assert cases.same(library.pages, python.pages) and cases.same(library.page_scales, python.page_scales)
print("fine")
"""


@pytest.mark.parametrize("code", [CHECKS, CALLS], ids=["checks and dispatch", "calls"])
def test_op_library_in_the_executor(code):
    done = run(f"LIBRARY = {str(hostlib.op_library())!r}\n{code}")
    assert done.stdout == "fine\n", done.stderr


@pytest.fixture
def forget():
    library.why_not_loaded.cache_clear()
    yield
    library.why_not_loaded.cache_clear()


def test_looking_again_registers_nothing_again(forget, monkeypatch):
    """Torch 2.11 takes no second kernel for an op and a key."""
    library.why_not_loaded()
    library.why_not_loaded.cache_clear()
    again = []
    monkeypatch.setattr(library, "refuse_backward", lambda *names: again.append(names))
    library.why_not_loaded()
    assert not again


def test_missing_library_is_one_clear_reason(forget, monkeypatch, tmp_path):
    monkeypatch.setattr(library, "LIBRARY", tmp_path / "libamskv.so")
    assert "was not built" in portable.unavailable(torch.device("cuda"), forced=True)
    assert "not cpu" in portable.unavailable(torch.device("cpu"), forced=True)
    with pytest.raises(RuntimeError, match="was not built"):
        library.build_info()


def test_hopper_backend_says_what_it_lacks(forget, monkeypatch, tmp_path):
    monkeypatch.setattr(library, "LIBRARY", tmp_path / "libamskv.so")
    with amskv_kernels.backend("hopper"):
        with pytest.raises(RuntimeError, match="hopper: serves CUDA tensors, not cpu"):
            ops.choose("attn", "cpu")
        with pytest.raises(RuntimeError, match=r"hopper: libamskv\.so was not built"):
            ops.choose("attn", "cuda")
        assert ops.choose("compact", "cpu").backend == "torch", "what the library lacks goes to the others"


@pytest.mark.parametrize(
    "capability, forced, reason",
    [((9, 0), True, None), ((9, 0), False, "not yet tested on a Hopper GPU"), ((8, 0), True, "this GPU has 8.0")],
)
def test_hopper_kernel_serves_hopper_alone(monkeypatch, capability, forced, reason):
    monkeypatch.setattr(portable, "unavailable", lambda device, forced: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    found = hopper.unavailable(torch.device("cuda"), forced)
    assert found is None if reason is None else reason in found


def test_library_forced_on_fp32_says_so(monkeypatch):
    for name, module in (("cuda", portable), ("hopper", hopper)):
        monkeypatch.setattr(module, "unavailable", lambda device, forced: None)
        args = cases.make(cases.Case(n=3, dtype=torch.float32))
        with amskv_kernels.backend(name), pytest.raises(TypeError, match=f"float32; backend '{name}' takes float16"):
            ops.attn(*args.tables, 1.0)


def test_a_library_of_an_earlier_version_is_named(forget, monkeypatch, tmp_path):
    there = tmp_path / "libamskv.so"
    there.touch()
    monkeypatch.setattr(library, "LIBRARY", there)
    monkeypatch.setattr(torch.ops, "load_library", lambda path: None)
    monkeypatch.setattr(library, "_OPS", ("an_op_that_it_lacks",))
    assert library.why_not_loaded() == "libamskv.so is of an earlier version; install again"


def test_torch_too_old_and_broken_library_are_named(forget, monkeypatch, tmp_path):
    broken = tmp_path / "libamskv.so"
    broken.write_bytes(b"not a library")
    monkeypatch.setattr(library, "LIBRARY", broken)
    assert "does not load" in library.why_not_loaded()
    library.why_not_loaded.cache_clear()
    monkeypatch.setattr(torch, "__version__", "2.9.1+cu128")
    assert library.why_not_loaded() == "libamskv.so needs torch ≥ 2.10; found torch 2.9.1"


def test_build_switch_refuses_what_it_does_not_know():
    setup = [sys.executable, "setup.py", "--name"]
    done = subprocess.run(setup, capture_output=True, text=True, cwd=ROOT, env=os.environ | {"AMSKV_CUDA": "yes"})
    assert done.returncode and "AMSKV_CUDA is 'yes'; it must be 0, 1, pip or unset" in done.stderr


@pytest.mark.parametrize("switch", ["", "1"])
def test_old_build_tools_are_named(switch, tmp_path):
    """Without the switch the package installs without the library; with it, that fails."""
    for name, text in (("cmake", "cmake version 3.25.1"), ("nvcc", "nvcc"), ("ninja", "1.11")):
        (tmp_path / name).write_text(f"#!/bin/sh\necho {text}\n")
        (tmp_path / name).chmod(0o755)
    hidden = "import sys; sys.modules['cmake'] = sys.modules['ninja'] = None; sys.argv = ['setup.py', '--name']; "
    done = run(
        f"{hidden}import runpy; runpy.run_path('setup.py', run_name='__main__')",
        AMSKV_CUDA=switch, PATH=f"{tmp_path}:{os.environ['PATH']}",
    )  # fmt: skip
    assert "pip install 'cmake>=3.27'" in done.stderr
    assert (done.returncode == 0) == (switch == "")
    assert ("installing without it" in done.stderr) == (switch == "")


def test_every_ptx_instruction_stands_in_the_primitives():
    for source in hostlib.CSRC.rglob("*"):
        if source.suffix in (".cu", ".cuh", ".h", ".cpp") and not source.name.endswith("primitives.cuh"):
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


built = pytest.mark.skipif(library.why_no_cuda() is not None, reason=str(library.why_no_cuda()))


@pytest.mark.parametrize("name", ["cuda", "hopper"])
def test_choose_names_the_library_for_int8_pages(monkeypatch, name):
    monkeypatch.setattr(ops.dispatch.BACKENDS[name], "unavailable", lambda device, forced: None)
    with amskv_kernels.backend(name):
        for dtype in (torch.float16, torch.bfloat16):
            assert ops.choose("attn", "cuda", dtype, torch.int8) == (name, "forced")
            assert ops.choose("append", "cuda", dtype, torch.int8) == (name, "forced")
        with pytest.raises(TypeError, match=f"float32; backend '{name}' takes float16 and bfloat16$"):
            ops.choose("attn", "cuda", torch.float32, torch.int8)


def test_kernels_are_named_by_what_their_pages_hold():
    sys.path.insert(0, str(ROOT / "csrc" / "cmake"))
    from build_info import readable

    tile = "_ZN5amskv11attn_kernelINS_4TileINS_8BFloat16ELi64ELi32ELb{}EEEEEvNS_8AttnArgsE"
    assert readable(tile.format(0)) == "attn<BFloat16, head_dim 64, 32 rows per warp>"
    assert readable(tile.format(1)) == "attn<BFloat16, head_dim 64, 32 rows per warp, int8 pages>"


@built
def test_build_has_no_spills_and_few_kernels():
    kernels = library.build_info()["kernels"]
    assert [k for k in kernels if k["spill"] or k["serialised"]] == []
    for architecture in {k["architecture"] for k in kernels}:
        names = [k["name"] for k in kernels if k["architecture"] == architecture]
        assert 0 < sum("int8" not in name for name in names) <= 16
        assert sum("int8" in name for name in names) == 6  # one tile for a head size and element type
