"""The issue simulator on machine code made for it."""

from __future__ import annotations

import pytest

from tools.sass_clocks import clocks, functions, loops, path

FREE = 7  # no scoreboard


def line(address: int, text: str, stall: int = 1, sets: int = FREE, frees: int = FREE, waits: int = 0) -> str:
    control = stall << 41 | sets << 46 | frees << 49 | waits << 52
    return f"        /*{address:04x}*/                   {text} ;   /* 0x0 */\n    /* {control:#018x} */"


def code(*lines: str):
    text = "\n".join(["    arch = sm_90a", "        Function : kernel", *lines])
    return functions(text)["90a", "kernel"]


def test_stalls_add_up_and_scoreboards_are_waited_for():
    found = code(
        line(0x10, "LDS.128 R0, [R1]", stall=2, sets=3), line(0x20, "FADD R4, R5, R6", stall=4),
        line(0x30, "FADD R4, R0, R1", stall=1, waits=1 << 3),
    )  # fmt: skip
    assert [i.name for i in found] == ["LDS", "FADD", "FADD"]
    assert clocks(found[:2]) == 6
    assert clocks(found) == 24 + 1, "a load from shared memory takes 24"


def test_exponentials_come_at_a_quarter_of_the_rate():
    assert clocks(code(*(line(0x10 * i, "MUFU.EX2 R0, R0") for i in range(1, 5)))) == 3 * 8 + 1


def test_predicates_and_targets_are_read():
    found = code(line(0x10, "@!UP3 UMOV UR4, UR5"), line(0x20, "@P0 BRA.U.ANY 0x10"), line(0x30, "@P0 BRA P1, 0x90"))
    assert [(i.predicate, i.name, i.target) for i in found] == [
        ("@!UP3", "UMOV", None), ("@P0", "BRA", 0x10), ("@P0", "BRA", 0x90)
    ]  # fmt: skip


NESTED = code(
    line(0x10, "IADD3 R0, R0, R1"),
    line(0x20, "@P1 BRA 0x50"),  # around the next two
    line(0x30, "SHFL.IDX PT, R2, R3, R4"),
    line(0x40, "VOTE.ANY R2, PT, P1"),
    line(0x50, "SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [R4], R5"),
    line(0x60, "@!P0 BRA 0xc0"),  # spins behind the end
    line(0x70, "UTMALDG.4D [UR8], [UR6]"),
    line(0x80, "@P0 BRA.U.ANY 0x70"),
    line(0x88, "@P3 BRA 0x50"),
    line(0x90, "@P2 BRA 0x10"),
    line(0xA0, "EXIT"),
    line(0xC0, "SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [R4], R5"),
    line(0xD0, "@!P0 BRA 0xc0"),
    line(0xE0, "BRA 0x70"),
)


def test_loops_are_found_and_a_wait_that_returns_is_none():
    inner, spin, middle, tile = loops(NESTED)
    assert [(loop.body[0].address, loop.body[-1].address) for loop in (inner, spin, middle, tile)] == [
        (0x70, 0x80), (0xC0, 0xD0), (0x50, 0x88), (0x10, 0x90)
    ]  # fmt: skip
    assert tile.holds(inner) and not inner.holds(tile) and not tile.holds(tile)


@pytest.mark.parametrize("longest, others", [(True, 8), (False, 6)])
def test_a_path_is_the_longest_or_shortest_way_with_inner_loops_as_often_as_told(longest, others):
    inner, _, _, tile = loops(NESTED)
    walked = path(tile, {inner: 8}, longest=longest)
    assert sum(i.name == "UTMALDG" for i in walked) == 8
    assert len(walked) == others + 2 * 8


def test_the_rounds_of_nested_loops_multiply():
    lanes, _, panels, tile = loops(NESTED)
    walked = path(tile, {lanes: 3, panels: 2}, longest=False)
    assert sum(i.name == "UTMALDG" for i in walked) == 6
