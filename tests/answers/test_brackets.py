"""Where brackets close: against a scanner that goes character by character, on all short texts."""

import itertools

import pytest

from capcur_jax.answers.brackets import ALL, BRACES, closing


def stepwise(text, opening, ending):
    """The end of the mark that closes, by hand; None where none does."""
    depth, place = 1, 0
    while place < len(text):
        mark = text[place : place + 2] if text[place] == "\\" else text[place]
        place += len(mark)
        depth += (mark in opening) - (mark in ending)
        if not depth:
            return place
    return None


@pytest.mark.parametrize("kinds", [BRACES, ALL], ids=["braces", "all"])
def test_every_text_of_six_marks(kinds):
    for text in map("".join, itertools.product("{}(]\\a", repeat=6)):
        found = closing(text, 0, kinds)
        assert (found and found.end()) == stepwise(text, *kinds), text


def test_escaped_braces_group_nothing_and_can_be_seen():
    assert closing(r"a\} b}", 0).start() == 5
    assert closing(r"a\} b}", 0, ALL).group() == r"\}"
    assert closing("a\\\n}", 0).start() == 3 and closing("a\\", 0) is None
    assert closing("x{1}} tail", 0).end() == 5 and closing("{{", 2) is None
    assert closing("1, 2)", 0, ALL).end() == 5  # whatever opened it
