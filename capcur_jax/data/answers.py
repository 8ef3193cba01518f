"""Answers as text: the final one of a response, whether that has the required form, and what kind of answer it is.

Responses are untrusted. `last_boxed` and `is_formatted` take the whole of one and run in time linear in its length,
whatever it holds; the functions for an answer are for the few hundred characters that `grade.decide` lets through.
"""

import re
import unicodedata
from fractions import Fraction
from typing import NamedTuple

ANSWER_LENGTH = 512  # characters; a longer answer can't be graded
ANSWER_TYPES = ("letter", "number", "expression", "word")

_BOX = re.compile(r"\\boxed\s*\{")
# An escaped character (\{ and \} are printed braces, \\ a line break) is one unit, so that it opens and closes nothing.
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
# White space inside a tag is allowed, which is what the release does by removing it around <, > and / everywhere first.
_THINK_TAG = re.compile(r"<\s*(?P<close>/\s*)?think\s*>")

_FULL_WIDTH = {0xFF01 + i: 0x21 + i for i in range(94)}  # "５", "（Ｂ）"
_SYMBOLS = {
    "−": "-", "–": "-", "’": "'", "°": r"^\circ ", "×": r"\times ", "·": r"\cdot ", "÷": r"\div ", "π": r"\pi ",
    "²": "^2", "³": "^3", "½": r"\frac{1}{2}", "≈": r"\approx ", "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ",
    "∞": r"\infty ",
}  # fmt: skip
_TABLE = _FULL_WIDTH | {ord(symbol): latex for symbol, latex in _SYMBOLS.items()}
_ROOT = re.compile(r"√\s*(\d+|[a-z])")
_SPACE = re.compile(r"(?<!\\)(?:\\[,;: ]|\\q?quad(?![a-z])|~)")
_MATH_MARK = re.compile(r"(?<!\\)\\[()\[\]]|\\displaystyle(?![a-z])")
_WRAPPER = re.compile(r"(?:\\(?:text(?:bf|it|rm|sf|tt)?|math(?:bf|it|rm|sf|tt)|mbox|boxed|operatorname)\s*)?\{")
_TEXT_COMMAND = re.compile(r"\\(?:text(?:bf|it|rm|sf|tt)?|math(?:bf|it|rm|sf|tt)|mbox)(?![a-z])")
_WORDS = re.compile(r"[^\W\d_]+(?:(?: ?[,;&] ?|[ '\-])[^\W\d_]+)*")
# math-verify knows the unit in "5 cm" but reads "5 cm^2" as a product. A bare m may be a variable: only after a space.
_UNIT_POWER = re.compile(r"(?<=\d) ?(mm|cm|dm|km|ft|in|yd|mi|units?|(?<= )m) ?\^ ?(?:[23]|\{[23]\})$")
_LONG_WORD = re.compile(r"[^\W\d_]{3,}")

_INTEGER = r"(?:\d{1,3}(?:[, ]\d{3})+|\d+)"
_DECIMAL = rf"(?:{_INTEGER}(?:\.\d*)?|\.\d+)"
_POWER = r"10 ?\^ ?(?:\{ ?(?P<%s>-?\d{1,3}) ?\}|(?P<%s>-?\d{1,3}))"
_NUMBER = (
    r"(?P<sign>[-+]?) ?(?:"
    r"(?P<whole>\d+)? ?\\[dtc]?frac ?(?:\{ ?(?P<top>-?\d+) ?\}|(?P<top_digit>\d))"
    r" ?(?:\{ ?(?P<bottom>\d+) ?\}|(?P<bottom_digit>\d))"
    r"|(?:(?P<whole_2>\d+) )?(?P<top_2>\d+) ?[/:] ?(?P<bottom_2>\d+)"
    rf"|(?P<decimal>{_DECIMAL})(?: ?(?:\\times|\\cdot|\*) ?{_POWER % ('power', 'power_2')})?"
    rf"|{_POWER % ('power_3', 'power_4')}"
    r")"
)
_PLAIN = re.compile(rf"{_NUMBER} ?(?:(?P<percent>%)|\^ ?(?:\\circ|\{{ ?\\circ ?\}})|\\degree)?", re.ASCII)
# One number, then a unit: no digit, operator or relation that could be arithmetic left undone.
_WITH_UNIT = re.compile(rf"{_NUMBER} ?[^\d+*!^|<>=]+(?:\^ ?\{{? ?[23] ?\}}?)?", re.ASCII)

# Before the last "=": a relation such as >=, or one of several answers.
_NO_NAME = re.compile(r"[<>!]$|[,;]|\b(?:or|and)\b")


def last_boxed(text: str) -> str | None:
    r"""Contents of the last `\boxed{...}` of `text`, or None.

    The last occurrence decides: where its braces never close (a response cut off in its answer) the result is None,
    not an earlier box, which the response has gone on from. Of nested boxes the innermost last one counts.
    """
    start = None
    for match in _BOX.finditer(text):
        start = match.end()
    if start is None:
        return None
    depth = 1
    for match in _BRACE.finditer(text, start):
        if match.group() == "{":
            depth += 1
        elif match.group() == "}":
            depth -= 1
            if depth == 0:
                return text[start : match.start()]
    return None


