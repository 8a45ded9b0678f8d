"""Random plans against brute force: pages filled and read as the tables say must hold what the policy asks for."""

from __future__ import annotations

import random
from dataclasses import dataclass

from amskv_kernels import CachePlan, ScaleSchedule
from amskv_kernels.planning.layout import PAGE_SIZES, ROWS_BITS, ROWS_MASK
from amskv_kernels.policies import HeadPolicy, Policy, Selection, TokenPolicy

Seen = tuple[tuple[tuple[int, ...], ...], ...]  # by row (layer, or layer and head) and step
Token = tuple[int, int, int]  # row, scale, place in it
Pages = dict[int, list[Token]]


@dataclass(frozen=True)
class Given(Policy):
    """Reads what a table says."""

    seen: Seen

    def visible(self, schedule: ScaleSchedule, layer: int, step: int) -> tuple[int, ...]:
        """As the table says."""
        return self.seen[layer][step]


@dataclass(frozen=True)
class GivenToHeads(HeadPolicy):
    """Reads what a table says, head by head."""

    seen: Seen
    heads: int

    def visible_to(self, schedule: ScaleSchedule, layer: int, head: int, step: int) -> tuple[int, ...]:
        """As the table says."""
        return self.seen[layer * self.heads + head][step]

    def check_heads(self, schedule: ScaleSchedule, num_layers: int, kv_heads: int) -> None:
        """Made for these heads."""


@dataclass(frozen=True)
class Counts(TokenPolicy):
    """Holds as many tokens as a table says."""

    table: tuple[tuple[int, ...], ...]

    @property
    def selection(self) -> Selection:
        """The most recent ones."""
        return Selection("none")

    def held(self, schedule: ScaleSchedule, num_layers: int) -> tuple[tuple[int, ...], ...]:
        """As the table says."""
        return self.table


def judge_plan(number: int) -> str | None:
    """What is wrong with the plan that this number draws, None if nothing is."""
    rng = random.Random(number)
    sizes = [(rng.randint(1, 7), rng.randint(1, 7)) for _ in range(rng.randint(1, 6))]
    schedule, layers, page_size = ScaleSchedule(sizes), rng.randint(1, 4), rng.choice((None, *PAGE_SIZES))
    kind = rng.choice(("scales", "heads", "tokens"))
    if kind == "tokens":
        return _judge_tokens(schedule, layers, page_size, rng)
    heads = rng.randint(2, 3) if kind == "heads" else 1
    seen = tuple(_seen(len(sizes), rng) for _ in range(layers * heads))
    policy = Given(seen) if kind == "scales" else GivenToHeads(seen, heads)
    plan = CachePlan.build(schedule, policy, layers, page_size, heads)
    return _judge_scales(plan, seen, heads)


def _seen(steps: int, rng: random.Random) -> tuple[tuple[int, ...], ...]:
    """What one row reads at each step: a dropped scale never returns."""
    held: tuple[int, ...] = ()
    found = []
    share = rng.choice((0.5, 0.8, 1.0))
    for step in range(steps):
        fresh = (step - 1,) if step else ()
        held = tuple(scale for scale in (*held, *fresh) if rng.random() < share)
        found.append(held)
    return tuple(found)


def _judge_scales(plan: CachePlan, seen: Seen, heads: int) -> str | None:
    schedule = plan.schedule
    pages: Pages = {}
    for step, count in enumerate(schedule.tokens):
        for layer in range(plan.num_layers):
            read, write = (
                table.reshape(heads, -1).tolist()
                for table in (plan.read_slots(step, layer), plan.write_slots(step, layer))
            )
            for head in range(heads):
                row = layer * heads + head
                expected = [(row, scale, i) for scale in seen[row][step] for i in range(schedule.tokens[scale])]
                if sorted(_read(pages, read[head])) != expected:
                    return f"step {step}, row {row} does not find what it reads"
            for head in range(heads):  # what the whole call reads is read before any of it is written over
                row = layer * heads + head
                needed = any(step in later for later in seen[row][step + 1 :])
                tokens = [(row, step, i) for i in range(count)]
                if (wrong := _write(pages, write[head], tokens if needed else [], plan.pages)) is not None:
                    return f"step {step}, row {row} {wrong}"
    return _judge_memory(plan, seen, heads)


def _judge_memory(plan: CachePlan, seen: Seen, heads: int) -> str | None:
    """Tokens between steps, counted one by one."""
    tokens, steps = plan.schedule.tokens, len(plan.schedule)
    for step in range(steps):
        held = sum(
            tokens[scale]
            for row in seen
            for scale in range(step + 1)
            if any(scale in later for later in row[step + 1 :])
        )
        if held != plan.retained[step]:
            return f"{plan.retained[step]} tokens are said to stay after step {step}; {held} do"
    return None


def _judge_tokens(schedule: ScaleSchedule, layers: int, page_size: int | None, rng: random.Random) -> str | None:
    table = [(0,) * layers]
    for count in schedule.tokens[:-1]:
        table.append(tuple(rng.choice((held + count, rng.randint(0, held + count))) for held in table[-1]))
    plan = CachePlan.build(schedule, Counts(tuple(table)), layers, page_size)
    pages: Pages = {}
    for step, count in enumerate(schedule.tokens):
        for layer in range(layers):
            found = _read(pages, plan.read_slots(step, layer).tolist())
            if len(found) != table[step][layer] or any(token[0] != layer for token in found):
                return f"step {step}, layer {layer} does not find its {table[step][layer]} tokens"
            fresh = [(layer, step, i) for i in range(count)]
            slots = plan.write_slots(step, layer).tolist()
            wrong = _write(pages, slots, fresh if slots else [], plan.pages)
            at = plan.compaction(step, layer)
            if at is not None and wrong is None:
                if {slot >> ROWS_BITS for slot in at.slots.tolist()} & {
                    slot >> ROWS_BITS for slot in plan.read_slots(step, layer).tolist()
                }:
                    return f"step {step}, layer {layer} moves tokens into pages that it reads"
                wrong = _write(pages, at.slots.tolist(), [*found, *fresh][-at.kept :], plan.pages)
            if wrong is not None:
                return f"step {step}, layer {layer} {wrong}"
    return None


def _read(pages: Pages, slots: list[int]) -> list[Token]:
    return [
        token for slot in slots for token in pages.get(slot >> ROWS_BITS, [])[: slot & ROWS_MASK] if slot & ROWS_MASK
    ]


def _write(pages: Pages, slots: list[int], tokens: list[Token], room: int) -> str | None:
    """Store tokens as an op does, after the rows that the first page keeps."""
    rows = [(slot >> ROWS_BITS, slot & ROWS_MASK) for slot in slots if slot & ROWS_MASK]
    kept = sum(count for _, count in rows) - len(tokens)
    if not rows:
        return f"stores nothing of {len(tokens)} tokens" if tokens else None
    if not 0 <= kept < rows[0][1] or any(page >= room for page, _ in rows):
        return f"names {kept + len(tokens)} rows for {len(tokens)} tokens, or pages past the {room} planned"
    left = [*pages.get(rows[0][0], [])[:kept], *tokens]
    for page, count in rows:
        pages[page], left = left[:count], left[count:]
    return None
