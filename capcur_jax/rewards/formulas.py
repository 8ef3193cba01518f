r"""Whether two formulas are equal: what sympy does for the grader, in its workers.

Reading is latex2sympy2's, the parser of math-verify. math-verify itself rounds both sides to six decimal places, so
that 2^{-30} would be 2^{-31}; here the tolerance follows the gold (docs/rewards.md).
"""

from __future__ import annotations

import functools
import re
from fractions import Fraction
from typing import Any

from capcur_jax.answers import numbers

_DIGITS = 60  # of numeric evaluation
_CLOSE = Fraction(1, 10**45)  # relative difference of equal numbers
_BASE = re.compile(r"(?P<digits>[0-9A-F]+)_\{?\(?(?P<base>\d{1,2})\)?\}?")
_QUOTIENT = re.compile(r"(?<![\w}/^_.])(\d+) ?/ ?(\d+)(?= ?[a-zA-Z\\(])")
_CAPITAL = re.compile(r"\\(?:Gamma|Delta|Theta|Lambda|Xi|Pi|Sigma|Upsilon|Phi|Psi|Omega)(?![a-z])")
_VARIABLE = re.compile(r"(?<![a-zA-Z\\])[a-zA-Z](?![a-zA-Z])")
_CHEMICAL = re.compile(r"(?:[A-Z][a-z]?(?:_?\{?\d+\}?)?)+")
_IMAGINARY = re.compile(r"(?<![a-zA-Z\\])i(?![a-zA-Z])")
_INDEX = re.compile(r"\\(?:sum|prod)|_\{?i\b")  # i counts something


@functools.lru_cache(256)
def read(text: str) -> Any:
    """A formula as sympy's, its decimals exact. Raises what the parser raises."""
    import sympy
    from latex2sympy2_extended.latex2sympy2 import NormalizationConfig, latex2sympy, normalize_latex

    number = numbers.plain_number(text)
    if number is not None:
        value = number.value / 100 if number.percent else number.value
        return sympy.Rational(value.numerator, value.denominator)
    config = NormalizationConfig(
        basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="none", equations=False
    )
    text = re.sub(r"\+\s*-", "-", text)
    text = _QUOTIENT.sub(r"\\frac{\1}{\2}", text)  # 4/3 \pi is four thirds of it
    text = re.sub(r"\^ ?\\circ ?", r" \\frac{\\pi}{180} ", text)
    latex = normalize_latex(text, config)
    is_complex = bool(_IMAGINARY.search(latex)) and not _INDEX.search(latex)
    formula = latex2sympy(latex, is_real=not is_complex, convert_degrees=False, normalization_config=None)
    if isinstance(formula, list):
        raise ValueError("several formulas")
    if is_complex:
        formula = formula.subs({one: sympy.I for one in formula.free_symbols if one.name == "i"})
    return formula.xreplace({one: sympy.Rational(str(one)) for one in formula.atoms(sympy.Float)})


def same_marks(predicted: str, gold: str) -> bool:
    """Whether two texts have the same capital Greek letters and primes: the parser reads \\Pi as \\pi, and f' as f."""
    primes = [text.replace("\\prime", "'").count("'") for text in (predicted, gold)]
    return sorted(_CAPITAL.findall(predicted)) == sorted(_CAPITAL.findall(gold)) and primes[0] == primes[1]


def fraction(text: str) -> Fraction | None:
    """The value of a formula without variables to _DIGITS digits."""
    number = numbers.plain_number(text)
    if number is not None:
        return number.value / (100 if number.percent else 1)
    value = read(text)
    if not getattr(value, "is_number", False) or value.is_real is False:
        return None
    return _as_fraction(value)


def _as_fraction(value: Any) -> Fraction | None:
    import sympy

    if value.is_Rational:
        return Fraction(int(value.p), int(value.q))
    value = value.evalf(_DIGITS)
    return Fraction(str(value)) if isinstance(value, sympy.Float) else None


