"""Random schedules under random policies of all three kinds, against a simulation that writes and reads every row."""

from dataclasses import dataclass

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from amskv_kernels import CachePlan, ScaleSchedule
from amskv_kernels.planning.layout import PAGE_SIZES, ROWS_BITS, ROWS_MASK
from amskv_kernels.policies import HeadPolicy, TokenPolicy
from amskv_kernels.policies.base import Selection

EMPTY = -1


@dataclass(frozen=True)
class HeadTable(HeadPolicy):
    """Any head policy at all: deaths[layer][head][scale] is the last step that reads the scale."""

    deaths: tuple

    def visible_to(self, schedule, layer, head, step):
        return tuple(scale for scale in range(step) if self.deaths[layer][head][scale] >= step)

    def check_heads(self, schedule, num_layers, kv_heads):
        pass


@dataclass(frozen=True)
class TokenTable(TokenPolicy):
    """Any number of tokens at all."""

    rows: tuple

    @property
    def selection(self):
        return Selection("none")

    def held(self, schedule, num_layers):
        return self.rows


@st.composite
def schedules(draw):
    side = st.integers(1, 9)
    return ScaleSchedule([(draw(side), draw(side)) for _ in range(draw(st.integers(1, 7)))])


@st.composite
def head_cases(draw):
    schedule, layers, heads = draw(schedules()), draw(st.integers(1, 4)), draw(st.integers(1, 4))
    death = st.integers(0, len(schedule) - 1)
    deaths = tuple(tuple(tuple(draw(death) for _ in schedule.sizes) for _ in range(heads)) for _ in range(layers))
    return schedule, HeadTable(deaths), layers, heads, draw(st.sampled_from((*PAGE_SIZES, None)))


@st.composite
def token_cases(draw):
    schedule, layers = draw(schedules()), draw(st.integers(1, 4))
    rows = [(0,) * layers]
    for brought in schedule.tokens[:-1]:
        most = [before + brought for before in rows[-1]]
        rows.append(tuple(draw(st.one_of(st.just(n), st.integers(0, n))) for n in most))
    return schedule, TokenTable(tuple(rows)), layers, draw(st.sampled_from((*PAGE_SIZES, None)))


def entries(table):
    """(page, rows) of a table's slots, those that are none left out."""
    return [(int(slot) >> ROWS_BITS, int(slot) & ROWS_MASK) for slot in table if slot]


class Arena:
    """Whose token every row holds; refuses to lose one that is still to be read."""

    def __init__(self, plan):
        self.rows = np.full((plan.pages, plan.page_size), EMPTY)
        self.names = []
        self.live_until = {}  # token -> the last call that reads it

    def name(self, token):
        """A number for a token, so that NumPy can hold it."""
        self.names.append(token)
        return len(self.names) - 1

    def read(self, table):
        return [token for page, rows in entries(table) for token in self.rows[page, :rows].tolist()]

    def write(self, table, tokens, now, until):
        """Store `tokens` in the last rows that the table names; it may grow a partial page."""
        own = entries(table)
        skip = sum(rows for _, rows in own) - len(tokens)
        at = [(page, row) for page, rows in own for row in range(rows)]
        assert 0 <= skip < self.rows.shape[1]
        for page, _ in own:  # a store zero-fills the rest of every page it writes
            first = min(row for p, row in at[skip:] if p == page)
            lost = set(self.rows[page, first:].tolist()) - {EMPTY}
            assert all(self.live_until[token] < now for token in lost), "a page holds two live entries"
            self.rows[page, first:] = EMPTY
        for place, token in zip(at[skip:], tokens, strict=True):
            self.rows[place] = token
            self.live_until[token] = until


@settings(max_examples=150, deadline=None)
@given(head_cases())
def test_every_head_finds_what_it_wrote_and_nothing_lives_twice(case):
    schedule, policy, layers, heads, page_size = case
    plan = CachePlan.build(schedule, policy, layers, page_size, kv_heads=heads)
    arena, live = Arena(plan), 0
    for step, n in enumerate(schedule.tokens):
        for layer in range(layers):
            now = step * layers + layer
            read, write = (np.atleast_2d(t(step, layer)) for t in (plan.read_slots, plan.write_slots))
            for head in range(heads):
                expected = {
                    (layer, head, scale, i)
                    for scale in policy.visible_to(schedule, layer, head, step)
                    for i in range(schedule.tokens[scale])
                }
                assert sorted(map(arena.names.__getitem__, arena.read(read[head]))) == sorted(expected)
            for head in range(heads):
                death = policy.deaths[layer][head][step]
                if death > step:
                    tokens = [arena.name((layer, head, step, i)) for i in range(n)]
                    arena.write(write[head], tokens, now, death * layers + layer)
                else:
                    assert not entries(write[head])
            held = sum(until >= now for until in arena.live_until.values())
            assert plan.live[step, layer] == held
            live = max(live, held + heads * n)
    assert plan.peak_tokens == live
    assert plan.pages == plan.live_pages.max()
    assert plan.needed_tokens == plan.pages * plan.page_size + heads * max(schedule.tokens)


@settings(max_examples=150, deadline=None)
@given(token_cases())
def test_chosen_tokens_move_without_loss(case):
    """The kept keys are read from history and map alike, and stand in fresh pages that nothing else lives in."""
    schedule, policy, layers, page_size = case
    plan = CachePlan.build(schedule, policy, layers, page_size)
    arena, held, rng, peak = Arena(plan), [[] for _ in range(layers)], np.random.default_rng(0), 0
    for step, n in enumerate(schedule.tokens):
        for layer in range(layers):
            now, later = step * layers + layer, (step + 1) * layers + layer
            found = arena.read(plan.read_slots(step, layer))
            assert sorted(found) == sorted(held[layer])
            assert plan.read_rows(step, layer) == len(found) == policy.rows[step][layer]
            brought, at = [arena.name((layer, step, i)) for i in range(n)], plan.compaction(step, layer)
            moving = 0
            if at is not None:
                keys = [*found, *brought]
                assert (at.held, at.kept) == (len(found), policy.rows[step + 1][layer])
                kept = [keys[i] for i in sorted(rng.choice(len(keys), at.kept, replace=False))]
                assert not {page for page, _ in entries(plan.read_slots(step, layer))} & {
                    page for page, _ in entries(at.slots)
                }
                fresh = [arena.name(arena.names[token]) for token in kept]  # the source is still there: both live
                arena.write(at.slots, fresh, now, later)
                held[layer], moving = fresh, at.kept
            elif step + 1 < len(schedule) and policy.rows[step + 1][layer]:
                arena.write(plan.write_slots(step, layer), brought, now, later)
                held[layer] = found + brought
                moving = n
                for token in found:
                    arena.live_until[token] = later
            else:
                held[layer] = []
            others = sum(len(each) for i, each in enumerate(held) if i != layer)
            assert plan.live[step, layer] == others + len(found) + moving
            peak = max(peak, others + len(found) + moving + n)
        if step + 1 < len(schedule):
            assert plan.retained[step] == sum(policy.rows[step + 1])
    assert plan.peak_tokens == peak
    assert plan.pages == plan.live_pages.max()
    assert plan.needed_tokens == plan.pages * plan.page_size + max(schedule.tokens)
