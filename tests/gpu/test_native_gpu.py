"""The CUDA library on a GPU: its portable kernel and, on Hopper, its Hopper kernel."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from amskv_kernels.ops.backends import library
from amskv_kernels.ops.backends.library import hopper

sys.path.insert(0, str(Path(__file__).parents[1] / "host"))

import cases
import large_logits
from cases import Case

from amskv_kernels.ops import reference
from amskv_kernels.planning.layout import ROWS_BITS

pytestmark = pytest.mark.skipif(library.why_not_loaded() is not None, reason=str(library.why_not_loaded()))

SMALL = [
    Case(),
    Case(n=1, batch=1, heads=1, kv_heads=1, history=(16,) * 60),
    Case(n=16, heads=8, kv_heads=2, head_dim=128, page_size=64, history=(64, 64, 9), grow=7),
    Case(n=100, head_dim=96, page_size=32, history=(32, 1), per_head=True, packed=False, dtype=torch.float16),
    Case(n=300, head_dim=128, page_size=128, history=(128,) * 5 + (77,)),
]
LARGE = [  # the last steps of VAR-256, VAR-512 and Infinity-1M
    Case(n=256, batch=16, heads=30, kv_heads=30, history=(16,) * 26 + (8,), gap=False),
    Case(n=1024, batch=4, heads=30, kv_heads=30, page_size=64, history=(64,) * 19, stores=False),
    Case(n=4096, batch=1, heads=16, kv_heads=16, head_dim=128, page_size=128, history=(128,) * 50 + (25,), gap=False),
]


def check_on_a_gpu(op, case: Case) -> None:
    """The call on a stream of its own, judged; then captured, its outputs poisoned, and replayed."""
    inputs = cases.on(cases.make(case), torch.device("cuda"))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        inputs.out, inputs.lse = op(*inputs.call)
    stream.synchronize()
    cases.judge(case, inputs)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = op(*inputs.call)
    for result in (out, lse):
        result.fill_(torch.nan)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(out, inputs.out) and torch.equal(lse, inputs.lse)


TOKENS = [1, 9, 36, 64, 65, 100, 144, 169, 256, 300, 576]


FIRST = [SMALL[0], SMALL[2]]
EIGHT_BIT = [replace(case, int8=True) for case in SMALL]


@pytest.mark.parametrize("case", [*FIRST, EIGHT_BIT[2]], ids=str)
def test_first_portable(case):
    """What a GPU session looks at first, and checkers look at alone."""
    check_on_a_gpu(torch.ops.amskv.attn_cuda, case)


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_portable(case):
    check_on_a_gpu(torch.ops.amskv.attn_cuda, case)


@pytest.mark.parametrize("case", LARGE, ids=str)
def test_portable_large(case):
    check_on_a_gpu(torch.ops.amskv.attn_cuda, case)


@pytest.mark.parametrize("seed", range(100))
def test_portable_random(seed):
    check_on_a_gpu(torch.ops.amskv.attn_cuda, cases.random_case(seed, TOKENS, [64, 96, 128], pages=20))


@pytest.mark.parametrize("case", [c for case in EIGHT_BIT for c in cases.both_dtypes(case)], ids=str)
def test_portable_int8_pages(case):
    check_on_a_gpu(torch.ops.amskv.attn_cuda, case)


@pytest.mark.parametrize("case", LARGE, ids=str)
def test_portable_int8_pages_large(case):
    check_on_a_gpu(torch.ops.amskv.attn_cuda, replace(case, int8=True))


@pytest.mark.parametrize("seed", range(100))
def test_portable_int8_pages_random(seed):
    check_on_a_gpu(torch.ops.amskv.attn_cuda, cases.random_case(seed, TOKENS, [64, 96, 128], pages=20, int8=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_portable_rounds_every_row_there_is_as_the_reference_does(dtype):
    """The device's own reciprocals, in place of the host executor's."""
    _, inputs = cases.rows_to_round(dtype, 1024)
    truth, found = cases.on(inputs, torch.device("cuda")), cases.on(inputs, torch.device("cuda"))
    reference.append(*truth.tables[1:5], truth.write, truth.page_scales)
    torch.ops.amskv.append_cuda(*found.tables[1:5], found.write, found.page_scales)
    assert cases.same(found.pages, truth.pages)
    assert cases.same(found.page_scales, truth.page_scales)


def check_large_logits(op, case: Case) -> None:
    inputs = cases.make(case)
    large_logits.enlarge(inputs.q, inputs.k, inputs.pages, case.seed)
    truth, truth_lse = reference.attn(*(x.clone() for x in inputs.tables), inputs.scale)
    out, lse = op(*(x.cuda() for x in inputs.tables), inputs.scale)
    large_logits.check(out.cpu(), lse.cpu(), truth, truth_lse, float(inputs.v.abs().max()))


LARGE_LOGITS = [c for n in (9, 100, 300) for c in cases.both_dtypes(Case(n=n, history=(16,) * 30))]


@pytest.mark.parametrize("case", LARGE_LOGITS, ids=str)
def test_portable_with_logits_of_every_size(case):
    check_large_logits(torch.ops.amskv.attn_cuda, case)


@pytest.fixture
def needs_hopper():
    if (reason := hopper.unavailable(torch.device("cuda"), forced=True)) is not None:
        pytest.skip(reason)


@pytest.mark.usefixtures("needs_hopper")
@pytest.mark.parametrize("case", FIRST, ids=str)
def test_first_hopper(case):
    check_on_a_gpu(torch.ops.amskv.attn_hopper, replace(case, hopper=(128, 1)))


CAPTURED_FIRST = """
import sys, torch
from amskv_kernels.ops.backends import library
assert library.why_not_loaded() is None
q, k, v = torch.randn(1, 100, 6, 64, dtype=torch.bfloat16, device="cuda").split(2, 2)
pages = torch.zeros(2, 2, 16, 64, dtype=torch.bfloat16, device="cuda")
arena = torch.zeros(1, 2, dtype=torch.int32, device="cuda")
none = torch.zeros(1, 1, 0, dtype=torch.int32, device="cuda")
call = lambda: getattr(torch.ops.amskv, sys.argv[1])(q, k, v, pages, arena, none, none, 0.125)
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    out, lse = call()
graph.replay()
assert torch.equal(out, call()[0])
"""


@pytest.mark.parametrize("op", ["attn_cuda", "attn_hopper"])
def test_the_first_call_of_a_process_may_be_captured(op):
    """A kernel is loaded when it is first launched, which capture forbids unless asked to be lenient."""
    child = subprocess.run([sys.executable, "-c", CAPTURED_FIRST, op], capture_output=True, text=True)
    assert child.returncode == 0, child.stderr[-2000:]


@pytest.mark.usefixtures("needs_hopper")
@pytest.mark.parametrize("case", [*SMALL, Case(n=100), Case(n=169, head_dim=128, gap=False)], ids=str)
def test_hopper(case):
    """`hopper` makes the unnamed rest of every named page zero, as stores leave it."""
    check_on_a_gpu(torch.ops.amskv.attn_hopper, replace(case, hopper=(128, 1)))


@pytest.mark.usefixtures("needs_hopper")
@pytest.mark.parametrize("n", [100, 256])
def test_hopper_leaves_int8_pages_to_the_portable_kernel(n):
    check_on_a_gpu(torch.ops.amskv.attn_hopper, Case(n=n, history=(16,) * 20, int8=True))


@pytest.mark.usefixtures("needs_hopper")
@pytest.mark.parametrize("case", LARGE, ids=str)
def test_hopper_large(case):
    check_on_a_gpu(torch.ops.amskv.attn_hopper, replace(case, hopper=(128, 1)))


@pytest.mark.usefixtures("needs_hopper")
@pytest.mark.parametrize("seed", range(300))
def test_hopper_random(seed):
    check_on_a_gpu(torch.ops.amskv.attn_hopper, cases.random_case(seed, TOKENS, [64, 128], pages=20, hopper=(128, 1)))


@pytest.mark.usefixtures("needs_hopper")
@pytest.mark.parametrize("case", LARGE_LOGITS, ids=str)
def test_hopper_with_logits_of_every_size(case):
    check_large_logits(torch.ops.amskv.attn_hopper, replace(case, hopper=(128, 1)))


@pytest.mark.usefixtures("needs_hopper")
@pytest.mark.parametrize("head_dim", [64, 128])
def test_hopper_reaches_pages_beyond_2_31_elements(head_dim):
    """A pool of which only the last pages are named, read and written: the copy engine counts in 64 bits."""
    page_size, n, heads, history = 128, 200, 2, 3
    page_elements = 2 * page_size * head_dim
    stored = -(-n // page_size)
    own = history + stored
    first = 2**31 // page_elements + 100
    pages = torch.full((first + heads * own, 2, page_size, head_dim), torch.nan, dtype=torch.bfloat16, device="cuda")
    pages[first:] = torch.randn_like(pages[first:])
    q, k, v = torch.randn(1, n, 3 * heads, head_dim, dtype=torch.bfloat16, device="cuda").split(heads, 2)
    arena = torch.tensor([[first, first + own]], dtype=torch.int32, device="cuda")
    slots = torch.arange(own, dtype=torch.int32).view(1, 1, own) << ROWS_BITS | page_size
    slots[..., -1] += n - stored * page_size
    read, write = slots[..., :history].contiguous(), slots[..., history:].contiguous()
    near = (q.cpu(), k.cpu(), v.cpu(), pages[first:].cpu(), arena.cpu() - first, read, write)
    truth, truth_lse = reference.attn(*near, head_dim**-0.5)
    out, lse = torch.ops.amskv.attn_hopper(q, k, v, pages, arena, read.cuda(), write.cuda(), head_dim**-0.5)
    assert (out.cpu().double() - truth).abs().max() < 2e-2
    assert (lse.cpu().double() - truth_lse).abs().max() < 1e-4
    assert torch.equal(pages[first:].cpu().view(torch.int16), near[3].view(torch.int16))


@pytest.mark.usefixtures("needs_hopper")
def test_hopper_large_gives_the_same_bits_every_time():
    inputs = cases.make(replace(LARGE[0], hopper=(128, 1)))
    on_gpu = [x.cuda() for x in inputs.tables]
    first = [x.clone() for x in torch.ops.amskv.attn_hopper(*on_gpu, inputs.scale)]
    for _ in range(20):
        again = torch.ops.amskv.attn_hopper(*on_gpu, inputs.scale)
        assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))