def leaf_equal(predicted: str, gold: str) -> bool:
    """Whether two formulas are equal.

    A decimal meets a gold formula as its rounding, to six significant digits at least; a gold decimal is met to its
    last digit (`numbers.equal_numbers`). Else both have to be equal exactly: numbers to 25 digits, formulas at random
    values of their variables.
    """
    found, expected = _BASE.fullmatch(predicted), _BASE.fullmatch(gold)
    if expected:
        if found:
            return int(found["digits"], int(found["base"])) == int(expected["digits"], int(expected["base"]))
        return predicted == expected["digits"]
    if _CHEMICAL.fullmatch(predicted) and _CHEMICAL.fullmatch(gold) and any(map(str.isdigit, gold)):
        return re.sub(r"[_{}]", "", predicted) == re.sub(r"[_{}]", "", gold)
    if not same_marks(predicted, gold) or "\\{" in predicted + gold:
        return False
    variables = [set(_VARIABLE.findall(text)) for text in (predicted, gold)]
    if variables[0] != variables[1] and {*map(str.casefold, variables[0])} == {*map(str.casefold, variables[1])}:
        return False  # x + Y and X + y
    number, known = numbers.plain_number(predicted), numbers.plain_number(gold)
    if number is not None and known is not None:
        return numbers.equal_numbers(number, known)
    a, b = read(predicted), read(gold)
    if a == b:
        return True
    if known is not None and known.step:
        value = _as_fraction(a) if getattr(a, "is_number", False) and a.is_real is not False else None
        return value is not None and numbers.meets(numbers.Number(value, "fraction"), known)
    if number is not None and number.step and number.digits >= 6:
        value = _as_fraction(b) if getattr(b, "is_number", False) and b.is_real is not False else None
        return value is not None and number.value in numbers.rounded(value, number.step)
    return equal_values(a, b)


def equal_values(a: Any, b: Any) -> bool:
    import sympy

    if a == b:
        return True
    matrices = [isinstance(one, sympy.MatrixBase) for one in (a, b)]
    if any(matrices):
        return all(matrices) and a.shape == b.shape and all(map(equal_values, a, b))
    if not all(isinstance(one, sympy.Expr) for one in (a, b)):
        return False
    if a.has(sympy.Derivative) or b.has(sympy.Derivative):
        return False
    a, b = (one.doit() for one in (a, b))
    if a == b or (a.is_Rational and b.is_Rational):
        return bool(a == b)
    if a.is_infinite or b.is_infinite:
        return False
    if a.free_symbols != b.free_symbols and not (a.free_symbols and b.free_symbols):
        # One is a number: equal only if the other's variables cancel.
        a, b = sympy.simplify(a), sympy.simplify(b)
        if a.free_symbols or b.free_symbols:
            return False
    seen = 0
    for point in points(a, b):
        one, other = number_at(a, point), number_at(b, point)
        if one is None or other is None:
            continue
        if abs(one - other) > _CLOSE * max(abs(one), abs(other)):
            return False
        seen += 1
    return seen > 0 if not (a.free_symbols | b.free_symbols) else seen >= 2


_VALUES = ("7/5", "-13/11", "29/17", "31/7", "-3/19", "41/23", "5/13", "-17/29", "47/31")


def points(a: Any, b: Any) -> list[dict[Any, Any]]:
    """Values for the variables and the unknown functions of two formulas."""
    import sympy
    from sympy.core.function import AppliedUndef

    variables = sorted(a.free_symbols | b.free_symbols, key=str)
    unknown = sorted(a.atoms(AppliedUndef) | b.atoms(AppliedUndef), key=str)
    if not variables and not unknown:
        return [{}]
    values = list(map(sympy.Rational, _VALUES))
    return [
        {
            one: values[(place + shift * 2) % len(values)] + sympy.Rational(place, 7)
            for place, one in enumerate([*unknown, *variables])
        }
        for shift in range(4)
    ]


def number_at(formula: Any, point: dict[Any, Any]) -> Any:
    """The value at a point, a number of _DIGITS digits, or None where there is none."""
    import sympy

    value = sympy.N(formula.subs(point, simultaneous=True) if point else formula, _DIGITS)
    if not value.is_number or value.has(sympy.nan, sympy.zoo, sympy.oo) or not value.is_finite:
        return None
    return value
