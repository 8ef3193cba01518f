"""Kinds of gold answers, and what a question says of them."""

import pytest

from capcur_jax.answers.kinds import answer_type_of, gold_of, hint_of, labelled
from capcur_jax.answers.letters import letters_of, options_of


@pytest.mark.parametrize(
    "problem, hint",
    [
        ("When was the letter written?", "code"), ("What time does it show?", "code"),
        ("What is the date?", "code"),
        ("If y = 3 when x = 2, what is x/y?", ""), ("How much time is left?", ""),
        ("What fraction is red?", "fraction"),
        ("What is the probability that it rains on that day?", "fraction"), ("Find the ratio of a to b.", "ratio"),
        ("What is 3 / 4?", ""),
    ],
)  # fmt: skip
def test_what_a_question_asks_for(problem, hint):
    assert hint_of(problem) == hint


@pytest.mark.parametrize(
    "problem, asked",
    [
        ("How long is it? Include the units.", True), ("State the answer with its unit.", True),
        ("长度是多少？带单位", True),
        ("A square with 5 units on each side. What is its area?", False), ("Answer in units of cm.", False),
    ],
)  # fmt: skip
def test_whether_a_question_asks_for_the_unit(problem, asked):
    assert gold_of("5 cm", problem=problem).unit is asked


@pytest.mark.parametrize(
    "text, expected",
    [
        ("B. cat", ("B", "cat")), ("(B) cat", ("B", "cat")), ("B) 12", ("B", "12")), ("B、猫", ("B", "猫")),
        ("J. Smith", None), ("Bob", None), ("B", None),
    ],
)  # fmt: skip
def test_a_letter_before_its_text(text, expected):
    assert labelled(text) == expected


@pytest.mark.parametrize(
    "text, expected",
    [
        ("ACD", "ACD"), ("A, C and D", "ACD"), ("A、C、D", "ACD"), ("(A), (C)", "AC"), ("A;C", "AC"),
        ("['A', 'C']", "AC"),
        ("D and A", "DA"), ("CAD", ""), ("A", ""), ("A, cat", ""), ("A, A", ""),
    ],
)  # fmt: skip
def test_letters_of_a_list(text, expected):
    assert "".join(letters_of(text)) == expected


@pytest.mark.parametrize(
    "text, options",
    [
        ("Which? A. cat B. dog", {"A": "cat", "B": "dog"}),
        ("Which?\n(A) a red cat\n(B) two dogs, one of them old\nThink.",
         {"A": "a red cat", "B": "two dogs, one of them old"}),
        ("Which? A、猫 B、狗", {"A": "猫", "B": "狗"}),
        ("A dog and B. cat", {}),
        ("Is it? A: yes\nB: no\n", {"A": "yes", "B": "no"}),
    ],
)  # fmt: skip
def test_options_have_their_whole_text(text, options):
    assert options_of(text) == options


def test_long_answers_are_formulas_and_blanks_are_none():
    assert (answer_type_of("1 " * 400), answer_type_of(" $ "), answer_type_of("")) == ("expression", "", "")
