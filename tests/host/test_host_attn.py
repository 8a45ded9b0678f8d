"""The CUDA kernels, executed on the CPU, against the fp64 reference."""

from __future__ import annotations

import copy
from dataclasses import replace

import cases
import hostlib
import numpy as np
import pytest
from cases import Case

from amskv_kernels.ops import reference

ROWS = [1, 4, 9, 16, 17, 25, 36, 63, 64, 65, 100, 129, 169, 256, 300]
PLANS = [(16, 1, 1, 1), (16, 1, 2, 1), (16, 2, 2, 1), (16, 3, 1, 1), (16, 4, 1, 1), (32, 1, 1, 1), (32, 4, 1, 1)]


@pytest.fixture(scope="module")
def host():
    return hostlib.load()


@pytest.mark.parametrize("n", ROWS)
def test_token_counts(host, n):
    cases.check(host, Case(n=n, batch=1, history=(16, 16, 3)))


@pytest.mark.parametrize("case", [c for d in (64, 96, 128) for c in cases.both_dtypes(Case(n=70, head_dim=d))], ids=str)
def test_head_dims_and_dtypes(host, case):
    cases.check(host, case)


@pytest.mark.parametrize("head_dim, plan", [(d, p) for d in (64, 96, 128) for p in PLANS if (d, p[0]) != (96, 32)])
def test_every_tile(host, head_dim, plan):
    cases.check(host, Case(n=37, batch=1, kv_heads=3, heads=3, head_dim=head_dim, history=(16, 16, 7) * 3, plan=plan))


@pytest.mark.parametrize("plan", [(16, 1, 2, 3), (16, 4, 1, 2), (32, 4, 1, 5)], ids=str)
@pytest.mark.parametrize("head_dim", [64, 96, 128])
def test_split_keys(host, head_dim, plan):
    if (head_dim, plan[0]) == (96, 32):
        plan = (16, 2, 1, 5)  # head size 96 has no wide tiles
    cases.check(host, Case(n=21, batch=1, head_dim=head_dim, history=(16,) * 16, plan=plan))


@pytest.mark.parametrize("page_size", [16, 32, 64, 128])
@pytest.mark.parametrize("history", [(), (1,), (16,), (7, 16, 0, 2), (16,) * 9])
def test_pages(host, page_size, history):
    filled = tuple(page_size if rows == 16 else rows for rows in history)
    cases.check(host, Case(n=20, batch=1, page_size=page_size, history=filled))


@pytest.mark.parametrize("n", [1, 5, 16, 40])
@pytest.mark.parametrize("heads, kv_heads", [(2, 1), (6, 2), (8, 1)])
def test_grouped_heads(host, heads, kv_heads, n):
    cases.check(host, Case(n=n, heads=heads, kv_heads=kv_heads, batch=1))


@pytest.mark.parametrize("page_size", [16, 64])
@pytest.mark.parametrize("n", [1, 11, 12, 60, 130])
def test_page_growing_in_place(host, n, page_size):
    cases.check(host, Case(n=n, page_size=page_size, grow=5, batch=1))


def test_entries_of_every_head_and_strides(host):
    cases.check(host, Case(n=33, per_head=True, packed=False, history=(16, 5, 1, 12)))


def test_no_key_of_one_part(host):
    """A part of split keys may find only empty entries: it weighs nothing."""
    case = Case(n=3, batch=1, history=(0,) * 12 + (4,), plan=(16, 1, 1, 4))
    cases.check(host, case)


@pytest.mark.parametrize("seed", range(24))
def test_random_calls(host, seed):
    cases.check(host, cases.random_case(seed, [1, 2, 9, 16, 30, 64, 81, 100, 144], [64, 96, 128]))


@pytest.mark.parametrize("head_dim", [64, 96, 128])
@pytest.mark.parametrize("grow", [0, 3])
def test_append(host, head_dim, grow):
    case = Case(n=75, head_dim=head_dim, page_size=32, grow=grow, per_head=True)
    inputs = cases.make(case)
    truth = copy.deepcopy(inputs)
    reference.append(*truth.tables[1:5], truth.write)
    cases.append(host, case, inputs, "lazy")
    assert cases.same(inputs.pages, truth.pages)


