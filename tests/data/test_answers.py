"""The last box, the required form and the reading of an answer, on ordinary and on hostile text."""

import time
from fractions import Fraction

import pytest

from capcur_jax.data import answers

LONG = 100_000


@pytest.mark.parametrize(
    "text, expected",
    [
        (r"so \boxed{5}.", "5"),
        (r"\boxed{1} then \boxed{2}", "2"),
        (r"\boxed{\frac{1}{\sqrt{2}}}", r"\frac{1}{\sqrt{2}}"),
        (r"\boxed {5}", "5"),
        (r"\boxed{}", ""),
        (r"\boxed{\boxed{5}}", "5"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\left\{ x \right.}", r"\left\{ x \right."),
        ("\\boxed{a\nb}", "a\nb"),
        ("no box", None),
        (r"as \boxed asks", None),
        ("", None),
        (r"\boxed{5", None),
        (r"\boxed{5} or \boxed{6", None),
        (r"\boxed{5\}", None),
        ("\\boxed{\ud800\x00}", "\ud800\x00"),
    ],
)
def test_last_boxed(text, expected):
    assert answers.last_boxed(text) == expected


@pytest.mark.parametrize(
    "text, expected",
    [
        (r"<think>so</think> \boxed{5}", True),
        ("\n <think>\nso\n</think>\nThe answer is \\boxed{5}.\n", True),
        (r"< think >so< / think >\boxed{5}", True),
        (r"<think></think>\boxed{5}", True),
        (r"<think>\boxed{4}?</think>\boxed{5}", True),
        (r"<think>so</think> 5", False),
        (r"<think>\boxed{5}</think>", False),
        (r"\boxed{5}", False),
        (r"Well <think>so</think>\boxed{5}", False),
        (r"<think>so\boxed{5}", False),
        (r"so</think>\boxed{5}", False),
        (r"</think>so<think>\boxed{5}", False),
        (r"<think>a</think><think>b</think>\boxed{5}", False),
        (r"<think>a<think>b</think>\boxed{5}", False),
        (r"<thinking>so</thinking>\boxed{5}", False),
        (r"<think>so</think>\boxed{ }", False),
        (r"<think>so</think>\boxed{5", False),
        (r"<th ink>so</think>\boxed{5}", False),
        ("", False),
    ],
)
def test_is_formatted(text, expected):
    assert answers.is_formatted(text) is expected


@pytest.mark.parametrize(
    "piece", [r"\boxed{", "{", "}", "\\", r"\boxed", " ", "<", "< ", "<think>", "</think>", "< / ", "\x00", "\ud800"]
)
def test_hostile_text_takes_linear_time(piece):
    text = piece * (LONG // len(piece))
    start = time.thread_time()  # what this thread computes: company on the machine does not stretch it
    for hostile in (text, r"<think></think>\boxed{" + text, r"\boxed" + text + r"{5}", "<" + text + "think>"):
        answers.last_boxed(hostile)
        answers.is_formatted(hostile)
    # Linear is some 30 ms, quadratic more than ten seconds.
    assert time.thread_time() - start < 2.0


@pytest.mark.parametrize(
    "text, expected",
    [
        (" $5$. ", "5"),
        (r"\text{left}", "left"),
        (r"\textbf{\text{B}.}", "B"),
        (r"\mathbf{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\frac{1}{2}", r"\frac{1}{2}"),
        (r"\(5\)", "5"),
        (r"1{,}000", "1,000"),
        (r"1\,000", "1 000"),
        (r"50\%", "50%"),
        (r"\$5", "5"),
        ("**5**", "5"),
        ("−５", "-5"),
        ("٥", "5"),
        ("45°", r"45^\circ"),
        ("2√3", r"2\sqrt{3}"),
        ("x²", "x^2"),
        ("25 cm^2", "25 cm"),
        ("5m^2", "5m^2"),
        (" $ . $ ", ""),
    ],
)
def test_normalize(text, expected):
    assert answers.normalize(text) == expected


@pytest.mark.parametrize(
    "text, expected",
    [
        ("Left", ("left",)),
        ("(B)", ("b",)),
        ("top-left", ("top", "left")),
        ("A, C", ("ac",)),
        ("don't", ("don't",)),
        (r"\text{red} and \text{blue}", ("red", "and", "blue")),
        ("是", ("是",)),
        ("x-y", None),
        ("-x", None),
        ("2x", None),
        (r"\pi", None),
        ("5", None),
    ],
)
def test_words(text, expected):
    assert answers.words(text) == expected


@pytest.mark.parametrize(
    "text, expected",
    [
        ("21", (21, "integer", False)),
        ("-3.50", (Fraction(-7, 2), "decimal", False)),
        (".25", (Fraction(1, 4), "decimal", False)),
        ("1,234,567", (1234567, "integer", False)),
        ("12 000", (12000, "integer", False)),
        ("6/4", (Fraction(3, 2), "fraction", False)),
        ("3:2", (Fraction(3, 2), "fraction", False)),
        (r"-\frac{3}{2}", (Fraction(-3, 2), "fraction", False)),
        (r"\dfrac12", (Fraction(1, 2), "fraction", False)),
        (r"1\frac{1}{2}", (Fraction(3, 2), "fraction", False)),
        ("-1 1/2", (Fraction(-3, 2), "fraction", False)),
        (r"3 \times 10^8", (300000000, "integer", False)),
        ("10^{-2}", (Fraction(1, 100), "integer", False)),
        ("50%", (50, "integer", True)),
        (r"45^{\circ}", (45, "integer", False)),
        ("1/0", None),
        ("5 6", None),
        ("1,00", None),
        ("2+3", None),
        ("10^{9999}", None),
        ("x", None),
        ("", None),
    ],
)
def test_plain_number(text, expected):
    assert answers.plain_number(text) == expected
