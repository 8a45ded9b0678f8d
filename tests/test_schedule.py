import pytest

from amskv_kernels import ScaleSchedule


def test_published_token_counts():
    assert (ScaleSchedule.named("var-256").total, ScaleSchedule.named("var-256").prefix) == (680, 424)
    assert (ScaleSchedule.named("var-512").total, ScaleSchedule.named("var-512").prefix) == (2240, 1216)
    assert (ScaleSchedule.named("infinity-1m-1.000").total, ScaleSchedule.named("infinity-1m-1.000").prefix) == (
        10521,
        6425,
    )
    assert len(ScaleSchedule.names()) == 3 + 15 * 4


@pytest.mark.parametrize("name", ScaleSchedule.names())
def test_offsets_tile_the_sequence(name):
    schedule = ScaleSchedule.named(name)
    ends = [offset + n for offset, n in zip(schedule.offsets, schedule.tokens, strict=True)]
    assert schedule.offsets == (0, *ends[:-1])
    assert ends[-1] == schedule.total
    assert all(n == h * w for n, (h, w) in zip(schedule.tokens, schedule.sizes, strict=True))


def test_equality_is_by_sizes():
    assert ScaleSchedule([(1, 1), (2, 3)]) == ScaleSchedule([[1, 1], [2, 3]], "another name")
    assert ScaleSchedule([(1, 1), (2, 3)]) != ScaleSchedule([(1, 1), (3, 2)])


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ([], "sizes is empty"),
        ([(1, 1), (2,)], r"sizes\[1\] is \(2,\); it must be two positive integers"),
        ([(0, 1)], r"sizes\[0\] is \(0, 1\)"),
        ([(1, 2.0)], r"sizes\[0\] is \(1, 2.0\)"),
        ([(True, 1)], r"sizes\[0\]"),
    ],
)
def test_bad_sizes_are_named(sizes, message):
    with pytest.raises(ValueError, match=message):
        ScaleSchedule(sizes)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ([1, 2, 3], r"sizes\[0\] is 1; it must be two positive integers \(h, w\)"),
        (5, r"sizes is 5; it must be a sequence of \(h, w\), one per scale"),
    ],
)
def test_what_is_no_sequence_is_named(sizes, message):
    with pytest.raises(TypeError, match=message):
        ScaleSchedule(sizes)


def test_unknown_name_lists_the_known_ones():
    with pytest.raises(ValueError, match="'var-255' is not a published one; known: var-256, var-512"):
        ScaleSchedule.named("var-255")
