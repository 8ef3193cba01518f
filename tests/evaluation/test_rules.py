from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from capcur_jax.evaluation import arithmetic, rules
from capcur_jax.evaluation.distance import edits

OPTIONS = {"A": "100", "B": "154", "C": "blue", "D": "None"}


@pytest.mark.parametrize("reply, letter", [
    ("B", "B"), ("(B)", "B"), ("**B**", "B"), (r"\boxed{B}", "B"), (r"$\boxed{\text{B}}$", "B"),
    (r"\boxed{\mathrm{B}}", "B"),
    (r"\boxed{B. 154}", "B"), ("<think>we look closely</think> \\boxed{B}", "B"), ("It is not blue.", "C"),
    ("None", "D"),
    # left to the judge
    ("b", None), ("<answer>B</answer>", None), ("B<|im_end|>", None), ("Answer: B. Because of all the angles", None),
    ("A cat sits there, so \\boxed{B}", None), ("The correct answer is **B**. Here is why this is so", None),
    ("", None),
    ("I am unsure", None), ("A or B", None), ("154 or 100", None),
    # wrong for certain
    ("Sorry, I can't help with images of people yet.", "Z"), ("Z", "Z"),
])  # fmt: skip
def test_letters(reply, letter):
    assert rules.letter(reply, OPTIONS) == letter


def test_a_text_counts_only_in_a_short_reply():
    assert rules.letter("It is 154, nothing else", OPTIONS) == "B"
    assert rules.letter("It is 154, nothing else, as was to be shown before", OPTIONS) is None


def test_no_letter_is_ever_drawn():
    assert {rules.letter("who knows", OPTIONS) for _ in range(20)} == {None}


@pytest.mark.parametrize("reply, found", [
    (r"\boxed{\text{Yes}}", "Yes"), ("(Yes)", "Yes"), ("<answer>yes</answer>", "Yes"), ("</think>Yes", "Yes"),
    ("NO.", "No"),
    ("**Yes**", None), ("Yes, there is no doubt", None), ("I notice a dog", None), ("", None), ("yesterday", None),
])  # fmt: skip
def test_yes_and_no(reply, found):
    assert rules.yes_no(reply) == found


@pytest.mark.parametrize("reply, box", [
    (r"<think>\boxed{A} or</think> so \boxed{B}", "B"), (r"<think>\boxed{A}</think> B", "B"),
    (r"\boxed{A} no, \boxed{B}", "B"),
    (r"a</think>b</think> \boxed{\text{B}}", r"\text{B}"), ("B", "B"),
    # cut off: nothing is read
    (r"<think>it may be \boxed{A}", ""), (r"so \boxed{A} and \boxed{B", ""), ("<think>a</think> <think> A", ""),
])  # fmt: skip
def test_what_is_read_of_a_reply(reply, box):
    assert rules.read(reply, "box") == box and rules.read(reply, "raw") == reply


@pytest.mark.parametrize("text, value", [
    (r"\frac{1}{3}", 1 / 3), (r"\frac12", 0.5), (r"\dfrac{3}{4}", 0.75), ("3/4", 0.75),
    (r"3\sqrt{2}", 4.242640687119286),
    (r"\sqrt[3]{8}", 2), ("2^{10}", 1024), ("2**3", 8), ("-2^2", -4), ("1,000", 1000), ("2(3+4)", 14),
    (r"6 \div 3 \times 2", 4),
    ("1e3", 1000), (r"5\%", 0.05), ("$4$", 4), (r"\log 100", 2), ("2)x", 2), ("e^0", 1), ("5!", 120), ("|-3|", 3),
    (r"\left( 1 \right)", 1), (r"2\pi", 6.283185307179586), (".5", 0.5),
    ("2*-3", -6), (r"\{5\}", 5), (r"2\left\{5\right\}", 10), (r"5\}", 5), ("5'", 5), (r"\displaystyle\frac{1}{2}", 0.5),
])  # fmt: skip
def test_formulas_have_values(text, value):
    assert arithmetic.value(text) == pytest.approx(value, abs=1e-12)


@pytest.mark.parametrize("text", [
    "9**9**9", "9^{9^{9^9}}", "999!", "1/0", "x", "5 cm", "", "(" * 300, "-" * 200 + "1", "__import__('os')",
    "2 3 (", "(1",
    r"5\;2", r"\{5",
    "1e999", r"\sqrt{-1}", "(" * 30 + "1" + ")" * 30, "nan", "1" * 300, "--" * 40 + "1",
])  # fmt: skip
def test_hostile_formulas_have_none_and_cost_nothing(text):
    start = time.process_time()
    assert arithmetic.value(text) is None
    assert time.process_time() - start < 0.1


@given(st.text(st.sampled_from("0123456789+-*/^(){}[]|!., \\abefgiqrstx√π"), max_size=80))
def test_any_formula_is_a_number_or_none(text):
    found = arithmetic.value(text)
    assert found is None or isinstance(found, float | int)


@given(st.text("abc", max_size=12), st.text("abcd", max_size=12))
def test_edits(a, b):
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        row, before = [i], row
        for j, y in enumerate(b, 1):
            row.append(min(before[j] + 1, row[-1] + 1, before[j - 1] + (x != y)))
    assert edits(a, b) == row[-1]
