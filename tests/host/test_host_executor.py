"""The executor itself: planted faults must not pass, and each is named."""

from __future__ import annotations

import cases
import hostlib
import pytest
from cases import Case

CASE = Case(n=40, batch=1, history=(16,) * 12 + (3,))
HOPPER_CASE = Case(
    n=150, batch=1, heads=1, kv_heads=1, head_dim=128, gap=False, history=(16,) * 20 + (3,), hopper=(128, 1)
)
PORTABLE, WORK = "portable/attn.cuh", "portable/work.cuh"
PIPELINE, PRODUCER, KERNEL = "hopper/pipeline.cuh", "hopper/producer.cuh", "hopper/attn.cuh"
WRONG = "out: more than twice the error|lse is not that|eager is not lazy"

FAULTS = [
    pytest.param(
        PORTABLE, "cp_async_wait<Tile::kStages - 2>();", "cp_async_wait<Tile::kStages - 1>();",
        r"attn, block 0, .*portable/\w+\.cuh:\d+: reads bytes of the copy issued at portable/work\.cuh:\d+",
        id="a wait that comes one tile too late",
    ),
    pytest.param(
        PORTABLE, "team.barrier();  //", "//", r"attn, block 0, .*no barrier orders this",
        id="a missing barrier",
    ),
    pytest.param(
        PORTABLE, "    warp_barrier();\n#pragma unroll", "#pragma unroll",
        "no barrier orders this read after another lane's write", id="a missing warp barrier",
    ),
    pytest.param(
        WORK, "page = slot >> kRowsBits;", "page = (slot >> kRowsBits) + 1;", ".*",
        id="a page off by one",
    ),
    pytest.param(
        WORK, "stage + Layout::offset(row, chunk);", "stage + Layout::offset(row ^ 1, chunk);", ".*",
        id="rows exchanged",
    ),
    pytest.param(
        "common/tiles.h", "(chunk ^ permutation)", "(chunk ^ permutation * 0)", "bank conflicts", id="no swizzle",
    ),
]  # fmt: skip
HOPPER_FAULTS = [
    pytest.param(
        PIPELINE, "mbarrier_wait(full(part, at), at.parity);", "mbarrier_wait(full(part, at), at.parity ^ 1);",
        r"attn_hopper, block 0, .*hopper/\w+\.cuh:\d+: (no barrier orders|reads bytes of the copy)",
        id="wrong phase bit",
    ),
    pytest.param(
        KERNEL, "    fence_async_proxy();\n    me.barrier();", "    me.barrier();",
        r"no fence\.proxy\.async shows the ordinary write at hopper/attn\.cuh:\d+",
        id="missing fence before a bulk store",
    ),
    pytest.param(
        KERNEL, "operand(v, Tile::kKeys * kSwizzleBytes),", "operand(v, Tile::kKeys * kSwizzleBytes / 2),", WRONG,
        id="wrong descriptor stride",
    ),
    pytest.param(
        PRODUCER, "tile == 0 ? first_bytes : Tile::kStageBytes);",
        "tile == 0 ? first_bytes + 16 : Tile::kStageBytes);",
        r"no thread can go on:(\n|.)*warp 4 waits for the end of phase 0 of mbarrier 0: 0 of 1 arrivals and 16 b",
        id="transaction count too high",
    ),
    pytest.param(
        PRODUCER, "tile == 0 ? first_bytes : Tile::kStageBytes);",
        "tile == 0 ? first_bytes - 16 : Tile::kStageBytes);",
        "counts 16 bytes more than were expected", id="transaction count too low",
    ),
    pytest.param(
        KERNEL, "        wgmma_wait<0>();\n        settle(registers.out);\n"
        "        pipeline.release(kValues, v, me.lane);\n        registers.rescale(shrink);",
        "        pipeline.release(kValues, v, me.lane);\n        wgmma_wait<0>();\n        settle(registers.out);\n"
        "        registers.rescale(shrink);",
        f"no barrier orders this write after the reads of warp|still under way|reads bytes of the copy|{WRONG}",
        id="a stage released before its products are done",
    ),
    pytest.param(
        KERNEL, "        wgmma_wait<1>();", "        wgmma_wait<2>();",
        f"no barrier orders this access|{WRONG}",
        id="scores used before they are there",
    ),
    pytest.param(
        KERNEL, "        if (!me.shares_rows) me.scheduler_arrive();\n        const", "        const",
        r"no thread can go on:(\n|.)*in bar\.sync", id="a scheduler barrier that nobody comes to",
    ),
    pytest.param(
        KERNEL, "    if (me.index == 0 && !me.shares_rows) me.scheduler_wait();", "",
        "ends with 128 threads at named barrier 3", id="a scheduler barrier left open",
    ),
    pytest.param(
        PRODUCER, "                    tma_store_wait_read();\n                }\n                pipeline.release",
        "                }\n                pipeline.release", "bulk store that nothing waited for",
        id="a stage released before its bulk store has read it",
    ),
]  # fmt: skip


@pytest.mark.parametrize("file, text, replacement, message", FAULTS + HOPPER_FAULTS)
def test_planted_fault_is_caught(tmp_path, file, text, replacement, message):
    case = HOPPER_CASE if file in (PIPELINE, PRODUCER, KERNEL) else CASE
    cases.check(hostlib.load(), case)
    faulty = hostlib.load_with_fault(file, text, replacement, tmp_path)
    with pytest.raises((RuntimeError, AssertionError), match=message):
        cases.check(faulty, case)
