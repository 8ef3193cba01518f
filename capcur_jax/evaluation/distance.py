"""Edit distance."""

from __future__ import annotations


def edits(a: str, b: str) -> int:
    """The fewest insertions, deletions and exchanges of characters that make `a` of `b`.

    By Hyyrö's bit vectors: one step of integers as long as the shorter text for each character of the longer one.
    """
    a, b = sorted((a, b), key=len)
    if not a:
        return len(b)
    places: dict[str, int] = {}
    for place, character in enumerate(a):
        places[character] = places.get(character, 0) | 1 << place
    whole, last = (1 << len(a)) - 1, 1 << len(a) - 1
    more, less, count = whole, 0, len(a)  # bit i: the column grows, or shrinks, by one at i
    for character in b:
        same = places.get(character, 0)
        vertical = same | less
        horizontal = (((same & more) + more) ^ more) | same
        up, down = less | (whole & ~(horizontal | more)), more & horizontal
        count += bool(up & last) - bool(down & last)
        up, down = up << 1 | 1, down << 1
        more, less = (down | ~(vertical | up)) & whole, up & vertical & whole
    return count
