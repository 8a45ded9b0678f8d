"""The book of coming ticks: never more than the pool, in order, and at a pace it can go on with for ever."""

import numpy as np
import pytest

from amskv_kernels.serving.admission import Admission, Pace

RISING = np.array([1, 1, 2, 4, 8, 8])


def random_curve(rng: np.random.Generator) -> np.ndarray:
    return rng.integers(1, 20, rng.integers(1, 12))


@pytest.mark.parametrize("seed", range(20))
def test_the_pace_fits_for_ever(seed):
    rng = np.random.default_rng(seed)
    curve = random_curve(rng)
    units = int(curve.max()) * int(rng.integers(1, 9)) + int(rng.integers(0, 9))
    pace = Pace.of(curve, units)
    load = np.zeros(200, dtype=int)
    least = 2 if units >= 2 * curve.max() else 1
    for entry in range(150 * pace.sequences // pace.ticks // least):
        start = entry * least * pace.ticks // pace.sequences
        load[start : start + len(curve)] += least * curve
    assert load.max() <= units
    lockstep = units // int(curve.max())  # at once, every len(curve) ticks; in whole pairs where one fits
    assert pace.inside(len(curve)) >= max(lockstep // 2 * 2, 1)


def test_wide_steps_of_some_fall_on_narrow_ones_of_others():
    pace = Pace.of(RISING, 32)  # lockstep has four inside at once
    assert pace == (2, 2)
    assert pace.inside(len(RISING)) == 6


@pytest.mark.parametrize("seed", range(20))
def test_while_many_wait_they_enter_at_that_pace(seed):
    rng = np.random.default_rng(300 + seed)
    curve = random_curve(rng)
    units = int(curve.max()) * int(rng.integers(2, 12)) + int(rng.integers(0, 9))
    book, entered, ticks = Admission(curve, units), 0, 120
    for _ in range(ticks):
        while book.enter(2):
            entered += 2
        book.advance()
    assert entered == -(-ticks * book.pace.sequences // book.pace.ticks // 2) * 2, "none is held up by the pool"


def test_evenly_spread_more_fit_than_in_bursts():
    curve = np.array([8, 8, 16, 24, 40, 56, 88, 95, 99, 88])  # the digits under ams-kv:75
    assert Pace.of(curve, 4 * 99) == (4, 7), "two images in seven steps; two at once would need eight"


def test_a_pair_is_let_in_where_one_fits():
    assert Pace.of(np.array([5]), 9) == (1, 1)
    assert Pace.of(np.array([5]), 10) == (2, 1)
    assert Pace.of(np.array([3]), 11) == (2, 1), "three would leave a sequence's room that no pair can take"


@pytest.mark.parametrize("seed", range(20))
def test_booked_is_held_and_never_beyond_the_pool(seed):
    rng = np.random.default_rng(100 + seed)
    curve = random_curve(rng)
    units = int(curve.max()) * int(rng.integers(2, 8))
    book = Admission(curve, units)
    inside: list[list[int]] = []  # [sequences, steps done]
    for _ in range(80):
        for request in [r for r in inside if rng.random() < 0.1]:
            book.leave(*request)
            inside.remove(request)
        while book.enter(sequences := int(rng.integers(1, 3))):
            inside.append([sequences, 0])
        held = [
            sum(n * curve[done + ahead] for n, done in inside if done + ahead < len(curve))
            for ahead in range(len(curve))
        ]
        assert book.coming.tolist() == held
        assert max(held) <= units
        book.advance()
        inside = [[n, done + 1] for n, done in inside if done + 1 < len(curve)]


def test_who_leaves_makes_room_for_another():
    book = Admission(RISING, 16)
    assert book.enter(2) and not book.enter(1)
    book.advance()
    book.leave(2, 1)
    assert not book.coming.any()
    assert book.enter(2)


def test_a_waiting_request_enters_within_the_curves_length():
    book = Admission(RISING, 16)
    assert book.enter(2)
    waited = 0
    while not book.enter(2):
        book.advance()
        waited += 1
    assert waited <= len(RISING)


def test_what_can_never_enter_is_told_with_the_numbers():
    book = Admission(RISING, 15)
    assert book.never(1) is None
    assert book.never(2) == "the image needs 2 · 8 = 16 pages at its widest step; the pool has 15"
    with pytest.raises(ValueError, match="a sequence holds up to 8 units; the pool has 7"):
        Admission(RISING, 7)
