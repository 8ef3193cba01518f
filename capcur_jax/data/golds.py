r"""Gold answers as rows give them -> the answer alone, which a response can equal; docs/data.md has the table.

What a gold is wrapped in (tags, "####", a box in prose) is taken off where nothing else can be meant. What no response
could equal costs the row, so that it is not taken for a hard question.
"""

from __future__ import annotations

import decimal
import re
from collections.abc import Iterable
from typing import Any

from capcur_jax.answers import response
from capcur_jax.answers.kinds import answer_type_of
from capcur_jax.answers.letters import options_of
from capcur_jax.answers.size import too_large
from capcur_jax.answers.spelling import ANSWER_LENGTH, normalize
from capcur_jax.data import choices
from capcur_jax.data.backslashes import restored
from capcur_jax.data.problem import BadRow, refuse_half_pair, short

MISSING = ("None", "nan", "NaN", "NAN", "null", "NULL", "<NA>", "NaT")  # how programs write that there is nothing
_TAG = re.compile(r"<\s*answer\s*>(.*?)<\s*/\s*answer\s*>", re.DOTALL | re.IGNORECASE)
_THOUGHT = re.compile(r"<\s*/\s*think\s*>")
_HASHES = re.compile(r"(?:^|\s)####[ \t]*(.*?)\s*$", re.DOTALL)
_SAID = re.compile(
    r"(?:^|\n)\W{0,3}(?:(?:so|thus|hence|therefore),? )?(?:(?:the|my) )?(?:final |correct )?"
    r"(?:answer(?: is\b\s*[:：]?|\s*[:：])|答案(?:是|为)?[:：]?)[ \t]*(\S[^\n]*)\s*$",
    re.IGNORECASE,
)
_BOX = re.compile(r"\\boxed\s*\{")
# What may stand before a box that is the whole answer: words, "=" and marks of math; no digit and no sign.
_BEFORE_BOX = re.compile(r"(?:^|[^\W\d_]|[:=,.;>≈]|\\approx)[\s$*]*(?:\\[(\[])?[\s$]*$")
_AFTER_BOX = re.compile(r"[\s$*.。]*(?:\\[)\]])?[\s$*.。]*")
_QUOTED = re.compile(r"'([^']*)'|\"([^\"]*)\"")
_LONG_DECIMAL = re.compile(r"-?\d*\.?\d+(?:e-?\d+)?", re.IGNORECASE)


def accepted(given: Iterable[tuple[str, Any]], question: str, declared: str) -> tuple[tuple[str, ...], list[str]]:
    """A row's golds -> all answers that count, and what was done to them in the words that are counted.

    Args:
      given: (key of the row, value) of each.
      declared: the row's `answer_type`, "" where it has none. It is that of the first.

    Raises:
      BadRow: one of them holds no answer, or none that a response could equal.
    """
    found, done, options = [], [], options_of(question)
    for key, value in given:
        kept = declared == "word" or value in options.values()
        text, what = unwrapped(value, key, kept)
        if not text:
            continue
        refuse_half_pair(text, key)
        text, more = choices.chosen(text, question, options, declared, key, first=not found)
        refuse_unboxable(text, key)
        refuse_too_large(text, key, "" if found else declared)
        found, done = [*found, text], [*done, *what, *more]
    return tuple(dict.fromkeys(found)), list(dict.fromkeys(done))


def as_text(value: Any, key: str) -> tuple[str, bool]:
    """A gold as text, and whether float noise was taken off: 0.30000000000000004 is 0.3, and 4.0 is 4.

    Raises:
      BadRow: it is neither text nor a finite number.
    """
    if isinstance(value, bytes):  # a column of Parquet
        try:
            value = value.decode()
        except UnicodeDecodeError:
            raise BadRow(f"bad {key}", f"`{key}` holds bytes that are no text; write it as text") from None
    if isinstance(value, str):
        return value, False
    if isinstance(value, bool) or not isinstance(value, int | float | decimal.Decimal):
        hint = ' ("Yes", "True")' if isinstance(value, bool) else ""
        raise BadRow(f"bad {key}", f"`{key}` is a JSON {type(value).__name__}; give text{hint}")
    if not abs(value) < 1e300:  # NaN too
        raise BadRow(f"bad {key}", f"`{key}` is no finite number; give text")
    if isinstance(value, float):
        if value == int(value) and abs(value) < 1e16:
            return str(int(value)), False
        plain = _without_noise(value)
        return plain or str(value), bool(plain)
    return (format(value, "f") if isinstance(value, decimal.Decimal) else str(value)), False


def unwrapped(value: Any, key: str, kept: bool) -> tuple[str, list[str]]:
    """A row's gold -> the answer and what was done to it, in the words that are counted.

    Args:
      kept: whether a word such as "None" is an answer here.

    Raises:
      BadRow: it holds no answer, or none for certain.
    """
    given, noisy = as_text(value, key)
    text = restored(given, key, gold=True)
    done = ["float noise taken off"] * noisy + ["lost backslash put back"] * (text != given)
    text = text.strip()
    for _ in range(4):  # a box in tags behind a thought
        bare = _bare(text, key)
        if bare == text:
            break
        text, done = bare, [*done, "answer taken out of its wrapping"]
    if text in MISSING and not kept:
        detail = f"`{key}` is {text}, as programs write that there is none; give the answer (or `answer_type`: word)"
        raise BadRow("no answer", detail)
    letters = _list_as_text(text, key)
    if letters:
        text, done = letters, [*done, "list of letters written out"]
    if _LONG_DECIMAL.fullmatch(text) and len(text) > 15 and (plain := _without_noise(float(text), text)):
        text, done = plain, [*done, "float noise taken off"]
    return text, list(dict.fromkeys(done))


