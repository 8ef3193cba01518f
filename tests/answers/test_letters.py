"""Letters in short replies: what names one, and what only looks like it."""

import pytest
from hypothesis import given, strategies

from capcur_jax.answers.letters import letter_in

NAMED = {
    "A": [
        "A",
        "a",
        "A.",
        " A",
        "A\nThe cat",
        "A. A cat",
        "A: red",
        "A is correct",
        "A because the",
        "a) red",
        "a. red",
    ],
    "B": [
        *[
            "B",
            "b",
            "(B)",
            "(b)",
            "B.",
            "B)",
            "[B]",
            "**B**",
            "`B`",
            '"B"',
            "$B$",
            "_B_",
            "\nB\n",
            "<answer>B</answer>",
        ],
        *["Answer: B", "answer: b", "Answer:\nB", "The answer is B", "The answer is (b)", "the correct answer is B."],
        *["B. red", "B: red", "B, because", "B red", "B - red", "(b) 1", "b: red", "Option B", "It's B.", "Sure! B"],
        *["\\boxed{B}", "\\boxed{\\text{B}}", "答案是B", "选B", "Ｂ", "B B", "<think>A or C</think>B"],
    ],
    "C": ["The answer is **C**", "Option C is right", "I choose C"],
    "D": ["D<|im_end|>", "Answer:\nD", "It is D"],
}
NONE = [
    *["", "  \n", "Red", "A cat is sitting", "A Labrador dog", "Answer: A cat", "The answer is a", "The image shows a"],
    *[
        "A or B",
        "A and",
        "A) or C)",
        "(A) or (B)",
        "Answer: B or C",
        "C or maybe D",
        "A, B",
        "A/B",
        "A B C D",
        "Both A and C",
    ],
    *["Vitamin C", "It is vitamin C", "Plan B", "A-frame house", "D's", "Bananas", "Cab", "B+", "E", "I cannot tell"],
    *["B is wrong", "Not B", "The answer is not B", "B isn't", "B\nA. Red\nB.", "B. Red\nC. Blue", "C.\n\nD."],
]


@pytest.mark.parametrize("letter, text", [(letter, text) for letter, texts in NAMED.items() for text in texts])
def test_a_letter_is_named(letter, text):
    assert letter_in(text) == letter


@pytest.mark.parametrize("text", NONE)
def test_none_is_named(text):
    assert letter_in(text) is None


@pytest.mark.parametrize("after", ["\n\nA question about the image:", "\n\nI chose it", ", A dog", " A cat is"])
@pytest.mark.parametrize("first", ["B", "(B)", "The answer is B", "A"])
def test_an_article_that_begins_what_follows_is_no_second_letter(first, after):
    """A bare text's continuation goes on after the letter, and the filter's own text has "A question about"."""
    assert letter_in(f" {first}{after}") == ("A" if first == "A" else "B")
    assert letter_in(f"{first} or C{after}") is None


def test_only_the_letters_of_the_options_count():
    assert letter_in("(e)", "ABCDE") == "E" and letter_in("E", "ABCD") is None
    assert letter_in("C", "AB") is None and letter_in("A", "ab") == "A"


PIECES = ["answer", "is", "option", "or", "</think>", *"ABCDabcd .,:;()[]{}*_\"'`\n\\<>/&+-是\ud800"]


@given(strategies.lists(strategies.sampled_from(PIECES) | strategies.text(max_size=3), max_size=40).map("".join))
def test_any_text_is_read(text):
    assert letter_in(text) in (None, *"ABCD")


def test_long_texts_are_read_quickly():
    for long in ("(" * 10**6, "A " * 10**6, "A" + " " * 10**6, "answer " * 10**5, "</think>" * 10**5):
        letter_in(long)
