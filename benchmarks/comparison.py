"""How comparisons are read: "2.5x faster" or "1.4x slower", ours first."""


def faster(ours: float, theirs: float) -> str:
    """In words, from the seconds of both sides."""
    return f"{theirs / ours:.2f}x faster" if ours <= theirs else f"{ours / theirs:.2f}x slower"
