r"""The structure of a mathematical answer: lists, sets, tuples, intervals, relations; the formulas in it stay text.

1, 2        several values         \{1, 2\}   a set          (1, 2)   a tuple, or an open interval
[1, 2)      an interval            1 < x < 2  a chain        \pm 2    two values
"""

from __future__ import annotations

import re
from typing import NamedTuple

from capcur_jax.answers.brackets import ALL, closing


class Node(NamedTuple):
    """A piece of an answer.

    `sort`: "text" (a formula, in `text`), "list" (bare values), "set", "tuple" (in parentheses), "bracket" (in square
    brackets), "half" (an interval, one end of which is open), "union", "ratio" (of three or more),
    "chain" (texts and the relations between them).
    """

    sort: str
    text: str
    items: tuple[Node, ...] = ()
    marks: tuple[str, ...] = ()  # of a chain its relations, of brackets the two of them

    @property
    def is_collection(self) -> bool:
        """Whether it is several values, a set, a tuple or an interval, as a value or as a relation."""
        if self.sort == "chain":
            return any(mark in _ORDER for mark in self.marks) or any(node.is_collection for node in self.items[1:])
        return self.sort != "text" or self.text in _NAMED_SETS

    @property
    def is_collection_name(self) -> bool:
        return self.text in _NAMED_SETS


_ORDER = {"<", ">", r"\le", r"\ge", r"\ne", r"\in"}
_NAMED_SETS = {r"\emptyset", r"\mathbb{R}", r"\mathbb{Z}", r"\mathbb{N}"}
_RELATION = re.compile(r"\\(?:le|ge|ne|in|approx|equiv|parallel|perp|cong|notin)(?![a-zA-Z])|[<>=]")
_SEPARATOR = re.compile(r"\s*(?:[,;]\s*(?:(?:and|or)(?![a-zA-Z]))?|(?<![a-zA-Z\\])(?:and|or)(?![a-zA-Z]))\s*")
_CUP = re.compile(r"\s*(?:\\cup(?![a-z])|(?<=[)\]}])\s*U\s*(?=[(\[\\]))\s*")
_BUILDER = re.compile(r"\s*(?P<name>[a-zA-Z])\s*(?:\\in\s*[^|:]+)?\s*[|:]\s*(?P<condition>.+)")
_CASES = re.compile(r"(?:\\\{)?\s*\\begin\{(cases|array|aligned|gathered)\}(?:\{[lcr]+\})?(?P<rows>.*)\\end\{\1\}\s*")
_POINT = re.compile(r"[A-Z]'?\s*(?=\(.*,.*\)\Z)")
_COLON, _COMMA, _COMMAND = re.compile(":"), re.compile("[,;]"), re.compile(r"\\(?:[a-zA-Z]+|.)")
_PAIRS = {"(": ")", "[": "]"}
_PM = re.compile(r"\\(?:pm|mp)(?![a-z])")
_DEEP = 12


def parse(text: str, depth: int = 0) -> Node:
    """The structure of a normalized answer."""
    text = text.strip()
    if depth > _DEEP:
        return Node("text", text)
    if cases := _CASES.fullmatch(text):
        text = re.sub(r"\s*\\\\\s*", ", ", cases["rows"].replace("&", "")).strip(" ,")
    if point := _POINT.match(text):  # the point A(1, 2)
        text = text[point.end() :]
    values = _values(split(text, _CUP))
    if len(values) > 1 and all(map(_is_bracketed, values)):
        return Node("union", text, tuple(parse(value, depth + 1) for value in values))
    values = _values(split(text, _SEPARATOR))
    if len(values) > 1 and all(values):
        return Node("list", text, tuple(parse(value, depth + 1) for value in values))
    parts = split(text, _RELATION)
    if len(parts) > 1:
        values, marks = parts[::2], tuple(mark.strip() for mark in parts[1::2])
        if all(value.strip() for value in values):
            return Node("chain", text, tuple(parse(value, depth + 1) for value in values), marks)
        return Node("text", text)
    if bracketed := _bracketed(text, depth):
        return bracketed
    parts = _values(split(text, _COLON))
    if len(parts) > 2 and all(parts):
        return Node("ratio", text, tuple(parse(part, depth + 1) for part in parts))
    signs = list(_PM.finditer(text))
    if len(signs) == 1:
        plus, minus = (text[: signs[0].start()] + sign + text[signs[0].end() :] for sign in "+-")
        plus = plus.strip().removeprefix("+").strip() if not text[: signs[0].start()].strip() else plus
        return Node("list", text, (parse(plus, depth + 1), parse(minus, depth + 1)))
    return Node("text", text)


