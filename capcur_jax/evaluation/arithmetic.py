r"""The value of a formula in numbers, of `\frac{1}{3}`, `2\pi`, `3**2`, `1:2`: by a grammar, in floats, not by `eval`.

As in the parsers of the published scorers, a formula ends at a bracket that nothing opened, `\log` is of base 10, `5\%`
is a twentieth, and dollars and primes mean nothing.

The formula comes from a model. It is short, brackets nest to a bound, and a float has a bound of its own: `9**9**9` has
no value, and costs nothing.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable

LONGEST = 256  # characters
DEEPEST = 24  # brackets inside each other
_SPACE = re.compile(r"(?:\s|\$|\\[, ]|~|\\(?:q?quad|left|right|displaystyle)(?![a-zA-Z]))+")
_TOKEN = re.compile(
    r"(?P<number>(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d*)?(?:e[-+]?\d{1,3}(?!\d))?|\.\d+)|(?P<name>\\?[a-zA-Z]+|\\%)|(?P<mark>\*\*|\\[{}]|[-+*/:^(){}\[\]|!'π√÷×·−])"
)
_SAME = {
    "**": "^", "\\times": "*", "\\cdot": "*", "×": "*", "·": "*", "\\div": "/", "÷": "/", ":": "/", "−": "-",
    "π": "\\pi", "pi": "\\pi", "√": "\\sqrt", "sqrt": "\\sqrt", "\\dfrac": "\\frac", "\\tfrac": "\\frac",
    "\\cfrac": "\\frac",
}  # fmt: skip
_PAIRS = {"(": ")", "{": "}", "[": "]", "\\{": "\\}", "|": "|"}
_CLOSING = (")", "}", "]", "\\}")
_FUNCTIONS: dict[str, Callable[[float], float]] = {
    "sin": math.sin, "cos": math.cos, "tan": math.tan, "ln": math.log, "log": math.log10, "exp": math.exp,
    "arcsin": math.asin, "arccos": math.acos, "arctan": math.atan,
}  # fmt: skip


def value(text: str) -> float | None:
    """The value of a formula without variables, None where it has none, is too long or too large."""
    text = text.strip()
    if not text or len(text) > LONGEST:
        return None
    try:
        reader = _Reader(_tokens(text))
        found = reader.sum()
        return found if reader.is_done() and math.isfinite(found) else None
    except (_Unreadable, ArithmeticError, ValueError):
        return None


class _Unreadable(Exception):
    pass


def _tokens(text: str) -> list[str]:
    """The last one first."""
    found, place = [], 0
    while place < len(text):
        if space := _SPACE.match(text, place):
            place = space.end()
            continue
        match = _TOKEN.match(text, place)
        if match is None:
            return [*found, ""][::-1]  # an error where the formula has not ended before
        found.append(_SAME.get(match[0], match[0]))
        place = match.end()
    return found[::-1]


class _Reader:
    def __init__(self, tokens: list[str]):
        self.tokens, self._depth = tokens, 0

    def is_done(self) -> bool:
        """Whether nothing comes any more, or a bracket that nothing opened."""
        return not self.tokens or self._next() in _CLOSING

    def _next(self) -> str:
        return self.tokens[-1] if self.tokens else ""

    def _take(self, *wanted: str) -> str:
        if self._next() not in wanted:
            raise _Unreadable
        return self.tokens.pop()

    def sum(self) -> float:
        found = self._product()
        while self._next() in ("+", "-"):
            sign = self._take("+", "-")
            found += self._product() if sign == "+" else -self._product()
        return found

    def _product(self) -> float:
        found = self._signed()
        while True:
            token = self._next()
            if token in ("*", "/"):
                self._take(token)
                found = found * self._signed() if token == "*" else found / self._signed()
            elif self._begins(token):
                found *= self._power()
            else:
                return found

    @staticmethod
    def _begins(token: str) -> bool:
        """Whether it begins a factor that no sign of multiplication precedes."""
        if token in _CLOSING:
            return False
        return token in ("(", "{", "[") or token[:1].isdigit() or token[:1] in (".", "\\") or token == "e"

    def _signed(self) -> float:
        if self._next() in ("+", "-"):
            with _Deeper(self):
                return self._signed() if self._take("+", "-") == "+" else -self._signed()
        return self._power()

    def _power(self) -> float:
        base = self._atom()
        while self._next() == "'":
            self._take("'")
        while self._next() == "!":
            self._take("!")
            if base < 0 or base > 170 or base != int(base):
                raise _Unreadable
            base = float(math.factorial(int(base)))
        while self._next() == "\\%":
            self._take("\\%")
            base /= 100
        if self._next() != "^":
            return base
        self._take("^")
        with _Deeper(self):
            return math.pow(base, self._signed())  # no complex numbers, and an error where it is too large

    def _atom(self) -> float:
        if not self._next():
            raise _Unreadable
        token = self.tokens.pop()
        if token[0].isdigit() or token[0] == ".":
            return float(token.replace(",", ""))
        if token in _PAIRS:
            return self._bracketed(token)
        if token == "\\pi":
            return math.pi
        if token == "e" and self._next() == "^":
            return math.e
        if token == "\\frac":
            top = self._argument()
            return top / self._argument()
        if token == "\\sqrt":
            if self._next() != "[":
                return math.sqrt(self._argument())
            root = self._bracketed(self._take("["))
            return math.pow(self._argument(), 1 / root)
        if token.removeprefix("\\") in _FUNCTIONS:
            with _Deeper(self):
                return _FUNCTIONS[token.removeprefix("\\")](self._power())
        raise _Unreadable

    def _bracketed(self, opening: str) -> float:
        with _Deeper(self):
            found = self.sum()
        self._take(_PAIRS[opening])
        return abs(found) if opening == "|" else found

    def _argument(self) -> float:
        r"""Of \frac and \sqrt: a group, or one character (`\frac12`)."""
        token = self._next()
        if token[:1].isdigit() and len(token) > 1:
            self.tokens[-1] = token[1:]
            return float(token[0])
        with _Deeper(self):
            return self._atom()


class _Deeper:
    def __init__(self, reader: _Reader):
        self._reader = reader

    def __enter__(self) -> None:
        self._reader._depth += 1
        if self._reader._depth > DEEPEST:
            raise _Unreadable

    def __exit__(self, *_: object) -> None:
        self._reader._depth -= 1