def is_formatted(text: str) -> bool:
    r"""Whether the response as a whole is `<think>...</think> ... \boxed{...}`.

    As in the release (EasyR1's `<think>.*</think>.*\\boxed\{.*\}.*` over the whole response): nothing but white space
    may come before the block, white space inside the tags is ignored, the block may be empty, and text may follow the
    box. Stricter than the release in two ways, so that neither earns the reward: there is exactly one think block, and
    the last box after it closes and is not blank.
    """
    tags = list(_THINK_TAG.finditer(text))
    if len(tags) != 2 or tags[0]["close"] is not None or tags[1]["close"] is None:
        return False
    if text[: tags[0].start()].strip():
        return False
    answer = last_boxed(text[tags[1].end() :])
    return answer is not None and bool(answer.strip())


def normalize(text: str) -> str:
    r"""`text` in one spelling: no outer dollars, `\text{}` or final period, ASCII digits and signs, single spaces."""
    if not text.isascii():
        text = _ROOT.sub(r"\\sqrt{\1}", unicodedata.normalize("NFC", text)).translate(_TABLE)
        text = "".join(c if c.isascii() or not c.isdecimal() else str(unicodedata.decimal(c)) for c in text)
    text = text.replace("{,}", ",").replace(r"\!", "").replace(r"\%", "%").replace(r"\$", "").replace("$", "")
    text = " ".join(_MATH_MARK.sub(" ", _SPACE.sub(" ", text)).split())
    while True:
        stripped = text.strip("* ").rstrip(".,;: ")
        wrapper = _WRAPPER.match(stripped)
        if wrapper and stripped.endswith("}") and _is_balanced(stripped[wrapper.end() : -1]):
            stripped = stripped[wrapper.end() : -1]
        if stripped == text:
            return _UNIT_POWER.sub(r" \1", text)
        text = stripped


def _is_balanced(text: str) -> bool:
    depth = 0
    for character in text:
        depth += (character == "{") - (character == "}")
        if depth < 0:
            return False
    return depth == 0


def words(text: str) -> tuple[str, ...] | None:
    """The case-folded words of a normalized answer that is made of nothing else ("(B)", "top-left"), or None."""
    text = _TEXT_COMMAND.sub("", text).replace("{", "").replace("}", "")
    text = text.strip("()[]<>\"'`*.,:;!? ").casefold()
    if not _WORDS.fullmatch(text):
        return None
    parts = tuple(re.split(r"[ ,;&\-]+", text))
    if len(max(parts, key=len)) > 1:
        return parts
    return None if "-" in text else ("".join(parts),)  # x-y is a difference; "A, C" are the letters AC


def long_words(text: str) -> set[str]:
    """Words of three letters and more that are no LaTeX commands: text such as "apples", not a product of symbols."""
    return set(_LONG_WORD.findall(re.sub(r"\\[a-zA-Z]+", " ", text).casefold()))


class Number(NamedTuple):
    """A plain number and how it was written: `form` is "integer", "decimal" or "fraction"."""

    value: Fraction
    form: str
    percent: bool


def plain_number(text: str) -> Number | None:
    r"""The exact value of a normalized answer that is one number, else None.

    Integers and decimals ("1,000", "-.5"), fractions (`3/2`, `3:2`, `\frac{3}{2}`, `1\frac{1}{2}`, "1 1/2") and powers
    of ten (`3 \times 10^8`), with a percent or degree sign or none.
    """
    match = _PLAIN.fullmatch(text)
    if not match:
        return None
    group = {name: value for name, value in match.groupdict().items() if value}

    def first(*names: str) -> str | None:
        return next((group[name] for name in names if name in group), None)

    top, bottom = first("top", "top_digit", "top_2"), first("bottom", "bottom_digit", "bottom_2")
    if top is not None:
        if int(bottom) == 0:
            return None
        value = int(first("whole", "whole_2") or 0) + Fraction(int(top), int(bottom))
        form = "fraction"
    else:
        decimal = group.get("decimal", "1")
        value = Fraction(re.sub("[, ]", "", decimal)) * Fraction(10) ** int(
            first("power", "power_2", "power_3", "power_4") or 0
        )
        form = "decimal" if "." in decimal else "integer"
    return Number(-value if group.get("sign") == "-" else value, form, "percent" in group)


def is_number_with_unit(text: str) -> bool:
    """Whether a normalized answer is one number and then letters: "5 cm", but also "5x"."""
    return _WITH_UNIT.fullmatch(text) is not None


def claimed_number(text: str) -> str:
    r"""What an answer to a question for a number claims it to be: "5" of "x = 5", "(5)" and `5 \approx 5.0`."""
    exact, _, rounded = text.partition(r"\approx")
    name, _, claim = exact.rpartition("=")
    claim = exact if _NO_NAME.search(name) else claim.strip()
    if rounded and plain_number(claim) is None:
        claim = rounded.strip()
    return claim[1:-1].strip() if claim.startswith("(") and claim.endswith(")") else claim


def answer_type_of(answer: str) -> str:
    """How a gold answer will be compared (rewards.grade): a choice's "letter", a "number", a "word" or several, else an
    "expression"; "" of no answer."""
    if len(answer) > ANSWER_LENGTH:
        return "expression"  # the patterns below are for short texts
    text = normalize(answer)
    if not text:
        return ""
    if re.fullmatch(r"\(?[A-Z]\)?", text):
        return "letter"
    if plain_number(text) is not None:
        return "number"
    return "word" if words(text) is not None else "expression"


def boxed_response(reasoning: str, answer: str) -> str:
    """The response that the format reward wants: reasoning inside <think></think>, then the boxed answer."""
    return f"<think>{reasoning}</think> \\boxed{{{answer}}}"