def plan_of(host, case: Case, history_pages: int = 0, hopper: bool = False):
    """The plan for shapes and strides alone: arrays that have one element and are never read."""

    def stretched(*shape: int, dtype: type = np.uint16) -> np.ndarray:
        one = np.zeros(1, dtype)
        strides = np.cumprod([one.itemsize, *shape[:0:-1]])[::-1]
        return np.lib.stride_tricks.as_strided(one, shape, strides)

    q = stretched(case.batch, case.n, case.heads, case.head_dim)
    k = stretched(case.batch, case.n, case.kv_heads, case.head_dim)
    table = stretched(case.batch, case.kv_heads, dtype=np.int32)
    slots = stretched(1, 1, history_pages, dtype=np.int32)
    pages = stretched(1, 2, case.page_size, case.head_dim)
    scales = stretched(1, 2, case.page_size, dtype=np.float32) if case.int8 else np.empty(0, np.float32)
    call = host.Call(q, k, k, pages, q, table, slots, slots, stretched(1, dtype=np.float32), scales)
    return host.plan(call, "bfloat16", case.multiprocessors, cases.SHARED_BYTES, hopper)


def portable(plan) -> tuple[int, ...]:
    assert plan.tile_rows == 0
    return plan.rows_per_warp, plan.warps, plan.teams, plan.splits


VAR = Case(batch=128, heads=30, kv_heads=30, page_size=16, multiprocessors=132)  # d30, 64 images with guidance


@pytest.mark.parametrize(
    "n, pages, plan",
    [
        (1, 0, (16, 1, 4, 1)), (4, 1, (16, 1, 4, 1)), (9, 1, (16, 1, 4, 1)), (16, 1, (16, 1, 4, 1)),
        (25, 2, (16, 2, 2, 1)), (36, 4, (16, 3, 1, 1)), (64, 6, (16, 4, 1, 1)), (100, 10, (32, 4, 1, 1)),
        (169, 16, (16, 4, 1, 1)), (256, 27, (32, 4, 1, 1)),
    ],
)  # fmt: skip
def test_plan_of_every_step_of_an_image(host, n, pages, plan):
    assert portable(plan_of(host, replace(VAR, n=n), pages)) == plan


def test_few_heads_and_many_keys_are_split_with_no_part_empty(host):
    case = Case(n=1, batch=1, heads=1, kv_heads=1, page_size=128, multiprocessors=132)
    rows_per_warp, warps, teams, splits = portable(plan_of(host, case, history_pages=40))
    tiles = 40 * 128 // 64 + 1
    assert (rows_per_warp, warps, teams) == (16, 1, 1)
    assert 1 < splits <= tiles // 4
    share = -(-tiles // splits)
    assert (splits - 1) * share < tiles


@pytest.mark.parametrize(
    "n, tile_rows", [(1, 0), (36, 0), (64, 0), (100, 128), (144, 64), (169, 64), (256, 128), (576, 128), (1024, 128)]
)
def test_hopper_takes_the_steps_its_table_names(host, n, tile_rows):
    plan = plan_of(host, replace(VAR, n=n), 16, hopper=True)
    assert plan.tile_rows == tile_rows
    assert plan.blocks == (132 if tile_rows else 0)
    assert plan_of(host, replace(VAR, n=n), 16).tile_rows == 0


def test_hopper_leaves_what_it_does_not_have(host):
    assert plan_of(host, replace(VAR, n=256, head_dim=96), 16, hopper=True).tile_rows == 0
    assert plan_of(host, replace(VAR, n=256), 16, hopper=True).tile_rows == 128
    assert plan_of(host, replace(VAR, n=169, head_dim=128), 16, hopper=True).tile_rows == 128
    few = replace(VAR, n=256, batch=1, heads=3, kv_heads=3)
    assert plan_of(host, few, 16, hopper=True).blocks == 6
