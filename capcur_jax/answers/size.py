r"""Whether a formula is too large to be evaluated: sympy hangs on `9^{9^{9^9}}`, the parser on many brackets.

Only what is certain counts: exponents and arguments of factorials in digits. `x^{n!}` and `e^{x/1000000}` are fine.
"""

from __future__ import annotations

import re

LARGEST = 10**5  # exponent or argument of a factorial that is evaluated
DEEPEST = 40  # brackets inside each other
_OPEN, _CLOSE = "([{", ")]}"
_DIGITS = re.compile(r"\d[\d,]*")
# An atom before "!" or "^", at the end of what is before it: digits, which are not those behind a decimal point.
_ATOM = re.compile(r"(?<![\d.,])\d[\d,]*\Z")


def too_large(text: str) -> str:
    """What is too large in a formula, in a few words; "" where nothing is for certain."""
    text = text.replace("**", "^").replace("\\left", "").replace("\\right", "").replace(r"\cdot", r"\times")
    depth = deepest = 0
    for character in text:
        depth += (character in _OPEN) - (character in _CLOSE)
        deepest = max(deepest, depth)
    if deepest > DEEPEST:
        return f"more than {DEEPEST} brackets inside each other"
    for match in re.finditer(r"[\^!]", text):
        if match[0] == "^" and _value(_behind(text, match.end())) > LARGEST:
            return f"an exponent above {LARGEST:,}"
        if match[0] == "!" and _value(_before(text, match.start())) > LARGEST:
            return f"a factorial of more than {LARGEST:,}"
    return ""


def _value(text: str) -> int:
    """The value of an integer, a product of integers, a power or a factorial of them, cut behind LARGEST; else 0."""
    text = text.strip().lstrip("+-").strip()
    while text[:1] in ("(", "{", "[") and _end(text, 0) == len(text):
        text = text[1:-1].strip().lstrip("+-").strip()
    if _DIGITS.fullmatch(text):
        digits = text.replace(",", "").lstrip("0")
        return int(digits or "0") if len(digits) < 8 else LARGEST + 1
    if r"\times" in text or "*" in text:
        value = 1
        for part in re.split(r"\\times|\*", text):
            value *= _value(part)
        return min(value, LARGEST + 1)
    if text.endswith("!"):
        value, count = 1, _value(text[:-1])
        for factor in range(2, min(count, 10) + 1):
            value *= factor
        return min(value, LARGEST + 1) if count else 0
    base, mark, exponent = _power(text)
    if not mark:
        return 0
    number, power = _value(base), _value(exponent)
    return min(number ** min(power, 20), LARGEST + 1) if number and power else 0


def _power(text: str) -> tuple[str, str, str]:
    """ "9", "^", "{9^9}" of `9^{9^9}`; no mark where the text as a whole is no power."""
    end = _end(text, 0) if text[:1] in ("(", "{", "[") else (match.end() if (match := _DIGITS.match(text)) else 0)
    rest = text[end:].lstrip() if end else ""
    behind = rest[1:]
    if rest[:1] != "^" or _behind(behind, 0) != behind.strip():
        return text, "", ""
    return text[:end], "^", behind


def _behind(text: str, start: int, chain: int = 4) -> str:
    """The exponent that begins at a place: a group, or digits, and what they are raised to in turn (9^9^9).

    A chain is cut, so that this takes no time; its other end is looked at in its turn.
    """
    while text[start : start + 1] == " ":
        start += 1
    sign = 1 if text[start : start + 1] in ("+", "-") else 0
    place = start + sign
    if text[place : place + 1] in ("(", "{", "["):
        end = _end(text, place)
    else:
        match = _DIGITS.match(text, place)
        end = match.end() if match else place
    if chain and end > place and text[end : end + 1] == "^":
        return text[start : end + 1] + _behind(text, end + 1, chain - 1)
    return text[start:end]


def _before(text: str, end: int) -> str:
    """What "!" at a place is of: a group or digits."""
    text = text[:end].rstrip()
    if text[-1:] not in (")", "}", "]"):
        match = _ATOM.search(text)
        return match[0] if match else ""
    depth = 0
    for place in range(len(text) - 1, -1, -1):
        depth += (text[place] in _CLOSE) - (text[place] in _OPEN)
        if depth == 0:
            return text[place:]
    return ""


def _end(text: str, start: int) -> int:
    """Behind the bracket that closes the one at `start`; the end of the text where none does."""
    depth = 0
    for place in range(start, len(text)):
        depth += (text[place] in _OPEN) - (text[place] in _CLOSE)
        if depth == 0:
            return place + 1
    return len(text)
