"""Spellings of answers, and words."""

import pytest

from capcur_jax.answers import spelling


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
        (r"\$5", "$5"),
        ("$5", "$5"),
        ("$x$ and $y$", "x and y"),
        (r"\color{red}{5}", "5"),
        (r"{3 \over 4}", r"\frac{3}{4}"),
        ("¾", r"\frac{3}{4}"),
        ("10⁻³", "10^{-3}"),
        ("H₂O", "H_2O"),
        ("x**2", "x^2"),
        ("sqrt(2)", r"\sqrt{2}"),
        ("pi/2", r"\pi /2"),
        ("75 percent", "75%"),
        (r"37 °C", r"37^\circ C"),
        ("5!", "5!"),
        ("cat!", "cat"),
        ("**5**", "5"),
        ("−５", "-5"),
        ("٥", "5"),
        ("45°", r"45^\circ"),
        ("2√3", r"2\sqrt{3}"),
        ("x²", "x^2"),
        ("25 cm^2", "25 cm^2"),
        ("5m^2", "5m^2"),
        (" $ . $ ", ""),
    ],
)
def test_normalize(text, expected):
    assert spelling.normalize(text) == expected


@pytest.mark.parametrize(
    "text, expected",
    [
        ("Left", ("left",)),
        ("(B)", ("b",)),
        ("top-left", ("top", "left")),
        ("A, C", ("a", ",", "c")),
        ("the cat", ("cat",)),
        ("U.S.A", ("usa",)),
        ("red, blue", ("red", ",", "blue")),
        ("don't", ("dont",)),
        ("red and blue", ("red", ",", "blue")),
        ("是", ("是",)),
        ("x-y", None),
        ("-x", None),
        ("2x", None),
        (r"\pi", None),
        ("5", None),
    ],
)
def test_words(text, expected):
    assert spelling.words(text) == expected
