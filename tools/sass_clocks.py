"""How many clocks a loop of machine code takes a warp to issue: an estimate, by following a path through it.

ptxas writes into every instruction how many clocks the warp then stalls, which scoreboard the instruction sets and
which it waits for. Walked through in order, with assumed latencies for what sets a scoreboard, they give the time of a
warp that has an issue slot to itself and finds every barrier open.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

# Clocks until a scoreboard is free, where the instruction takes other than DEFAULT. Assumed, none measured here: shared
# memory and shuffles about 24, a hit in L1 40, the copy engine's queue 30.
LATENCY = {
    "LDG": 40, "LDC": 30, "LDS": 24, "STS": 20, "SHFL": 24, "SYNCS": 25, "S2R": 25, "S2UR": 25, "MUFU": 22, "I2F": 22,
    "F2I": 22, "POPC": 20, "BAR": 25, "UTMALDG": 30, "UTMASTG": 30, "R2UR": 12, "VOTEU": 12, "STG": 20,
}  # fmt: skip
DEFAULT = 10
QUARTER_RATE = {"MUFU", "I2F", "F2I"}  # 16 lanes of a multiprocessor, 4 of a scheduler: a warp takes 8 clocks
NO_BOARD, BOARDS = 7, 6


class Instruction(NamedTuple):
    """One instruction and its control word."""

    address: int
    text: str  # without its predicate
    predicate: str  # "@!P0", or empty
    stall: int
    sets: int  # the scoreboard that is free when the result is there
    frees: int  # the one that is free when the operands have been read
    waits: int  # bit i: for scoreboard i

    @property
    def name(self) -> str:
        return re.split(r"[ .;]", self.text, maxsplit=1)[0]

    @property
    def target(self) -> int | None:
        match = re.match(r"BRA\S* (?:!?U?P\w+, )?(0x[0-9a-f]+)", self.text)
        return int(match[1], 16) if match else None

    @property
    def leaves(self) -> bool:
        """Whether the next instruction is never the one behind it."""
        return not self.predicate and (self.name == "EXIT" or re.match(r"BRA 0x", self.text) is not None)

    def starts(self, mnemonic: str) -> bool:
        return self.text.startswith(mnemonic)


def functions(sass: str) -> dict[tuple[str, str], list[Instruction]]:
    """(architecture, symbol) → its instructions, from what `cuobjdump -sass` prints."""
    found: dict[tuple[str, str], list[Instruction]] = {}
    architecture, current = "", []
    lines = sass.splitlines()
    for line, following in zip(lines, [*lines[1:], ""], strict=True):
        if match := re.search(r"arch = sm_(\d+a?)", line):
            architecture = match[1]
        elif match := re.search(r"Function : (\w+)", line):
            current = found.setdefault((architecture, match[1]), [])
        elif match := re.match(r"\s+/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+ )?\s*(.*?)\s*;", line):
            control = re.match(r"\s+/\* (0x[0-9a-f]+) \*/", following)
            bits = int(control[1], 16) if control else 0
            sets, frees, waits = bits >> 46 & 7, bits >> 49 & 7, bits >> 52 & 63
            predicate = (match[2] or "").strip()
            current.append(Instruction(int(match[1], 16), match[3], predicate, bits >> 41 & 15, sets, frees, waits))
    return found


def clocks(executed: Iterable[Instruction]) -> int:
    """Clocks until the last of these instructions has issued."""
    clock, special, boards = 0, 0, [0] * BOARDS
    for i in executed:
        clock = max([clock, *(boards[board] for board in range(BOARDS) if i.waits >> board & 1)])
        if i.name in QUARTER_RATE:
            clock = max(clock, special)
            special = clock + 8
        latency = LATENCY.get(i.name, DEFAULT)
        if i.sets != NO_BOARD:
            boards[i.sets] = max(boards[i.sets], clock + latency)
        if i.frees != NO_BOARD:
            boards[i.frees] = max(boards[i.frees], clock + min(latency, 20))
        clock += max(i.stall, 1)
    return clock


class Loop(NamedTuple):
    """Instructions first … last of a function; the last one jumps back to the first."""

    body: tuple[Instruction, ...]

    def has(self, mnemonic: str) -> bool:
        return any(i.starts(mnemonic) for i in self.body)

    def holds(self, other: Loop) -> bool:
        return self != other and self.body[0].address <= other.body[0].address <= other.body[-1].address <= (
            self.body[-1].address
        )


def loops(code: list[Instruction]) -> list[Loop]:
    """Every loop, the shortest first; where several jumps lead to one place, the last closes the loop."""
    found: dict[int, Loop] = {}
    for jump in code:
        if jump.target is not None and jump.target < jump.address:
            loop = Loop(tuple(i for i in code if jump.target <= i.address <= jump.address))
            if 0 in _ways(loop, longest=False):  # waits spin behind the function's end and jump back from there
                found[jump.target] = loop
    return sorted(found.values(), key=lambda loop: len(loop.body))


def path(loop: Loop, repeats: dict[Loop, int], longest: bool) -> list[Instruction]:
    """One round through a loop: the way with most instructions, or with fewest, and inner loops as often as told.

    Jumps out of the loop are not followed: they are waits that find nothing to wait for. Inner loops that are not
    among `repeats` run once.
    """
    inner = {each.body[-1].address: (each, times) for each, times in repeats.items()}
    return _unrolled([loop.body[k] for k in _ways(loop, longest)[0]], inner)


def _ways(loop: Loop, longest: bool) -> dict[int, list[int]]:
    """From every place in the loop that its end is reached from, the places on the way."""
    order = {i.address: k for k, i in enumerate(loop.body)}
    last = len(loop.body) - 1
    best: dict[int, list[int]] = {last: [last]}
    for k in reversed(range(last)):
        i = loop.body[k]
        ahead = [] if i.leaves else [k + 1]
        target = None if i.target is None else order.get(i.target)
        if target is not None and target > k:
            ahead.append(target)
        if choices := [best[to] for to in ahead if to in best]:
            best[k] = [k, *(max if longest else min)(choices, key=len)]
    return best


def _unrolled(walk: list[Instruction], inner: dict[int, tuple[Loop, int]]) -> list[Instruction]:
    """The walk with the rounds of its inner loops, the innermost first."""
    done: list[Instruction] = []
    for i in walk:
        done.append(i)
        if i.address in inner:
            loop, times = inner[i.address]
            first = next(k for k, other in enumerate(done) if other.address == loop.body[0].address)
            done += done[first:] * (times - 1)
    return done
