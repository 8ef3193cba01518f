"""What kind of answer a gold one is: decided once, when its row is read; each kind has its own comparison (rewards)."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from capcur_jax.answers import codes, letters, numbers, quantities, structure
from capcur_jax.answers.spelling import ANSWER_LENGTH, normalize, words

KINDS = {
    "letter": "an option's letter",
    "letters": "several options' letters",
    "number": "a plain number",
    "quantity": "a number with a unit",
    "expression": "a formula",
    "set": "several values, a set, a tuple or an interval",
    "word": "a word or several",
    "code": "a date, a time, a range, a label with digits",
}
ANSWER_TYPES = tuple(KINDS)

_COMMON = re.compile(r"[A-Z]|-?[1-9][0-9]{0,8}|0")  # most golds; these need no closer look
_LETTER = re.compile(r"[(\[]?([A-Z])[)\]]?[.:]?")
_LABELLED = re.compile(
    r"[(\[]?(?P<letter>[A-J])(?:[)\]][.:]?|[.、]|:(?=\s)|,(?=[\u4e00-\u9fff]))\s*(?P<text>\S.*)", re.DOTALL
)
_SPECIES = re.compile(
    r"[A-Z]\. (?:coli|elegans|sapiens|erectus|melanogaster|thaliana|cerevisiae|musculus)"
)  # no options
_RATIO = re.compile(r"\b(?:ratio|proportion|odds|scale)\b|比", re.IGNORECASE)
_FRACTION = re.compile(
    r"\b(?:fraction|simplif|simplest|probability|portion of|what part|how much of)\w*|分数|概率", re.IGNORECASE
)
_DATE = re.compile(
    r"\A\W*when\b|\bwhen (?:is|was|did|does|will|are|were)\b"
    r"|\b(?:what|which|on what|at what|at which)(?: \w+)? (?:dates?|day|time)\b"
    r"|\bdates?\b|\b(?:final|the) score\b|\b(?:phone|telephone|fax) number\b|\bbirthday\b|\bblood pressure\b"
    r"|几点|日期|比分|几月几日",
    re.IGNORECASE,
)
# Of each hint words one of which stands in what its pattern finds: a look for them takes a tenth of a search's time.
_HINTS = (
    ("ratio", _RATIO, ("ratio", "proportion", "odds", "scale", "比")),
    (
        "fraction",
        _FRACTION,
        ("fraction", "simpl", "probability", "portion of", "what part", "how much of", "分数", "概率"),
    ),
    (
        "code",
        _DATE,
        ("when", "date", "day", "time", "score", "fax number", "phone number", "blood pressure", "几", "日期", "比分"),
    ),
)
_ALL = re.compile(
    r"\b(?:select|choose|mark|check|pick|list|name|give) all\b"
    r"|\ball (?:that|of the following that|correct|the correct|true)\b"
    r"|\bthat apply\b|\bwhich (?:ones|of the following are|of these are|statements are|options are)\b"
    r"|\b(?:one or more|more than one|multiple) (?:answers?|options?|choices?)\b"
    r"|哪些|多选|所有选项|选出所有|选项有",
    re.IGNORECASE,
)
_WITH_UNIT = re.compile(
    r"\b(?:include|including|state|specify|with) (?:the |its |their |your )?(?:correct |appropriate |proper )?"
    r"units?\b(?! of)"
    r"|\b(?:what|which) units?\b|带单位|写出单位",
    re.IGNORECASE,
)


class Gold(NamedTuple):
    """A gold answer, as the grader compares with it.

    `texts` are the accepted answers, the first one the row's `answer`. `kind` is the first one's. `options` are the
    question's, letter -> text. `any_order`: the question asks for all that hold. `unit`: it asks for the unit.
    """

    texts: tuple[str, ...]
    kind: str = ""
    options: tuple[tuple[str, str], ...] = ()
    any_order: bool = False
    unit: bool = False
    question: str = ""


def gold_of(
    answer: str,
    answers: Sequence[str] = (),
    kind: str = "",
    problem: str = "",
    options: Mapping[str, str] | None = None,
) -> Gold:
    """A row's gold answer.

    Args:
      answer, answers: the accepted ones; `answers` begins with `answer`, or is empty.
      kind: of `answer`, one of ANSWER_TYPES; "" to find it out.
      problem: the question; its options are read where `options` are not given.
    """
    options = letters.options_of(problem) if options is None else options
    hint = hint_of(problem)
    return Gold(
        texts=tuple(answers) or (answer,),
        kind=kind or answer_type_of(answer, hint=hint),
        options=tuple(options.items()),
        any_order=bool(_ALL.search(problem)),
        unit=bool(_WITH_UNIT.search(problem)),
        question=hint,
    )


def hint_of(problem: str) -> str:
    """What a question asks for, where that decides a gold's kind: "ratio", "fraction", "code" or ""."""
    folded = problem.casefold()
    for hint, pattern, words_ in _HINTS:
        if any(word in folded for word in words_) and pattern.search(problem):
            return hint
    return ""


def labelled(text: str) -> tuple[str, str] | None:
    """The letter and the text of "B. cat" or "(B) cat"; None of an initial ("J. Smith") where that can be told."""
    match = _LABELLED.fullmatch(text)
    if not match or (match["text"][:1].isupper() and text[1:2] == "." and not match["text"].isupper()):
        return None
    if _SPECIES.fullmatch(text):
        return None
    return match["letter"], match["text"]


@functools.lru_cache(4096)
def answer_type_of(answer: str, hint: str = "") -> str:
    """One of ANSWER_TYPES, how a gold answer will be compared (rewards.compare); "" of no answer.

    Args:
      hint: what the question asks for: "ratio", "fraction", "code" (a date, a time, a score) or "" where it is not
        known. `7/12` is a number unless the question asks for a date, `3:30` a time unless it asks for a ratio.
    """
    if len(answer) > ANSWER_LENGTH:
        return "expression"  # the patterns are for short texts
    if _COMMON.fullmatch(answer):
        return "letter" if answer.isalpha() else "number"
    text = normalize(answer)
    if not text:
        return ""
    if len(letters.letters_of(text)) > 1:
        return "letters"
    if _LETTER.fullmatch(text) or labelled(text):
        return "letter"
    code = codes.read(text)
    number = numbers.plain_number(text)
    if code and code.sort == "time" and (hint not in ("ratio", "fraction") or number is None):
        return "code"
    if number is not None:
        return "code" if hint == "code" and "/" in text and "\\" not in text else "number"
    if code and (code.sort in ("date", "range", "size", "ratio", "times", "ordinal") or codes.is_era(text)):
        return "code"
    if quantities.quantity(text) is not None:
        return "quantity"
    if words(text) is not None and text not in ("e", "i"):
        return "word"
    if structure.parse(text).is_collection:
        return "set"
    return "code" if code else "expression"
