"""Plain numbers, exact."""

from fractions import Fraction

import pytest

from capcur_jax.answers import numbers, spelling


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
        ("10^{-2}", (Fraction(1, 100), "decimal", False)),
        ("50%", (50, "integer", True)),
        ("10,00,000", (1000000, "integer", False)),
        ("1'000", (1000, "integer", False)),
        ("1e-05", (Fraction(1, 100000), "decimal", False)),
        (r"\frac{3}{-4}", (Fraction(-3, 4), "fraction", False)),
        (r"0.1\overline{6}", (Fraction(1, 6), "fraction", False)),
        ("1.2 million", (1200000, "decimal", False)),
        ("5k", (5000, "integer", False)),
        ("twenty-five", (25, "integer", False)),
        ("minus two", (-2, "integer", False)),
        ("二十五", (25, "integer", False)),
        ("五", (5, "integer", False)),
        ("3.299999952316284", (Fraction(33, 10), "decimal", False)),
        ("0.30000000000000004", (Fraction(3, 10), "decimal", False)),
        ("5m", None),
        ("left", None),
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
    number = numbers.plain_number(spelling.normalize(text))
    assert (number and number[:3]) == expected