def refuse_unboxable(answer: str, key: str) -> None:
    """Raises BadRow where no response's box could hold the answer."""
    if len(answer) > ANSWER_LENGTH:
        detail = f"`{key}` has {len(answer)} characters, graded are {ANSWER_LENGTH}; shorten it"
        raise BadRow("answer too long", detail)
    if answer.isascii() and answer.isalnum():
        return
    if not normalize(answer):
        raise BadRow("empty answer", f"`{key}` holds nothing but marks; give the gold answer")
    if not any(mark in answer for mark in "{}\\"):
        return  # in a box it stays what it is
    # The reward reads a response's last box: an answer with a brace too many never comes out of one as it went in.
    if response.last_boxed(f"\\boxed{{{answer}}}") != answer:
        raise BadRow("answer can't be boxed", f"`{key}` has unbalanced braces; mend or escape them")


def refuse_too_large(answer: str, key: str, declared: str) -> None:
    """Raises BadRow for a formula that takes all the time there is, whatever it is compared with."""
    what = too_large(answer)
    kind = (declared or answer_type_of(answer)) if what else "word"
    if kind not in ("word", "code", "letter", "letters"):
        raise BadRow("answer can't be graded", f"`{key}` holds {what}, which is never evaluated; write it otherwise")


def _bare(text: str, key: str) -> str:
    """One wrapping less. Raises BadRow where there is one and what it holds is in doubt."""
    if thought := list(_THOUGHT.finditer(text)):
        return _something(text[thought[-1].end() :], key, "</think>")
    if tags := _TAG.findall(text):
        return _something(tags[-1], key, "<answer>")
    if (match := _HASHES.search(text)) and "####" not in match[1]:
        return _something(match[1], key, "####")
    if "####" in text:
        return _something(text.rpartition("####")[2], key, "####")
    boxes = list(_BOX.finditer(text))
    if boxes:
        return _out_of_box(text, boxes, key)
    if ("answer" in text.casefold() or "答案" in text) and (match := _SAID.search(text)):
        return match[1].strip().removesuffix(".").strip("*").strip() or text
    return text


def _out_of_box(text: str, boxes: list[re.Match], key: str) -> str:
    inner = response.last_boxed(text)
    if len(boxes) > 1 or inner is None:
        what = "a box that never closes" if len(boxes) == 1 else f"{len(boxes)} boxes"
        raise BadRow("answer in doubt", f"`{key}` holds {what}; give the answer alone")
    before, after = text[: boxes[-1].start()], text[boxes[-1].end() + len(inner) + 1 :]
    if not _BEFORE_BOX.search(before) or not _AFTER_BOX.fullmatch(after):
        detail = f"`{key}` is {short(text)}: a box and more; give the answer alone"
        raise BadRow("answer in doubt", detail)
    return _something(inner, key, "\\boxed{}")


def _something(text: str, key: str, where: str) -> str:
    if not text.strip():
        raise BadRow("no answer", f"`{key}` holds nothing behind or inside its {where}; give the gold answer")
    return text.strip()


def _list_as_text(text: str, key: str) -> str:
    """ "A, C" of "['A', 'C']"; "" of what is no list of texts."""
    parts = ["".join(found).strip() for found in _QUOTED.findall(text[: 4 * ANSWER_LENGTH])]
    if not all(parts) or not parts or not re.fullmatch(r"\[[\s,]*\]", _QUOTED.sub("", text)):
        return ""
    if len(parts) == 1:
        return parts[0]
    if not all(re.fullmatch("[A-Z]", part) for part in parts):
        detail = f"`{key}` is the text of a list; give `answers` for several that count, or one text for all together"
        raise BadRow("list as text", detail)
    return ", ".join(parts)


def _without_noise(value: float, written: str = "") -> str:
    """The short decimal that a float means, "" where it means itself.

    Noise is what double precision leaves beyond its 15 digits, where 12 or fewer say the same; and what single
    precision becomes in double, where six digits or fewer give the same single.
    """
    import numpy as np  # here: most files have none

    full = repr(value)
    if (written and written != full) or len(_digits(full)) < 14:
        return ""
    single = repr(float(str(np.float32(value)))) if abs(value) < 3e38 else full
    if float(np.float32(value)) == value and len(_digits(single)) <= 6:
        return _plain(single)
    rounded = repr(float(f"{value:.15g}"))
    return _plain(rounded) if len(_digits(full)) >= 16 and len(_digits(rounded)) <= 12 else ""


def _plain(text: str) -> str:
    return text.removesuffix(".0")


def _digits(text: str) -> str:
    return re.sub(r"\D", "", text.lower().partition("e")[0]).strip("0")
