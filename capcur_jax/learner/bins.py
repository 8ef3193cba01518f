"""Groups into rows of few lengths: the fewest tokens that hold them, longest first, then swaps."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence

SWAPS = 300  # of a filling, after which other lengths are tried
WAYS = 4  # that are tried to make one sum of lengths


def sums(lengths: Sequence[int], needed: int, least: int) -> Iterator[tuple[int, ...]]:
    """Rows to try, longest first, without an end: each try has some of `lengths`, at least `needed` in all and at least
    `least` of them. Smaller sums come first, of one sum the fewest rows; larger ones are tried in strides."""
    step = math.gcd(*lengths)
    total = -(-max(needed, least * min(lengths)) // step) * step
    while True:
        ways = sorted(_made(tuple(sorted(lengths, reverse=True)), total), key=len)
        yield from itertools.islice((way for way in ways if len(way) >= least), WAYS)
        total += max(1, total // (64 * step)) * step


@functools.lru_cache(maxsize=4096)
def _made(lengths: tuple[int, ...], total: int) -> list[tuple[int, ...]]:
    """The ways to make `total` of lengths that fall."""
    if not lengths:
        return [()] if total == 0 else []
    longest, *rest = lengths
    return [
        (longest,) * n + way for n in range(total // longest, -1, -1) for way in _made(tuple(rest), total - n * longest)
    ]


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
