"""Rows of few lengths that hold a mini-batch's groups with the fewest tokens."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from capcur_jax.learner import bins


@pytest.mark.parametrize(("lengths", "needed", "least"), [((5, 6, 7), 23, 1), ((9, 11, 13, 15), 100, 1), ((4,), 9, 7)])
def test_sums_rise_and_hold_what_is_needed(lengths, needed, least):
    tries = list(itertools.islice(bins.sums(lengths, needed, least), 40))
    assert all(set(way) <= set(lengths) and sum(way) >= needed and len(way) >= least for way in tries)
    totals = [sum(way) for way in tries]
    assert totals == sorted(totals) and len(set(totals)) > 1
    assert all(list(way) == sorted(way, reverse=True) for way in tries)
    # The first is the smallest that there is, in as few rows as can make it.
    every = [w for n in range(1, 26) for w in itertools.combinations_with_replacement(sorted(lengths), n)
             if sum(w) == totals[0]] if totals[0] <= 30 else [tries[0]]  # fmt: skip
    assert len(tries[0]) == min(len(way) for way in every if len(way) >= least)


def test_many_lengths_and_long_sums_are_no_more_work():
    """There are millions of ways to make such a sum; the first few are all that is looked at."""
    lengths = tuple(range(1024, 16_385, 1024))
    tries = list(itertools.islice(bins.sums(lengths, 3_000_000, 1), bins.WAYS))
    assert {sum(way) for way in tries} == {3_000_320} and {len(way) for way in tries} == {184}
    assert len(set(tries)) == bins.WAYS


def test_few_lengths_make_nearly_every_sum():
    """Why three lengths are enough: the sums that two rows or more can have lie one step apart."""
    made = {sum(next(bins.sums((5, 6, 7), needed, 1))) for needed in range(10, 60)}
    assert made == set(range(10, 60))


@pytest.mark.parametrize("seed", range(6))
def test_a_filling_holds_every_item_once(seed):
    random = np.random.default_rng(seed)
    sizes = random.integers(60, 340, 40).tolist()
    total = sum(sizes)
    rooms = [int(total * share * 1.02) for share in (0.3, 0.3, 0.25, 0.15)]
    filled = bins.fill(sizes, rooms, most=16, together=lambda members: True)
    assert filled is not None and sorted(itertools.chain(*filled)) == list(range(40))
    for room, members in zip(rooms, filled, strict=True):
        assert sum(sizes[i] for i in members) <= room and len(members) <= 16 and members == sorted(members)
    assert filled == bins.fill(sizes, rooms, most=16, together=lambda members: True)


def test_swaps_fill_what_the_first_pass_does_not():
    """Longest first puts 5 + 5 beside 4 + 3 + 3, and one more than fits; a swap mends it."""
    filled = bins.fill([7, 6, 5, 4, 4, 4], [15, 15], most=6, together=lambda members: True)
    assert filled is not None and {sum([7, 6, 5, 4, 4, 4][i] for i in members) for members in filled} == {15}


def test_what_may_not_lie_together_does_not():
    sizes, kinds = [5] * 8, [0, 0, 0, 0, 1, 1, 1, 1]
    filled = bins.fill(sizes, [20, 20, 20, 20], 8, lambda members: sum(kinds[i] for i in members) <= 1)
    assert filled is not None and all(sum(kinds[i] for i in members) <= 1 for members in filled)
    assert bins.fill(sizes, [20, 20], 8, lambda members: sum(kinds[i] for i in members) <= 1) is None


@pytest.mark.parametrize(("sizes", "rooms", "most"), [([5, 5], [9], 4), ([2, 2, 2], [9, 9], 1), ([6, 1], [5, 5], 2)])
def test_what_does_not_fit_is_none(sizes, rooms, most):
    assert bins.fill(sizes, rooms, most, lambda members: True) is None


@pytest.mark.parametrize(("lengths", "needed", "chosen"), [
    ((10, 10, 10, 10), 32, [10, 8, 8, 8]),  # of 8.2 each
    ((10, 10, 10), 3, [4, 4, 4]),
    ((20, 10), 24, [20, 8]),  # of 16.3 and what is left
    ((10,), 50, [20]),
])  # fmt: skip
def test_capacities_are_few_and_hold_little_more_than_is_needed(lengths, needed, chosen):
    assert bins.capacities(lengths, needed, dict.fromkeys(lengths, (4, 8, 10, 20))) == chosen


def test_capacities_are_those_of_a_row_s_length():
    """The long row has no smaller one than 16, the short ones none above 8."""
    assert bins.capacities((20, 10, 10), 30, {10: (2, 4, 8), 20: (16, 20)}) == [16, 8, 8]
    assert bins.capacities((20, 10, 10), 4, {10: (2, 4, 8), 20: (16, 20)}) == [16, 2, 2]


@pytest.mark.parametrize("seed", range(4))
def test_levelled_bins_hold_the_same_items_with_less_above_their_capacity(seed):
    random = np.random.default_rng(seed)
    sizes, weights = random.integers(60, 340, 48), random.integers(0, 100, 48)
    rooms = [int(sizes.sum() / 8 * 1.03)] * 8
    filled = bins.fill(sizes.tolist(), rooms, 12, lambda members: True)
    assert filled is not None
    capacity = [int(weights.sum() / 8 * 1.05)] * 8
    levelled = bins.level(filled, sizes, rooms, weights, capacity, 12)
    assert sorted(itertools.chain(*levelled)) == list(range(48))
    assert all(
        sizes[members].sum() <= room and len(members) <= 12 for members, room in zip(levelled, rooms, strict=True)
    )
    before, after = ([weights[members].sum() for members in each] for each in (filled, levelled))
    assert max(before) > capacity[0] >= max(after)
    assert levelled == bins.level(filled, sizes, rooms, weights, capacity, 12)
    # Nothing is above: nothing is moved.
    assert bins.level(levelled, sizes, rooms, weights, capacity, 12) == levelled


def lightest(filled, sizes, weights, rooms, capacities, full, most):
    """The swap of `level` by its definition: every one, and the first of the best."""
    few = lambda members: [some for n in range(3) for some in itertools.combinations(members, n)]  # noqa: E731
    above = lambda b, moved: min(capacities[b] - sum(weights[i] for i in filled[b]) + moved, 0) ** 2  # noqa: E731
    best, gained = None, 0
    for out, other in itertools.product(few(filled[full]), [b for b in range(len(filled)) if b != full]):
        for back in few(filled[other]):
            size, weight = (sum(of[i] for i in out) - sum(of[i] for i in back) for of in (sizes, weights))
            more = len(out) - len(back)
            room = [rooms[b] - sum(sizes[i] for i in filled[b]) for b in (full, other)]
            gain = above(full, 0) + above(other, 0) - above(full, weight) - above(other, -weight)
            fits = -room[0] <= size <= room[1] and len(filled[other]) + more <= most >= len(filled[full]) - more
            if fits and gain > gained:
                best, gained = (other, out, back), gain
    return best


@st.composite
def bins_of_items(draw):
    """Bins, their rooms and capacities, and items of them: some too full, some too heavy."""
    filled, at = [], 0
    for count in draw(st.lists(st.integers(0, 5), min_size=1, max_size=5)):
        filled.append(list(range(at, at := at + count)))
    numbers = lambda most, count: st.lists(st.integers(0, most), min_size=count, max_size=count)  # noqa: E731
    sizes, weights = draw(numbers(9, at)), draw(numbers(12, at))
    rooms, capacities = draw(numbers(40, len(filled))), draw(numbers(30, len(filled)))
    return filled, sizes, weights, rooms, capacities, draw(st.integers(1, 6))


@settings(max_examples=150, deadline=None)
@given(bins_of_items())
def test_levelling_takes_the_first_of_the_best_swaps(scene):
    """Whatever is passed over to find it sooner."""
    filled, sizes, weights, rooms, capacities, most = scene
    expected = [list(members) for members in filled]
    for _ in range(bins.SWAPS):
        spare = [c - sum(weights[i] for i in members) for c, members in zip(capacities, expected, strict=True)]
        over = sorted((b for b in range(len(spare)) if spare[b] < 0), key=spare.__getitem__)
        tries = ((b, lightest(expected, sizes, weights, rooms, capacities, b, most)) for b in over)
        full, change = next(((b, found) for b, found in tries if found), (0, None))
        if change is None:
            break
        other, out, back = change
        expected[full] = [i for i in expected[full] if i not in out] + list(back)
        expected[other] = [i for i in expected[other] if i not in back] + list(out)
    assert bins.level(filled, sizes, rooms, weights, capacities, most) == [sorted(members) for members in expected]


def test_levelling_looks_at_few_of_a_million_swaps(monkeypatch):
    """Of 50 bins with 12 items each; a look is at all that may come back for what goes."""
    random, looks = np.random.default_rng(0), []
    sizes, weights = random.integers(60, 340, 600), random.integers(0, 100, 600)
    filled = [list(range(at, at + 12)) for at in range(0, 600, 12)]
    rooms = [int(max(sizes[members].sum() for members in filled))] * 50
    capacity = [int(weights.sum() / 50 * 1.05)] * 50
    gain = bins._gain
    monkeypatch.setattr(bins, "_gain", lambda own, theirs, moved: looks.append(moved.shape) or gain(own, theirs, moved))
    levelled = bins.level(filled, sizes, rooms, weights, capacity, 12)
    tries = looks.count((79, 49))  # ways out, and bins
    assert tries > 10 and max(weights[members].sum() for members in levelled) <= capacity[0]
    assert set(looks) == {(79, 49), (49 * 79,)}
    assert len(looks) - tries < 79 * tries / 8
