"""Golds of multiple-choice questions: a letter that is none of the options, or an index, can never be answered right.

Options are what `letters.options_of` finds in the question's text. Where it finds none, nothing is checked.
"""

from __future__ import annotations

import re

from capcur_jax.answers import letters as letters_lib
from capcur_jax.answers.kinds import answer_type_of
from capcur_jax.answers.spelling import ANSWER_LENGTH, normalize
from capcur_jax.data.problem import IMAGE_MARK, BadRow, short

# Looser than kinds.labelled, which has no options to compare with: what it finds must be an option's letter and text.
_LETTER_AND_TEXT = re.compile(r"\(?([A-Za-z])\s?[).:、．]\s*(\S.*)", re.DOTALL)
_NUMBERED = re.compile(r"(?<![\w.])(?:(\d{1,2})\s?[).、]|([①-⑳]))\s*([^\d①-⑳]*)")
_CIRCLED = "①②③④⑤⑥⑦⑧⑨⑩⑪⑫⑬⑭⑮⑯⑰⑱⑲⑳"
# What begins a task of its own, in the parts (a), (b) of a question: then a number is an answer.
_TASK = re.compile(
    r"[?=]|\b(?:find|compute|calculate|determine|evaluate|prove|show|solve|what|how|which|when|if|let|express|given)\b",
    re.IGNORECASE,
)
# What asks for one of what follows it.
_ASKS = re.compile(r"(?:\bWhich|哪)(?:[^.?!。？！\n]|\.(?=\S))*[?？:：]\s*\Z")
_ASKED = 400  # characters before the options that are looked at
_SHORT = 60  # characters of an option beside which a bare number is taken for an index


def chosen(
    answer: str, question: str, options: dict[str, str], declared: str, key: str, first: bool = True
) -> tuple[str, list[str]]:
    """A gold in view of the question's options -> the gold, and what was done to it in the words that are counted.

    Args:
      options: `letters.options_of` the question.
      declared: the row's `answer_type`, "" where it has none.
      first: whether that is this gold's; another one of the row may be of any type, such as "4" beside "A".

    Raises:
      BadRow: no option can be meant, or one of several.
    """
    no_letter = declared == "letter" and not _capitals(answer) and answer_type_of(answer) != "letter"  # "B. cat" is one
    if not options:
        _refuse_number(answer, question, declared, key)
        if no_letter and first:
            detail = f"`answer_type` is letter, `{key}` looks like a {answer_type_of(answer)}; correct one of them"
            raise BadRow("bad answer_type", detail)
        return answer, []
    texts = {letter: _folded(text) for letter, text in options.items()}
    same = [letter for letter, text in texts.items() if text and text == _folded(answer)]
    letter = "" if same else _labelled(answer, texts, key)
    if letter:
        _refuse_twice(letter, texts, key)
        return letter, ["option's text taken off its letter"]
    letters = _capitals(answer)
    if answer.islower() and letters in options and not same:
        return letters, ["option's letter made a capital"]
    if no_letter:
        if len(same) == 1:
            return same[0], ["option's text replaced by its letter"]
        if first:
            what = f"`answer_type` is letter, and `{key}` is {short(answer)}, which {len(same)} options are; correct it"
            raise BadRow("bad answer_type", what)
    if letters and not same:
        _refuse_missing(letters, answer, question, options, declared, key)
    _refuse_index(answer, options, key)
    return answer, []


def _labelled(answer: str, texts: dict[str, str], key: str) -> str:
    """The letter of a gold that is an option's letter and text, "" of another."""
    match = _LETTER_AND_TEXT.fullmatch(answer)
    letter, text = (match[1].upper(), _folded(match[2])) if match else ("", "")
    if letter not in texts or text not in texts.values():
        return ""
    if text != texts[letter]:
        detail = f"`{key}` is {short(answer)}, and {letter} is another option; correct it"
        raise BadRow("letter and text differ", detail)
    return letter


