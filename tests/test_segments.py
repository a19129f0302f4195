import pytest

from icae.errors import ICAEError
from icae.segments import alike, appended, cut, positions, slot_count, spread


@pytest.mark.parametrize(
    ("length", "longest", "table"),
    [
        (1, 4, [(0, 1)]),
        (4, 4, [(0, 4)]),
        (5, 4, [(0, 2), (2, 5)]),
        (10, 4, [(0, 3), (3, 6), (6, 10)]),
        (3, 1, [(0, 1), (1, 2), (2, 3)]),
    ],
)
def test_cut_by_hand(length, longest, table):
    assert cut(length, longest) == table


@pytest.mark.parametrize(
    ("length", "longest", "ratio", "table"),
    [
        (10, 4, 2, [(0, 2), (2, 6), (6, 10)]),
        (9, 8, 4, [(0, 4), (4, 9)]),
        (17, 8, 4, [(0, 4), (4, 12), (12, 17)]),
        (500, 128, 4, [(0, 124), (124, 248), (248, 372), (372, 500)]),
        (7, 3, 2, [(0, 2), (2, 4), (4, 6), (6, 7)]),
        (5, 3, 8, [(0, 3), (3, 5)]),
    ],
)
def test_cut_between_blocks_by_hand(length, longest, ratio, table):
    assert cut(length, longest, ratio) == table


@pytest.mark.parametrize(("longest", "ratio"), [(128, 4), (128, 16), (24, 5), (8, 8)])
def test_blocks_that_are_not_cut_cost_no_slot_more_than_the_ratio_says(longest, ratio):
    for length in range(1, 400):
        parts = cut(length, longest, ratio)
        assert [i for a, b in parts for i in range(a, b)] == list(range(length))
        sizes = [b - a for a, b in parts]
        assert max(sizes) <= longest and max(sizes) - min(sizes) <= ratio
        assert sum(slot_count(size, ratio) for size in sizes) == slot_count(length, ratio)


@pytest.mark.parametrize("longest", [1, 3, 7, 128])
def test_cut_covers_everything_once_evenly_in_the_fewest_segments(longest):
    for length in range(1, 300):
        parts = cut(length, longest)
        assert [i for a, b in parts for i in range(a, b)] == list(range(length))
        sizes = [b - a for a, b in parts]
        assert max(sizes) <= longest and max(sizes) - min(sizes) <= 1
        assert len(parts) == (length + longest - 1) // longest


def test_an_empty_context_is_refused():
    with pytest.raises(ICAEError, match="empty"):
        cut(0, 4)


@pytest.mark.parametrize(("length", "ratio", "k"), [(8, 4, 2), (9, 4, 3), (1, 4, 1), (4, 4, 1), (5, 1, 5)])
def test_slots_are_the_ceiling_of_length_over_ratio(length, ratio, k):
    assert slot_count(length, ratio) == k


def test_a_ratio_below_one_is_refused_with_the_number():
    with pytest.raises(ICAEError, match="ratio must be at least 1, got 0"):
        slot_count(8, 0)


# (length, ratio): context, memory, slots, span
SPREAD = {
    (8, 4): ([1, 2, 3, 4, 5, 6, 7, 8], [2, 6], [2, 6], 8),
    (9, 4): ([1, 2, 3, 4, 5, 6, 7, 8, 9], [2, 6, 9], [2, 6, 9], 9),
    (3, 1): ([1, 2, 3], [1, 2, 3], [1, 2, 3], 3),
    (5, 2): ([1, 2, 3, 4, 5], [1, 3, 5], [1, 3, 5], 5),
    (6, 3): ([1, 2, 3, 4, 5, 6], [2, 5], [2, 5], 6),
    (2, 16): ([1, 2], [2], [2], 2),
    (1, 4): ([1], [1], [1], 1),
}
APPENDED = {
    (8, 4): ([0, 1, 2, 3, 4, 5, 6, 7], [8, 9], [0, 1], 2),
    (9, 4): ([0, 1, 2, 3, 4, 5, 6, 7, 8], [9, 10, 11], [0, 1, 2], 3),
    (3, 1): ([0, 1, 2], [3, 4, 5], [0, 1, 2], 3),
    (1, 4): ([0], [1], [0], 1),
}


@pytest.mark.parametrize(
    ("layout", "key", "table"),
    [("spread", k, v) for k, v in SPREAD.items()] + [("appended", k, v) for k, v in APPENDED.items()],
)
def test_positions_by_hand(layout, key, table):
    p = positions(layout, *key)
    assert (p.context, p.memory, p.slots, p.span) == table
    assert p == {"spread": spread, "appended": appended}[layout](*key)


def test_spread_slots_stand_inside_their_own_blocks():
    for length in range(1, 70):
        for ratio in range(1, 20):
            for i, place in enumerate(spread(length, ratio).slots):
                assert 1 + i * ratio <= place <= min((i + 1) * ratio, length)


def test_rows_of_like_lengths_stand_together_longest_first():
    assert alike([64, 120, 64, 100, 10]) == [[1, 3], [0, 2], [4]]
    assert alike([3, 3, 3]) == [[0, 1, 2]] and alike([]) == []
    for lengths in ([1, 2, 3, 4, 5, 6, 7, 8, 9], [90, 128, 31, 64, 63, 33]):
        groups = alike(lengths)
        assert sorted(i for g in groups for i in g) == list(range(len(lengths)))
        assert all(min(lengths[i] for i in g) >= 0.75 * max(lengths[i] for i in g) for g in groups)
