"""The executor itself: planted faults must not pass, and each is named."""

from __future__ import annotations

import cases
import hostlib
import pytest
from cases import Case

CASE = Case(n=40, batch=1, history=(16,) * 12 + (3,))


@pytest.mark.parametrize(
    "file, text, replacement, message",
    [
        pytest.param(
            "attn_portable.cuh", "cp_async_wait<Tile::kStages - 2>();", "cp_async_wait<Tile::kStages - 1>();",
            r"attn, block 0, .*attn_portable\.cuh:\d+: reads bytes of the copy issued at attn_portable\.cuh:\d+",
            id="a wait that comes one tile too late",
        ),
        pytest.param(
            "attn_portable.cuh", "team.barrier();  //", "//", r"attn, block 0, .*no barrier orders this",
            id="a missing barrier",
        ),
        pytest.param(
            "attn_portable.cuh", "    warp_barrier();\n#pragma unroll", "#pragma unroll",
            "no barrier orders this read after another lane's write", id="a missing warp barrier",
        ),
        pytest.param(
            "attn_portable.cuh", "page = slot >> kRowsBits;", "page = (slot >> kRowsBits) + 1;", ".*",
            id="a page off by one",
        ),
        pytest.param(
            "attn_portable.cuh", "stage + Layout::offset(row, chunk);", "stage + Layout::offset(row ^ 1, chunk);", ".*",
            id="rows exchanged",
        ),
        pytest.param(
            "tiles.h", "(chunk ^ permutation)", "(chunk ^ permutation * 0)", "bank conflicts", id="no swizzle",
        ),
    ],
)  # fmt: skip
def test_planted_fault_is_caught(tmp_path, file, text, replacement, message):
    cases.check(hostlib.load(), CASE)
    faulty = hostlib.load_with_fault(file, text, replacement, tmp_path)
    with pytest.raises((RuntimeError, AssertionError), match=message):
        cases.check(faulty, CASE)