def _refuse_missing(letters: str, answer: str, question: str, options: dict[str, str], declared: str, key: str) -> None:
    """Raises BadRow for letters that no option has, or one of whose options is there twice."""
    missing = [letter for letter in letters if letter not in options]
    if not missing:
        for letter in letters:
            _refuse_twice(letter, {letter: _folded(text) for letter, text in options.items()}, key)
        return
    # A small letter that is no option is a variable, and NO a word, unless the row says that they are letters.
    certain = letters in answer if len(letters) == 1 else len(missing) < len(letters)
    if (certain or declared in ("letter", "letters")) and _are_listed(question, options):
        detail = f"`{key}` is {letters}, the options in `problem` are {', '.join(options)}; correct one of them"
        raise BadRow("letter not among the options", detail)


def _are_listed(question: str, options: dict[str, str]) -> bool:
    """Whether what looks like options is a list to choose from: "Train A: 5 km, train B: 7 km" and tasks are none."""
    starts = letters_lib.option_starts(question)
    if any(_TASK.match(text) for text in options.values()):
        return False
    own_lines = all(question[:start].rstrip(" \t*-")[-1:] in ("", "\n") for start in starts)
    return own_lines or _asks(question[: starts[0]]) or (len(options) > 2 and _are_choices(options.values()))


def _asks(before: str) -> bool:
    return bool(_ASKS.search(before[-_ASKED:]))


def _refuse_index(answer: str, options: dict[str, str], key: str) -> None:
    """Raises BadRow for a number that stands for one of the options rather than for what one says."""
    if not re.fullmatch(r"\d{1,2}", answer) or int(answer) > len(options) or not _are_choices(options.values()):
        return
    if not any(re.search(rf"(?<!\d){answer}(?!\d)", text) for text in options.values()):
        detail = f"`{key}` is {answer}, the options are {', '.join(options)}: counted from 0 or 1? Give the letter"
        raise BadRow("number where options are letters", detail)


def _capitals(answer: str) -> str:
    """The answer as a capital letter, or as several different ones ("A, C"); "" where it is something else."""
    text = normalize(answer[:ANSWER_LENGTH])
    if single := re.fullmatch(r"[(\[]?([A-Za-z])[)\]]?", text):
        return single[1].upper()
    return "".join(letters_lib.letters_of(text))


def _refuse_twice(letter: str, texts: dict[str, str], key: str) -> None:
    told = texts[letter] not in ("", IMAGE_MARK)  # pictures are not told apart by their text
    twins = [other for other, text in texts.items() if told and text == texts[letter] and other != letter]
    if twins:
        detail = f"`{key}` is {letter}, and option {twins[0]} says the same; correct the options"
        raise BadRow("ambiguous options", detail)


def _refuse_number(answer: str, question: str, declared: str, key: str) -> None:
    """Raises BadRow for a number that is none of a question's numbered options, where it asks which of them.

    Elsewhere numbers count steps and rules ("How many steps? 1. boil 2. cut"), unless the gold has a circle too.
    """
    circled = answer in _CIRCLED and len(answer) == 1
    if not circled and not re.fullmatch(r"\d{1,2}", answer):
        return
    given = _CIRCLED.index(answer) + 1 if circled else int(answer)
    runs = list(_NUMBERED.finditer(question))
    numbers = [int(match[1]) if match[1] else _CIRCLED.index(match[2]) + 1 for match in runs]
    texts = [match[3].strip() for match in runs]
    if len(numbers) < 2 or numbers != list(range(1, len(numbers) + 1)) or not all(texts):
        return
    before = question[: runs[0].start()]
    if not (before.strip().endswith(("?", "？", ":", "：")) if circled or declared == "letter" else _asks(before)):
        return
    if given not in numbers and _are_choices(texts):
        detail = f"`{key}` is {answer}, the options in `problem` are 1 to {len(numbers)}; correct one of them"
        raise BadRow("number not among the options", detail)


def _are_choices(texts) -> bool:
    return all(text and len(text) <= _SHORT and not _TASK.search(text) for text in texts)


def _folded(text: str) -> str:
    return "".join(text.split()).strip("$.*。;；,").casefold()
