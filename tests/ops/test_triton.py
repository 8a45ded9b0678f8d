"""The Triton kernels under their interpreter, against fp64.

The interpreter must be on before Triton is imported, so without TRITON_INTERPRET=1 the one test here runs this file
again in a child process that has it.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import itertools
import os
import subprocess
import sys
import types
from dataclasses import replace
from pathlib import Path
from zlib import crc32

import large_logits
import pytest
import torch
from attn_cases import SPOILT, Case, make, most_error, same_kinds, spoilt
from attn_cases import eight_bit as eight_bit_pool
from extra_cases import (
    COMPACT_CASES,
    LARGE,
    QK_PARTS,
    QK_SHAPES,
    SCORE_CASES,
    SMALL,
    make_compact,
    make_qk,
    make_scores,
)
from ragged_cases import Ragged, make_ragged
from test_contract import EMPTY, check_empty_calls

import amskv_kernels
from amskv_kernels import ops
from amskv_kernels.ops import reference
from amskv_kernels.ops.backends.triton.tiles import FAMILIES, LINES, Tile, attn_tile, split_count

EIGHT_BIT = Path(__file__).with_name("test_triton_int8.py")  # the same child process runs it
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs in a child process with TRITON_INTERPRET=1")


def version(name: str) -> tuple[int, ...]:
    return tuple(int(part) for part in importlib.metadata.version(name).split(".")[:2])


@pytest.mark.skipif(
    bool(importlib.util.find_spec("triton")) and version("triton") < (3, 9) and version("numpy") >= (2, 5),
    reason="before Triton 3.9 the interpreter makes numbers of arrays of one element, which NumPy 2.5 refuses",
)
@pytest.mark.skipif(INTERPRETED, reason="this is the child process")
def test_everything_under_the_interpreter():
    pytest.importorskip("triton")
    child = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, str(EIGHT_BIT)],
        env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert child.returncode == 0, child.stdout[-8000:] + child.stderr[-2000:]


def check_attn(args: tuple, case: Case) -> None:
    """One call against fp64: output, log-sum-exp and every byte of the pool."""
    pages = args[3].clone()
    truth, truth_lse = reference.attn(*args[:3], pages, *args[4:])
    # The interpreter truncates to bfloat16 where a GPU rounds: twice the error.
    slack = 4 if case.dtype == torch.bfloat16 else 2
    limit = most_error(args, truth, slack)
    out, lse = torch.ops.amskv.attn(*args)
    assert out.dtype == case.dtype
    assert out.is_contiguous()
    assert (out.double() - truth).abs().max() <= limit
    assert (lse.double() - truth_lse).abs().max() < 1e-5
    assert torch.equal(args[3].view(torch.uint8), pages.view(torch.uint8)), "every byte, NaN included"


def seed_of(case: Case) -> int:
    return crc32(str(case).encode())


HALF, BF16 = torch.float16, torch.bfloat16


@interpreted
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_attn_of_small_steps(forced, case):
    tile = attn_tile(80, case.head_dim, 4 if case.dtype == torch.float32 else 2, case.n, len(case.history))
    assert case.dtype == torch.float32 or tile.heads > 1
    check_attn(make(case, seed_of(case)), case)


@interpreted
@pytest.mark.parametrize("case", LARGE, ids=str)
@pytest.mark.parametrize("arch", [80, 90])
def test_attn_with_the_tiles_of(forced, on_gpu, arch, case):
    on_gpu(arch)
    check_attn(make(case, seed_of(case)), case)


@interpreted
@pytest.mark.parametrize("case", [LARGE[4], LARGE[5], LARGE[7]], ids=str)
@pytest.mark.parametrize(
    "tile", [Tile(16, 16, 4, 1), Tile(32, 32, 4, 1), Tile(64, 128, 4, 1), Tile(64, 64, 4, 1)], ids=str
)
def test_attn_with_full_tiles_first(forced, monkeypatch, tile, case):
    from amskv_kernels.ops.backends.triton import attn

    monkeypatch.setattr(attn, "attn_tile", lambda *_: tile)
    check_attn(make(case, seed_of(case)), case)


@interpreted
@pytest.mark.parametrize("case", [LARGE[2], LARGE[3], LARGE[6], LARGE[7]], ids=str)
def test_attn_in_shares(forced, on_gpu, monkeypatch, case):
    from amskv_kernels.ops.backends.triton import tiles

    on_gpu(90, 10_000)
    monkeypatch.setattr(tiles, "SHARE_TILES", 1)
    check_attn(make(case, seed_of(case)), case)


@interpreted
@pytest.mark.parametrize("dtype", [HALF, BF16], ids=str)
@pytest.mark.parametrize("case", [SMALL[2], LARGE[1], LARGE[4], LARGE[6]], ids=str)
def test_attn_with_logits_of_every_size(forced, case, dtype):
    """The interpreter fuses no multiplication with an addition, as a GPU does: tests/gpu has the same test."""
    args = make(replace(case, dtype=dtype), seed_of(case))
    large_logits.enlarge(args[0], args[1], args[3], seed=1)
    truth = reference.attn(*args[:3], args[3].clone(), *args[4:])
    large_logits.check(*torch.ops.amskv.attn(*args), *truth, float(args[2].abs().max()))


@interpreted
@pytest.mark.parametrize("what", SPOILT)
@pytest.mark.parametrize("shares", [1, 5])
@pytest.mark.parametrize("case", [SMALL[2], Case(n=20, history=(16,) * 4 + (3,), dtype=HALF)], ids=str)
def test_what_is_no_number_spoils_its_own_rows(forced, monkeypatch, case, shares, what):
    from amskv_kernels.ops.backends.triton import attn

    monkeypatch.setattr(attn, "split_count", lambda *_: shares)
    args = spoilt(make(case, 2), what)
    truth, truth_lse = reference.attn(*args[:3], args[3].clone(), *args[4:])
    out, lse = torch.ops.amskv.attn(*args)
    assert same_kinds(out, truth)
    assert same_kinds(lse, truth_lse)
    torch.testing.assert_close(out.double(), truth, rtol=3e-2, atol=3e-2, equal_nan=True)


@pytest.mark.parametrize("n", [3, 400])
def test_only_the_first_dimension_of_a_grid_grows(n):
    """The others end at 65,535: sequences and heads must not stand there."""
    pytest.importorskip("triton")
    from amskv_kernels.ops.backends.triton import append, attn, compact, prepare_qk, window_scores

    q = torch.empty(1, 1, 2, 64, dtype=HALF).expand(70_000, n, 2, 64)
    table = torch.zeros(1, 1, 1, dtype=torch.int32)
    launch = attn.plan_launch(q, q, q, torch.empty(1, 2, 16, 64, dtype=HALF), table, table, 1.0)
    assert launch.start.grid[0] >= 70_000
    assert launch.start.grid[1:] == (1, 1)
    for module in (append, attn, compact, prepare_qk, window_scores):
        assert "program_id(1)" not in Path(module.__file__).read_text()


@interpreted
@pytest.mark.parametrize("layout", ["heads first", "batch inside", "unaligned", "broadcast queries"])
@pytest.mark.parametrize("n", [3, 21])
def test_attn_reads_any_strides(forced, layout, n):
    case = Case(n=n, history=(16, 3), stored=(16, n - 16) if n > 16 else (n,), heads=4, kv_heads=2, dtype=HALF)
    q, k, v, *rest = make(case)

    def laid_out(x):
        if layout == "heads first":
            return x.transpose(1, 2).contiguous().transpose(1, 2)
        if layout == "batch inside":
            return x.transpose(0, 1).contiguous().transpose(0, 1)
        if layout == "broadcast queries":
            return x[:, :1].expand(x.shape)
        storage = torch.zeros(x.numel() + 1, dtype=x.dtype)
        return storage[1:].view(x.shape).copy_(x)

    check_attn((laid_out(q), laid_out(k), laid_out(v), *rest), case)


@interpreted
@pytest.mark.parametrize("case", [c for c in SMALL + LARGE if c.stored], ids=str)
def test_append(forced, case):
    args = make(case, seed_of(case))
    expected, stored = args[3].clone(), args[3].clone()
    reference.append(args[1], args[2], expected, args[4], args[6])
    torch.ops.amskv.append(args[1], args[2], stored, args[4], args[6])
    assert torch.equal(stored.view(torch.uint8), expected.view(torch.uint8))


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, HALF, BF16], ids=str)
@pytest.mark.parametrize("shape", QK_SHAPES, ids=str)
@pytest.mark.parametrize("parts", QK_PARTS.values(), ids=QK_PARTS)
def test_prepare_qk(forced, parts, shape, dtype):
    rounding = {torch.float32: 2.0**-24, HALF: 2.0**-11, BF16: 2.0**-7}[dtype]  # bfloat16 is truncated here
    arguments = make_qk(shape, parts, dtype)
    for x, truth in zip(torch.ops.amskv.prepare_qk(**arguments), reference.prepare_qk(**arguments), strict=True):
        assert x.dtype == dtype
        assert x.is_contiguous()
        assert ((x.double() - truth).abs() <= rounding * truth.abs() + 2e-6).all()


@interpreted
@pytest.mark.parametrize("mode", ["softmax", "sum_logits"])
@pytest.mark.parametrize("case", SCORE_CASES, ids=str)
def test_window_scores(forced, case, mode):
    arguments = make_scores(case)
    scores, truth = torch.ops.amskv.window_scores(*arguments, mode), reference.window_scores(*arguments, mode)
    assert torch.equal(scores.isneginf(), truth.isneginf())
    torch.testing.assert_close(scores.double(), truth, rtol=1e-5, atol=2e-5)


@interpreted
def test_window_scores_of_a_wide_window(forced):
    arguments = make_scores(replace(SCORE_CASES[5], n=5), window=40)
    truth = reference.window_scores(*arguments, "softmax")
    torch.testing.assert_close(torch.ops.amskv.window_scores(*arguments).double(), truth, rtol=1e-5, atol=2e-5)


@interpreted
@pytest.mark.parametrize(("case", "kept"), COMPACT_CASES, ids=str)
def test_compact(forced, case, kept):
    pages, arena, src_slots, k, v, keep, dst_slots = make_compact(case, kept)
    expected = pages.clone()
    reference.compact(expected, arena, src_slots, k, v, keep, dst_slots)
    torch.ops.amskv.compact(pages, arena, src_slots, k, v, keep, dst_slots)
    assert torch.equal(pages.view(torch.uint8), expected.view(torch.uint8))


@interpreted
def test_nothing_to_do_launches_nothing(forced):
    args = make(Case(n=3, history=(5,)))
    out, lse = torch.ops.amskv.attn(*(x[:, :0] for x in args[:3]), *args[3:])
    assert out.shape == (2, 0, 2, 64)
    assert lse.shape == (2, 2, 0)
    torch.ops.amskv.append(*(x[:, :0] for x in args[1:3]), args[3], args[4], args[6])


@interpreted
@pytest.mark.parametrize("shape", EMPTY, ids=str)
def test_empty_calls(forced, shape):
    check_empty_calls(shape)


@interpreted
def test_random_calls(forced):
    from tools.fuzz.__main__ import STRIDE, judge_call

    assert not {i: found for i in range(40) if (found := judge_call(78 * STRIDE + i))}


@interpreted
def test_auto_keeps_the_cpu_off_the_interpreter():
    assert ops.choose("attn", "cpu").backend != "triton"


def test_triton_serves_a_gpu_and_says_why_not_a_cpu(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert ops.choose("attn", "cuda").backend == "triton"
    for op in ("attn", "append", "window_scores", "compact"):
        assert ops.choose(op, "cuda", HALF, torch.int8).backend == "triton"
    with amskv_kernels.backend("triton"), pytest.raises(RuntimeError, match="on the CPU it needs its interpreter"):
        ops.choose("attn", "cpu")
    monkeypatch.setitem(sys.modules, "triton", None)
    choice = ops.choose("attn", "cuda")
    assert choice.backend == "torch"
    assert choice.reason.endswith("triton: Triton is not installed")


BROKEN = {
    "a stub": (types.ModuleType("triton"), "what is installed as triton has no triton.jit"),
    "not there": (None, "Triton is not installed"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_triton_is_named_and_the_cpu_does_not_care(monkeypatch, what):
    module, reason = BROKEN[what]
    monkeypatch.setitem(sys.modules, "triton", module)
    choice = ops.choose("attn", "cuda")
    assert (choice.backend, choice.reason.partition("triton: ")[2]) == ("torch", reason)
    torch.ops.amskv.attn(*make(SMALL[0]))


def test_a_triton_that_does_not_import_is_named(tmp_path):
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton/__init__.py").write_text("raise OSError('libtriton.so: cannot open')")
    code = "from amskv_kernels import ops; print(ops.choose('attn', 'cuda').reason)"
    path = f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path}
    )
    assert done.stdout.strip().endswith("triton: Triton does not import: OSError: libtriton.so: cannot open"), (
        done.stderr
    )


def test_a_missing_compiler_is_named(monkeypatch, tmp_path):
    pytest.importorskip("triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    choice = ops.choose("attn", "cuda")
    assert choice.backend == "torch"
    assert choice.reason.endswith("triton: Triton needs a C compiler, and gcc or clang is not on PATH")
    monkeypatch.setenv("CC", "/nowhere/cc")
    assert ops.choose("attn", "cuda").reason.endswith("and /nowhere/cc is not on PATH")


def test_the_tile_table_serves_every_call():
    for arch in (80, 86, 89, 90, 100, 103, 120, 121):
        for head_dim in (64, 96, 128):
            for rows in (1, 16, 17, 100, 192, 193, 5000):
                for entries, eight_bit in itertools.product((0, 2, 3, 700), (False, True)):
                    tile = attn_tile(arch, head_dim, 2, rows, entries, eight_bit)
                    assert tile.heads == 1 or (rows <= tile.block_m and rows <= 16)
    assert {family for family, _ in LINES} == set(FAMILIES)
    assert all(line.reason for table in LINES.values() for line in table)


def test_shares_follow_from_shapes_alone():
    assert split_count(programs=132, tiles=100, processors=132) == 1
    assert split_count(programs=32, tiles=100, processors=132) == 8
    assert split_count(programs=1, tiles=3, processors=132) == 1
    assert split_count(programs=1, tiles=100, processors=132) == 25


@pytest.mark.skipif(INTERPRETED, reason="compiles for real")
@pytest.mark.parametrize("eight_bit", [False, True], ids=["bf16", "int8"])
def test_a_launch_compiles_offline_to_the_instructions_meant(eight_bit):
    """One of the launches of `make kernel-report`: on Hopper, wgmma fed by 16-byte asynchronous copies, no spills."""
    pytest.importorskip("triton")
    from tools import kernel_report

    launch = kernel_report.record(kernel_report.attn_call(256, 27, 64, 16, eight_bit=eight_bit), "", 90)[0]
    assert {"q", "k", "v", "pages", "stride_kn"} <= set(launch.aligned)
    row = kernel_report.measure(launch, 90)
    assert row["wgmma"] > 0
    assert row["cp.async 16 B"] > 0
    assert not kernel_report.faults(row)


RAGGED = [
    Ragged((1, 4, 9, 0, 16, 25)),
    Ragged((40, 0, 3), heads=6, kv_heads=3, head_dim=96, dtype=HALF),
    Ragged((70, 1, 33), heads=4, kv_heads=1, page_size=32, entries=7, per_head=True, dtype=HALF),
    Ragged((150, 17), head_dim=128, page_size=64, dtype=BF16),
]


@interpreted
@pytest.mark.parametrize("eight_bit", [False, True])
@pytest.mark.parametrize("case", RAGGED, ids=str)
@pytest.mark.parametrize("arch", [80, 90])
def test_ragged_sequences_in_one_launch(forced, monkeypatch, arch, case, eight_bit):
    from amskv_kernels.ops.backends.triton import attn_ragged
    from amskv_kernels.ops.backends.triton.common import Device

    monkeypatch.setattr(attn_ragged, "describe", lambda _: Device(arch, 1))
    args, scales = list(make_ragged(case, seed_of(case))), ()
    if eight_bit:
        args[3], *scales = eight_bit_pool(args[3])
    pool = [x.clone() for x in (args[3], *scales)]
    truth, truth_lse = reference.attn_ragged(*args[:3], pool[0], *args[4:], *pool[1:])
    out, lse = torch.ops.amskv.attn_ragged(*args, *scales)
    limit = {torch.float32: 2e-6, HALF: 4e-3, BF16: 6e-2}[case.dtype]
    assert out.dtype == case.dtype and (out.double() - truth).abs().max() <= limit
    assert (lse.double() - truth_lse).abs().max() < 1e-5
    for found, expected in zip((args[3], *scales), pool, strict=True):
        assert torch.equal(found.view(torch.uint8), expected.view(torch.uint8)), "every byte, NaN included"
