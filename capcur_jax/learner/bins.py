"""Groups into rows of few lengths: the fewest tokens that hold them, longest first, then swaps. Of those that hold them
the patches of their images are spread by further swaps."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

SWAPS = 300  # of a filling, after which other lengths are tried
WAYS = 4  # that are tried to make one sum of lengths
SPARE = 1.02  # of a second capacity, so that few swaps are enough


def sums(lengths: Sequence[int], needed: int, least: int) -> Iterator[tuple[int, ...]]:
    """Rows to try, longest first, without an end: each try has some of `lengths`, at least `needed` in all and at least
    `least` of them. Smaller sums come first, of one sum the fewest rows; larger ones are tried in strides."""
    step = math.gcd(*lengths)
    falling = sorted(lengths, reverse=True)
    total = -(-max(needed, least * min(lengths)) // step) * step
    while True:
        counts = range(max(least, -(-total // falling[0])), total // falling[-1] + 1)
        yield from itertools.islice((way for rows in counts for way in _made(falling, total, rows)), WAYS)
        total += max(1, total // (64 * step)) * step


def _made(lengths: Sequence[int], total: int, rows: int) -> Iterator[tuple[int, ...]]:
    """The ways to make `total` of so many lengths that fall, one by one: of many lengths there are millions."""
    longest, *rest = lengths
    if not rest:
        yield from [(longest,) * rows] if rows * longest == total else []
        return
    for n in range(min(rows, total // longest), -1, -1):
        left, others = total - n * longest, rows - n
        if others * rest[-1] <= left <= others * rest[0]:
            yield from ((longest,) * n + way for way in _made(rest, left, others))


def fill(
    sizes: Sequence[int], rooms: Sequence[int], most: int, together: Callable[[Sequence[int]], bool]
) -> list[list[int]] | None:
    """Which items lie in each bin, by number and rising; None where they were not made to fit.

    Each item goes, the largest first, to the bin with the most room left; then items move out of bins that are too
    full, or change places with smaller ones.

    Args:
        sizes: of the items.
        rooms: of the bins.
        most: items of a bin.
        together: whether these items may lie in one bin, however much room it has.
    """
    bins: list[list[int]] = [[] for _ in rooms]
    left = list(rooms)
    for item in sorted(range(len(sizes)), key=lambda item: (-sizes[item], item)):
        order = sorted(range(len(bins)), key=lambda b: -left[b])
        chosen = next((b for b in order if len(bins[b]) < most and together([*bins[b], item])), None)
        if chosen is None:
            return None
        bins[chosen].append(item)
        left[chosen] -= sizes[item]
    for _ in range(SWAPS):
        full = min(range(len(bins)), key=left.__getitem__)
        if left[full] >= 0:
            return [sorted(members) for members in bins]
        for other in sorted(range(len(bins)), key=lambda b: -left[b]):
            if (change := _swap(sizes, bins, left, full, other, most, together)) is not None:
                bins[full], bins[other], moved = change
                left[full] += moved
                left[other] -= moved
                break
        else:
            return None
    return None


def _swap(
    sizes: Sequence[int], bins: Sequence[Sequence[int]], left: Sequence[int], full: int, other: int, most: int,
    together: Callable[[Sequence[int]], bool],
) -> tuple[list[int], list[int], int] | None:  # fmt: skip
    """Both bins after the swap that makes their rooms most alike, and what it moves; None: there is none."""
    apart = left[other] - left[full]
    nobody = [None] if len(bins[other]) < most else []
    moves = [
        (abs(2 * moved - apart), x, y, moved)
        for x in bins[full]
        for y in [*bins[other], *nobody]
        if 0 < (moved := sizes[x] - (0 if y is None else sizes[y])) < apart
    ]
    for _, x, y, moved in sorted(moves, key=lambda move: move[0]):
        given = [] if y is None else [y]
        here = [*(item for item in bins[full] if item != x), *given]
        there = [*(item for item in bins[other] if item != y), x]
        if together(here) and together(there):
            return here, there, moved
    return None


# ---------------------------------------------------------------------- a second capacity


def capacities(lengths: Sequence[int], needed: int, declared: Mapping[int, Sequence[int]]) -> list[int]:
    """A second capacity for each of some rows, all of which need so much of it, in shares like their lengths: little
    more in sum than is needed, of those that are declared for the row's length (rising)."""
    chosen, needed, room = [], needed * SPARE, sum(lengths)
    for length, alike in itertools.groupby(lengths):
        n, own = len(list(alike)), declared[length]
        share = needed * n * length / room
        low = max((c for c in own if n * c <= share), default=own[0])
        high = min((c for c in own if c > low), default=low)
        more = 0 if high == low else min(n, max(0, math.ceil((share - n * low) / (high - low))))
        chosen += [high] * more + [low] * (n - more)
        needed, room = max(0.0, needed - more * high - (n - more) * low), room - n * length
    return chosen


