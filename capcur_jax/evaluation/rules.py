r"""Rules that several benchmarks share: which part of a reply is read, option letters, yes or no.

They are VLMEvalKit's documented ones, without what it guesses. Replies are untrusted texts of any length.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from capcur_jax.answers.response import last_boxed
from capcur_jax.evaluation.benchmarks.base import Ask, Row, Verdict

READINGS = ("raw", "box")
REFUSED = "Z"  # what the kit calls a reply that names none of the options
_CLOSED = re.compile(r"<\s*/\s*think\s*>")
_OPENED = re.compile(r"<\s*think\s*>")
_BOX = re.compile(r"\\boxed\s*\{")
_LAST = 4  # tokens at the end, among which a letter counts
_BLANKS = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
_REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)
_MARKS = ';/[]"{}()=+\\_-><@`,?!'
_GROUPED = re.compile(r"\d,\d")
_STOP = re.compile(r"(?<!\d)\.(?!\d)")


def read(text: str, how: str) -> str:
    r"""The part of a reply that the rules read.

    "raw": all of it. "box": what follows the last </think>, and of that what the last \boxed{} holds, if there is one;
    nothing of a reply that was cut off in its thought or in its box.
    """
    if how == "raw":
        return text
    if is_cut_thought(text):
        return ""
    closed = [match.end() for match in _CLOSED.finditer(text)]
    rest = text[closed[-1] :] if closed else text
    return (last_boxed(rest) or "").strip() if is_boxed(rest) else rest.strip()


def is_boxed(text: str) -> bool:
    """Whether the reply has a box, closed or not."""
    return bool(_BOX.search(text))


def is_cut_thought(text: str) -> bool:
    """Whether the reply opens a thought that it does not close: what stands there is no answer."""
    opened = [match.end() for match in _OPENED.finditer(text)]
    return bool(opened) and not _CLOSED.search(text, opened[-1])


# ---------------------------------------------------------------------- options


def letter(text: str, options: Mapping[str, str]) -> str | None:
    """The letter of the option that a reply names, "Z" where it says that it can't, None where the rule can't tell.

    Without punctuation, exactly one of the letters stands alone, the first time among the last four words; or the
    reply holds the text of exactly one option, and is at most twice as long as all options together. Case matters to
    letters, not to texts.
    """
    if any(refusal in text for refusal in _REFUSALS):
        return REFUSED
    words = text.translate(_BLANKS).split()
    named = [name for name in options if name in words]
    if len(named) == 1 and words.index(named[0]) >= len(words) - _LAST:
        return named[0]
    if not named and REFUSED in words:
        return REFUSED
    return _by_text(text, options)


def _by_text(text: str, options: Mapping[str, str]) -> str | None:
    if len(text) > 2 * sum(map(len, options.values())):
        return None
    folded = text.lower()
    held = [name for name, option in options.items() if option.lower() in folded]
    return held[0] if len(held) == 1 else None


def choice(row: Row, text: str, extracted: str | None = None) -> Verdict | Ask:
    """The kit's rule for questions with options: `letter`, else a judge. A recorded extraction is read in its turn."""
    for reply in (text, extracted):
        if reply is not None and (found := letter(reply, row.options)):
            return Verdict(float(found in row.gold), "rule", found)
    return Ask("letter")


# ---------------------------------------------------------------------- yes or no


def yes_no(text: str) -> str | None:
    """ "Yes" or "No" where exactly one of the words stands in the reply, without case and most punctuation."""
    words = unpunctuated(text.lower()).split()
    yes, no = "yes" in words, "no" in words
    return None if yes == no else "Yes" if yes else "No"


def unpunctuated(text: str) -> str:
    """The text in the spelling of the VQA score: some marks go, or become blanks where none stands beside them."""
    grouped = _GROUPED.search(text)
    found = text
    for mark in _MARKS:
        beside = grouped or f"{mark} " in text or f" {mark}" in text
        found = found.replace(mark, "" if beside else " ")
    return _STOP.sub("", found)


def agreement(row: Row, text: str, extracted: str | None = None) -> Verdict | Ask:
    """The kit's rule for questions of yes and no: `yes_no`, else a judge."""
    for reply in (text, extracted):
        if reply is not None and (found := yes_no(reply)):
            return Verdict(float(found in row.gold), "rule", found)
    return Ask("yes_no")
