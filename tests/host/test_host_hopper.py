"""The Hopper kernel, executed on the CPU, against the fp64 reference; and faults that must not pass."""

from __future__ import annotations

import random
from dataclasses import replace

import cases
import hostlib
import pytest
import torch
from cases import Case

ROWS = [1, 4, 9, 16, 25, 36, 63, 64, 65, 100, 128, 129, 169, 256, 300]
TILES = [(64, 3), (128, 2)]  # rows of a tile, blocks


@pytest.fixture(scope="module")
def host():
    return hostlib.load()


@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize("n", ROWS)
def test_token_counts(host, n, tile):
    cases.check(host, Case(n=n, batch=1, history=(16, 16, 3), hopper=tile))


@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize("case", [c for d in (64, 128) for c in cases.both_dtypes(Case(n=70, head_dim=d))], ids=str)
def test_head_dims_and_dtypes(host, case, tile):
    cases.check(host, replace(case, hopper=tile))


@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize("page_size", [16, 32, 64, 128])
@pytest.mark.parametrize("history", [(), (1,), (16,), (7, 16, 0, 2), (16,) * 17, (0,) * 20])
def test_pages(host, page_size, history, tile):
    """Tiles that mix pages and current rows, tiles without any key, fewer tiles than consumers."""
    filled = tuple(page_size if rows == 16 else rows for rows in history)
    cases.check(host, Case(n=20, batch=1, heads=1, kv_heads=1, page_size=page_size, history=filled, hopper=tile))