def level(
    bins: Sequence[Sequence[int]],
    sizes: Sequence[int],
    rooms: Sequence[int],
    weights: Sequence[int],
    capacities: Sequence[int],
    most: int,
) -> list[list[int]]:
    """The bins after swaps of one or two items for as many or fewer, which leave all of them room and bring down what
    a bin weighs above its capacity.

    Args:
        bins: as `fill` gives them for `sizes`, `rooms` and `most`.
        weights: of the items.
        capacities: of the bins, in weight.
    """
    filled = [list(members) for members in bins]
    of_items = np.array([sizes, weights, [1] * len(sizes)], np.int64)
    limits = np.array([rooms, capacities, [most] * len(rooms)], np.int64)
    spare = limits - np.stack([of_items[:, members].sum(1) for members in filled], axis=1)
    few = [_few(members) for members in filled]
    sums = [_sums(of_items, some) for some in few]
    for _ in range(SWAPS):
        over = [b for b in np.argsort(spare[1], kind="stable").tolist() if spare[1, b] < 0]
        change = next((found for b in over if (found := _lighter(few, sums, spare, b))), None)
        if change is None:
            break
        full, other, there, here = change
        filled[full] = [i for i in filled[full] if i not in there] + list(here)
        filled[other] = [i for i in filled[other] if i not in here] + list(there)
        moved = of_items[:, list(there)].sum(1) - of_items[:, list(here)].sum(1)
        spare[:, full] += moved
        spare[:, other] -= moved
        for b in (full, other):
            few[b] = _few(filled[b])
            sums[b] = _sums(of_items, few[b])
    return [sorted(members) for members in filled]


def _lighter(
    few: Sequence[list[tuple[int, ...]]], sums: Sequence[np.ndarray], spare: np.ndarray, full: int
) -> tuple[int, int, tuple[int, ...], tuple[int, ...]] | None:
    """The swap (bin, other bin, items that go there, items that come here) that takes most of what is above capacity
    off the two bins, of several the first; None: there is none.

    Args:
        few: what may leave each bin, its items by none, one or two.
        sums: of each of these, [3, n]: size, weight, number.
        spare: what each bin has left of them, [3, bins].
    """
    rest = [b for b in range(len(few)) if b != full]
    if not rest:
        return None
    # There may be a million swaps. What leaves the bin is looked at only if moving that weight or less can gain more
    # than what is found. It gains most to move all that is above; with less room than that, as much as makes both bins
    # alike.
    own, theirs, least = spare[1, full], spare[1, rest], min(sums[b][1].min() for b in rest)
    best = np.where(own + theirs >= 0, -own, (theirs - own) // 2)
    possible = _gain(own, theirs, np.minimum(best, (sums[full][1] - least)[:, None])).max(1)
    back, others = np.concatenate([sums[b] for b in rest], axis=1), np.repeat(rest, [len(few[b]) for b in rest])
    room, found, gained = spare[:, others], None, 0
    for x in range(len(few[full])):
        if possible[x] <= gained:
            continue
        moved = sums[full][:, x, None] - back
        fits = ((moved <= room) & (moved >= -spare[:, full, None]))[[0, 2]].all(0)
        gain = np.where(fits, _gain(own, room[1], moved[1]), 0)
        y = int(gain.argmax())
        if gain[y] > gained:
            found, gained = (x, y), gain[y]
    if found is None:
        return None
    x, y = found
    other = int(others[y])
    return full, other, few[full][x], few[other][y - int(np.searchsorted(others, other))]


def _gain(own, theirs, moved):
    """What moving so much weight takes off what is above capacity in two bins, squared."""

    def above(spare):
        return np.minimum(spare, 0) ** 2

    return above(own) + above(theirs) - above(own + moved) - above(theirs - moved)


def _few(members: Sequence[int]) -> list[tuple[int, ...]]:
    """None, one or two of them."""
    return [some for n in range(3) for some in itertools.combinations(members, n)]


def _sums(of_items: np.ndarray, chosen: Sequence[tuple[int, ...]]) -> np.ndarray:
    """Sizes, weights and number [3, ...] of some of the items together."""
    padded = np.concatenate([of_items, np.zeros((3, 1), np.int64)], axis=1)
    return padded[:, [[*some, -1, -1][:2] for some in chosen]].sum(-1)
