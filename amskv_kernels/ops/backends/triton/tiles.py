"""Which tile serves which call: one table, with the reason or the measurement beside every line.

A line is chosen from what a launch knows without asking the device: architecture, head size, element size, query
rows of a KV head (n · G) and the length of the slot table. Nothing is tuned while a process serves;
`tools/tune.py` measures the candidates on the GPU at hand and prints lines to put here.

Registers, shared memory and instructions named below are those of `make kernel-report`; where no measurement is
named, there is none yet. Programs per multiprocessor follow from 64k registers and 228 KB (sm_90, sm_100), 164 KB
(sm_80) or 100 KB (sm_86, sm_89, sm_120) of shared memory.

Before Triton 3.9 the same tiles come out in more registers, and an assembler without a bound stops at 128 or 168 and
spills the rest: there a tile without a bound gets one that it does not need, and where 3.9's bound would spill the
line has a second tile. Both are compiled by `make kernel-report`.

Pages of eight bits hold each tile twice, as bytes and converted, and give the history a loop of its own: they take the
line's tile with all the registers that a thread can have, and another where that still spills.
"""

from __future__ import annotations

from typing import NamedTuple

import triton

OLD_TRITON = tuple(int(part) for part in triton.__version__.split(".")[:2]) < (3, 9)
# Packed heads with G > 1 need at least so many registers: a lower bound is not for them.
GROUPED_REGISTERS = 168
SMALL_BOUND = 96  # of tiles of up to 32 rows: 5 programs of 4 warps
LARGE_BOUND = 255  # all that a thread can have


class Tile(NamedTuple):
    """How `attn` is cut for one program.

    Attributes:
        block_m: query rows.
        block_n: keys per step.
        warps: warps of the program.
        stages: depth of the software pipeline.
        full_first: full tiles in a loop of their own, unmasked. Pays where arithmetic is the limit; where a call is a
            few tiles it costs a second start of the pipeline.
        heads: KV heads packed into the program; 1 is the kernel that takes one.
        registers: most registers of a thread, None for the compiler's choice; see `most_registers`.
    """

    block_m: int
    block_n: int
    warps: int
    stages: int
    full_first: bool = True
    heads: int = 1
    registers: int | None = None

    def most_registers(self, group: int) -> int | None:
        """The bound for G query heads per KV head."""
        if self.registers is None:
            small = self.block_m <= 32 and self.heads == 1
            return (SMALL_BOUND if small else LARGE_BOUND) if OLD_TRITON else None
        if self.heads == 1 or group == 1:
            return self.registers
        return max(self.registers, GROUPED_REGISTERS)


class Line(NamedTuple):
    """The tile of calls with at most `rows` query rows of a KV head and at most `entries` of its slot table.

    `old` is the tile for Triton before 3.9 and `eight_bit` that of int8 pages, where these need another.
    """

    rows: int
    tile: Tile
    reason: str
    entries: int = 1 << 30
    old: Tile | None = None
    eight_bit: Tile | None = None

    def chosen(self, eight_bit: bool) -> Tile:
        """The tile for the Triton at hand and for pages of this kind."""
        if eight_bit:
            return (self.eight_bit or self.tile)._replace(registers=LARGE_BOUND)
        return self.old if OLD_TRITON and self.old is not None else self.tile


ANY = 1 << 30

# Few rows: what counts is how many heads' loads are in flight on a multiprocessor.
_PACKED_64 = Line(
    16, Tile(16, 16, 4, 1, heads=4, registers=128),
    "not yet measured: one warp per head; the bound (164 without it) makes it 4 programs, so 16 heads per "
    "multiprocessor, and still spills nothing; Triton 3.6 spills below 168", entries=2,
    old=Tile(16, 16, 4, 1, heads=4, registers=168),
)  # fmt: skip
_PACKED_128 = Line(
    16, Tile(16, 16, 4, 1, heads=2),
    "not yet measured: two warps per head, 156 registers; one warp per head takes 224 and halves the programs",
    entries=2,
)  # fmt: skip
_ROWS_16 = Line(16, Tile(16, 32, 4, 3, False), "not yet measured: long history; memory-bound, 10 programs of 19 KB")
_ROWS_32 = Line(32, Tile(32, 32, 4, 3, False), "not yet measured: memory-bound; many small programs")