@pytest.mark.parametrize("grow", [0, 5])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("page_size", [16, 64])
def test_every_page_of_its_own_is_stored_once_from_shared_memory(host, head_dim, page_size, grow):
    """Boxes are cut as pages are: rows that join a page already begun shift those that follow."""
    n, tile_rows, heads = 200, 128, 2
    case = Case(n=n, batch=1, head_dim=head_dim, page_size=page_size, gap=False, grow=grow, hopper=(tile_rows, 3))
    panels, row_blocks = head_dim // 64, -(-n // tile_rows) * tile_rows // 64
    pages = -(-(n + grow) // page_size) - (grow > 0)
    stored = cases.check(host, case)["bulk_stores"]
    assert stored == heads * (pages * 2 + row_blocks) * panels
    assert cases.check(host, replace(case, stores=False, grow=0))["bulk_stores"] == heads * row_blocks * panels


@pytest.mark.parametrize("gap, grow", [(True, 0), (False, 5), (True, 11)])
@pytest.mark.parametrize("tile", TILES, ids=str)
def test_stores_that_do_not_match_boxes(host, tile, gap, grow):
    """Rows that join a page already begun, or an empty entry in between: they come from global memory."""
    cases.check(host, Case(n=150, batch=1, gap=gap, grow=grow, hopper=tile))


@pytest.mark.parametrize("blocks", [1, 2, 5, 12])
@pytest.mark.parametrize("tile_rows", [64, 128])
def test_persistence(host, blocks, tile_rows):
    """Blocks that take many tiles of query rows, one, or none more than others."""
    cases.check(host, Case(n=130, batch=2, heads=2, gap=False, history=(16,) * 11, hopper=(tile_rows, blocks)))


@pytest.mark.parametrize("heads, kv_heads", [(2, 1), (6, 2)])
@pytest.mark.parametrize("tile", TILES, ids=str)
def test_grouped_heads(host, heads, kv_heads, tile):
    cases.check(host, Case(n=70, heads=heads, kv_heads=kv_heads, batch=1, gap=False, hopper=tile))


@pytest.mark.parametrize("seed", range(24))
def test_random_calls(host, seed):
    rng = random.Random(seed)
    page_size, kv_heads = rng.choice([16, 32, 64, 128]), rng.choice([1, 2, 3])
    case = Case(
        n=rng.choice([1, 9, 30, 64, 81, 100, 144, 200]),
        batch=rng.choice([1, 2]),
        kv_heads=kv_heads,
        heads=kv_heads * rng.choice([1, 1, 2]),
        head_dim=rng.choice([64, 128]),
        page_size=page_size,
        history=tuple(rng.choice([page_size, rng.randint(0, page_size)]) for _ in range(rng.randint(0, 9))),
        grow=rng.choice([0, 0, rng.randint(1, page_size - 1)]),
        stores=rng.random() < 0.8,
        gap=rng.random() < 0.3,
        per_head=rng.random() < 0.5,
        packed=rng.random() < 0.5,
        dtype=rng.choice([torch.float16, torch.bfloat16]),
        seed=seed,
        hopper=(rng.choice([64, 128]), rng.choice([1, 3, 8])),
    )
    cases.check(host, replace(case, grow=case.grow if case.stores else 0))


FAULT = Case(n=150, batch=1, heads=1, kv_heads=1, head_dim=128, gap=False, history=(16,) * 20 + (3,), hopper=(128, 1))


@pytest.mark.parametrize(
    "case",
    [Case(n=70, head_dim=96, hopper=(128, 1)), Case(n=70, hopper=(96, 1)), Case(n=70, hopper=(64, 0))],
    ids=["head size", "rows of a tile", "blocks"],
)
def test_impossible_plans_are_refused(host, case):
    with pytest.raises(ValueError, match="attn refused its arguments"):
        cases.run(host, case, cases.make(case), "eager")


RING, MOVERS, KERNEL = "hopper_ring.cuh", "hopper_movers.cuh", "attn_hopper.cuh"
WRONG = "out: more than twice the error|lse is not that|eager is not lazy"


@pytest.mark.parametrize(
    "file, text, replacement, message",
    [
        pytest.param(
            RING, "mbarrier_wait(full(spot), spot.parity);", "mbarrier_wait(full(spot), spot.parity ^ 1);",
            r"attn_hopper, block 0, .*hopper_movers\.cuh:\d+: (no barrier orders|reads bytes of the copy)",
            id="wrong phase bit",
        ),
        pytest.param(
            KERNEL, "    fence_async_proxy();\n    me.barrier();", "    me.barrier();",
            r"no fence\.proxy\.async shows the ordinary write at attn_hopper\.cuh:\d+",
            id="missing fence before a bulk store",
        ),
        pytest.param(
            KERNEL, "operand(v, Tile::kKeys * kSwizzleBytes),", "operand(v, Tile::kKeys * kSwizzleBytes / 2),", WRONG,
            id="wrong descriptor stride",
        ),
        pytest.param(
            MOVERS, "tile == 0 ? first_bytes : Tile::kSlotBytes);", "tile == 0 ? first_bytes + 16 : Tile::kSlotBytes);",
            r"no thread can go on:(\n|.)*warp 4 waits for the end of phase 0 of mbarrier 0: 0 of 1 arrivals and 16 b",
            id="transaction count too high",
        ),
        pytest.param(
            MOVERS, "tile == 0 ? first_bytes : Tile::kSlotBytes);", "tile == 0 ? first_bytes - 16 : Tile::kSlotBytes);",
            "counts 16 bytes more than were expected", id="transaction count too low",
        ),
        pytest.param(
            KERNEL, "        wgmma_wait<0>();\n        settle(registers.out);\n        ring.release(v, me.lane);\n"
            "        registers.rescale(shrink);",
            "        ring.release(v, me.lane);\n        wgmma_wait<0>();\n        settle(registers.out);\n"
            "        registers.rescale(shrink);",
            f"no barrier orders this write after the reads of warp|still under way|reads bytes of the copy|{WRONG}",
            id="a slot released before its products are done",
        ),
        pytest.param(
            KERNEL, "        wgmma_wait<1>();", "        wgmma_wait<2>();",
            f"no barrier orders this access|{WRONG}",
            id="scores used before they are there",
        ),
        pytest.param(
            KERNEL, "        if (!me.shares_rows) me.give_turn();\n        const", "        const",
            r"no thread can go on:(\n|.)*in bar\.sync", id="a turn never given",
        ),
        pytest.param(
            MOVERS, "                tma_store_wait_read();\n            }\n            ring.release",
            "            }\n            ring.release", "bulk store that nothing waited for",
            id="a slot released before its bulk store has read it",
        ),
    ],
)  # fmt: skip
def test_planted_fault_is_caught(tmp_path, file, text, replacement, message):
    cases.check(hostlib.load(), FAULT)
    faulty = hostlib.load_with_fault(file, text, replacement, tmp_path)
    with pytest.raises((RuntimeError, AssertionError), match=message):
        cases.check(faulty, FAULT)
