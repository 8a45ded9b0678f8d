"""The Hopper kernel, executed on the CPU, against the fp64 reference."""

from __future__ import annotations

from dataclasses import replace

import cases
import hostlib
import pytest
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


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("history", [(), (16,) * 3, (16,) * 8, (16,) * 21 + (5,)], ids=len)
def test_a_current_scale_that_nothing_stores_comes_in_one_box_per_tile(host, head_dim, history):
    """Of K and of V, beside the boxes of the history, whose first tile is filled up to 64 or 128 keys, and queries."""
    n, page_size, heads = 300, 16, 2
    case = Case(n=n, batch=1, head_dim=head_dim, page_size=page_size, history=history, stores=False, hopper=(128, 2))
    entries = len(history) + 2  # with the empty ones of the table
    paged, row_tiles = -(-entries * page_size // 64) * 64 // page_size, -(-n // 128)
    loads = cases.check(host, case)["bulk_loads"]
    assert loads == heads * row_tiles * (head_dim // 64) * (2 * paged + 2 * -(-n // 128) + 2)


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
    tile = ([64, 128][seed % 2], [1, 3, 8][seed % 3])
    cases.check(host, cases.random_case(seed, [1, 9, 30, 64, 81, 100, 144, 200], [64, 128], pages=9, hopper=tile))


@pytest.mark.parametrize(
    "case",
    [Case(n=70, head_dim=96, hopper=(128, 1)), Case(n=70, hopper=(96, 1)), Case(n=70, hopper=(64, 0))],
    ids=["head size", "rows of a tile", "blocks"],
)
def test_impossible_plans_are_refused(host, case):
    with pytest.raises(ValueError, match="attn refused its arguments"):
        cases.run(host, case, cases.make(case), "eager")