LINES: dict[tuple[int, int], tuple[Line, ...]] = {
    (80, 64): (
        _PACKED_64,
        _ROWS_16,
        _ROWS_32,
        Line(128, Tile(64, 32, 4, 3, False), "not yet measured: 128 registers, 4 programs; BLOCK_N 64 takes 183"),
        Line(
            ANY, Tile(64, 64, 4, 3, registers=248),
            "not yet measured: 195 … 202 registers, 2 programs; unbounded, the assembler aims at 168 and spills; int8 "
            "spills at BLOCK_N 64",
            eight_bit=Tile(64, 32, 4, 3),
        ),
    ),
    (80, 128): (
        _PACKED_128,
        Line(16, Tile(16, 32, 4, 3, False), "not yet measured: long history; 37 KB in flight each"),
        Line(32, Tile(32, 32, 8, 3, False), "not yet measured: memory-bound; 4 warps spill 8 bytes"),
        Line(
            64, Tile(64, 32, 4, 3, False, registers=224),
            "not yet measured: 128 rows would be half padding; unbounded, the assembler aims at 168 and spills",
        ),
        Line(
            ANY, Tile(128, 64, 8, 3),
            "not yet measured: 98 KB fit all; 64 rows in 4 warps take 255 registers; Triton 3.6 spills at BLOCK_N 64, "
            "int8 of fp16 also with a loop for full tiles, and 64 rows would convert every tile twice as often",
            old=Tile(128, 32, 8, 3), eight_bit=Tile(128, 32, 8, 3, False),
        ),
    ),
    (90, 64): (
        _PACKED_64,
        _ROWS_16,
        _ROWS_32,
        Line(192, Tile(64, 64, 4, 3, False), "not yet measured: 127 registers, 4 programs; n 169 pads 12 %"),
        Line(
            ANY, Tile(128, 64, 8, 3, registers=128),
            "not yet measured: wgmma; the bound (167 without it) makes it 2 programs, one's softmax under the other's "
            "products; 64 rows would read K and V twice as often, BLOCK_N 128 spills; Triton 3.6 spills below 152",
            old=Tile(128, 64, 8, 3, registers=168),
        ),
    ),
    (90, 128): (
        _PACKED_128,
        Line(16, Tile(16, 32, 4, 3, False), "not yet measured: long history; 37 KB in flight each"),
        Line(32, Tile(32, 32, 4, 3, False), "not yet measured: memory-bound; 128 registers"),
        Line(192, Tile(64, 32, 4, 3, False), "not yet measured: 168 registers, 3 programs"),
        Line(ANY, Tile(128, 64, 8, 3), "not yet measured: wgmma, 248 registers, 1 program; BLOCK_N 128 spills"),
    ),
    (100, 64): (
        _PACKED_64,
        _ROWS_16,
        Line(
            32, Tile(32, 32, 4, 3, False, registers=80),
            "not yet measured: memory-bound; 6 programs, unbounded GQA aims at 80 and spills",
        ),
        Line(192, Tile(64, 64, 4, 3, False), "not yet measured: as on sm_90"),
        Line(ANY, Tile(128, 64, 8, 3), "not yet measured: tcgen05; 4 warps take 254 registers"),
    ),
    (100, 128): (
        _PACKED_128,
        Line(16, Tile(16, 32, 4, 3, False), "not yet measured: as on sm_90"),
        Line(32, Tile(32, 32, 4, 3, False), "not yet measured: as on sm_90"),
        Line(192, Tile(64, 32, 4, 3, False), "not yet measured: as on sm_90"),
        Line(ANY, Tile(128, 64, 8, 3), "not yet measured: tcgen05, 254 registers; 4 warps spill"),
    ),
}  # fmt: skip
# sm_120 has neither wgmma nor tcgen05 and the shared memory of sm_86, so it takes those tiles: not yet measured. Its
# assembler spills under the bounds that keep sm_80's from it, and heads of 96 without one.
for _head_dim in (64, 128):
    LINES[120, _head_dim] = tuple(
        line
        if line.tile.heads > 1
        else line._replace(
            tile=line.tile._replace(registers=SMALL_BOUND if _head_dim == 128 and line.rows <= 16 else None),
            old=line.old and line.old._replace(registers=None, full_first=False),
            eight_bit=(line.eight_bit or line.tile)._replace(
                full_first=False,
                warps=8 if _head_dim == 128 and line.rows > 16 else 4,
                block_m=min(64, (line.eight_bit or line.tile).block_m),
            ),
        )
        for line in LINES[80, _head_dim]
    )

# fp32 pages are for debugging: no tensor cores, so a tile small enough for registers.
FP32 = Tile(16, 32, 4, 1, False)
FAMILIES = (120, 100, 90, 80)

# A share of a head's keys shorter than this does not pay for writing and merging it. Not yet measured: four tiles are
# as much as the pipeline needs to fill and drain.
SHARE_TILES = 4


def lines(arch: int, head_dim: int) -> tuple[Line, ...]:
    """The table of the newest family that is not newer than `arch`; heads of 96 are padded to 128."""
    family = next((family for family in FAMILIES if family <= arch), FAMILIES[-1])
    return LINES[family, 64 if head_dim <= 64 else 128]


def attn_tile(
    arch: int, head_dim: int, element_size: int, rows: int, entries: int, eight_bit: bool = False
) -> Tile:  # fmt: skip
    """The tile of a call: the first line that takes it.

    Args:
        arch: compute capability, as 90.
        head_dim: D.
        element_size: bytes of an element of q.
        rows: n · G.
        entries: S.
        eight_bit: whether pages are int8.
    """
    if element_size > 2:
        return FP32
    found = next(line for line in lines(arch, head_dim) if rows <= line.rows and entries <= line.entries)
    return found.chosen(eight_bit)


def split_count(programs: int, tiles: int, processors: int) -> int:
    """Shares to cut each head's keys into, so that a call with few programs still fills the GPU.

    From shapes alone, so the same call always adds up in the same order.
    """
    if programs >= processors:
        return 1
    return max(1, min(tiles // SHARE_TILES, 2 * processors // programs))