def split(text: str, pattern: re.Pattern) -> list[str]:
    """Parts and separators in turn, of separators outside all brackets; one part where the brackets do not match."""
    parts, open_, start, place = [], [], 0, 0
    while place < len(text):
        character = text[place]
        if text.startswith(("\\{", "\\}"), place):
            character, width = text[place + 1], 2
        else:
            width = 1
        if not open_:
            match = pattern.match(text, place)
            if match and match.end() > match.start():
                parts += [text[start : match.start()], match.group()]
                start = place = match.end()
                continue
        if character == "\\":
            command = _COMMAND.match(text, place)
            place = command.end() if command else place + 1
            continue
        if character in "([{":
            open_.append(character)
        elif character in ")]}":
            if not open_:
                return [text]
            open_.pop()
        place += width
    return [text] if open_ else [*parts, text[start:]]


def _values(parts: list[str]) -> list[str]:
    """What stands between the separators that `split` gives."""
    return [part.strip() for part in parts[::2]]


def _is_bracketed(text: str) -> bool:
    text = text.strip()
    return text.startswith(("(", "[", "\\{")) and text.endswith((")", "]", "\\}"))


def _bracketed(text: str, depth: int) -> Node | None:
    if text.startswith("\\{") and text.endswith("\\}") and len(text) > 4:
        sort, first, last, inner = "set", "\\{", "\\}", text[2:-2]
    elif text[:1] in _PAIRS and text[-1:] in (")", "]") and len(text) > 2:
        first, last, inner = text[0], text[-1], text[1:-1]
        sort = "half" if _PAIRS[first] != last else "tuple" if first == "(" else "bracket"
    else:
        return None
    end = closing(text, len(first), ALL)
    if end is None or end.end() < len(text):  # the first one closes before the end, or never
        return None
    if sort == "set" and (builder := _BUILDER.fullmatch(inner)):
        return parse(builder["condition"], depth + 1)
    values = _values(split(inner, _COMMA))
    if not all(values) or (sort == "half" and len(values) != 2):
        return None
    if len(values) == 1 and sort != "set":  # brackets around one value
        return parse(inner, depth + 1) if sort == "tuple" else None
    return Node(sort, text, tuple(parse(value, depth + 1) for value in values), (first, last))


_NAME = re.compile(
    r"(?:\\(?:angle|triangle|text|vec|hat|bar|overline|mathrm)\s*\{?\s*)?"
    r"(?:[A-Za-z]{1,4}|\\[a-zA-Z]+|[A-Za-z]+(?: [A-Za-z]+){0,3})'{0,2}\s*\}?"
    r"(?:_\{?[\w+-]{1,5}\}?)?(?:\^\{?-1\}?)?(?:\s*\([^()=]{1,12}\))?"
)


def is_name(text: str) -> bool:
    r"""Whether the left side of `... = 5` only names what is 5: x, f(x), S_n, \angle ABC, "the area"."""
    text = text.strip().strip("|").strip()
    if re.match(r"not\b", text):
        return False
    if re.fullmatch(r"\([a-zA-Z](?:, ?[a-zA-Z]){1,3}\)|[A-Z](?:\s*\\(?:cap|cup)\s*[A-Z])+", text):
        return True
    return bool(_NAME.fullmatch(text)) and text not in ("e", "i", "\\pi", "\\infty", "\\emptyset")
