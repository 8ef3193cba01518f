"""Texts of published questions in this project's form: image marks, lines of options, final answers of solutions.

All texts are untrusted; every function takes time linear in their length (a handful of passes).
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from capcur_jax.answers import response
from capcur_jax.answers.kinds import answer_type_of
from capcur_jax.answers.spelling import ANSWER_LENGTH, long_words
from capcur_jax.data.problem import IMAGE_MARK, BadRow, short

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
LONGEST_ANSWER = 60  # characters of a final answer that is taken from a solution: more is prose
_NUMBERED_MARK = re.compile(r"<image ?\d+>")
_LETTERED = re.compile(r"\s*[(\[]?([A-Za-z])(?:[)\].:,]+(?:\s+|(?=\S))(.*\S)|[)\].:,]*)\s*", re.DOTALL)
_INSTRUCTION = re.compile(r"^[^\n]*\bAnswer: ?xxx\b\.?\s*|^Hint:[^\n]*\n", re.IGNORECASE | re.MULTILINE)
_QUESTION = re.compile(r"^[ \t]*Question:[ \t]*", re.IGNORECASE | re.MULTILINE)
_CHOICES = re.compile(r"\b(?:choices|options)\s*:", re.IGNORECASE)
_FIRST_CHOICE = re.compile(r"^[ \t]*\(?A\s?[.:)]", re.MULTILINE)
_CHOICE = {letter: re.compile(rf"(?:^|(?<=\s))\(?{letter}\s?[.:)]\s*") for letter in LETTERS[:10]}
_LETTER = re.compile(r"\(?([A-Za-z])\)?[.:]?|\(?([A-Z])[).:]\s*\S.*", re.DOTALL)
# What stands before a solution's last words: "The answer is", "Answer:", "the correct option is", GSM8K's "####".
_ANSWER = re.compile(r"(?:\b(?:answers?|correct (?:option|choice))\b\W{0,3}(?:is\b|[:：])|####)\s*:?\s*", re.IGNORECASE)
_SENTENCE_END = re.compile(r"\.(?=\s|$)|\n")


def marked(problem: str, images: int) -> str:
    """The question with one <image> mark for each image; without marks, images come first.

    Numbered marks, <image1>, become plain ones. Beside a plain mark they are names, and stay.

    Raises:
      BadRow: there are marks, but not as many as images.
    """
    problem = problem.strip()
    if IMAGE_MARK not in problem:
        problem = _NUMBERED_MARK.sub(IMAGE_MARK, problem)
    marks = problem.count(IMAGE_MARK)
    if not marks:
        return f"{IMAGE_MARK}\n" * images + problem
    if marks != images:
        raise BadRow("marks and images differ", f"{marks} {IMAGE_MARK} marks for {images} images")
    return problem


def without_instruction(asked: str) -> str:
    """A question less the lines that say how to answer it ("... in the following format: Answer: xxx.", "Hint: ...").

    Training and evaluation add their own; two would contradict each other.
    """
    return _QUESTION.sub("", _INSTRUCTION.sub("", asked)).strip()


def with_options(problem: str, options: Sequence[str]) -> tuple[str, list[str]]:
    """The question with its options as lines "A. ...", and the bare options.

    Letters that the options bring ("A) 5", "(b) 6") are kept. Options that are letters alone are labels inside the
    picture; they become one line, "Choices: A, B, C".

    Raises:
      BadRow: fewer than two options, an empty one, or more than there are letters.
    """
    if not 2 <= len(options) <= len(LETTERS):
        raise BadRow("bad options", f"{len(options)} options; 2 to {len(LETTERS)} can be asked")
    found = [_LETTERED.fullmatch(option) for option in options]
    if all(match and match[1].upper() == letter for match, letter in zip(found, LETTERS, strict=False)):
        bare = [(match[2] or "").strip() for match in found]
        if not any(bare):
            return f"{problem.strip()}\nChoices: {', '.join(LETTERS[: len(bare)])}", list(LETTERS[: len(bare)])
    else:
        bare = [option.strip() for option in options]
    if not all(bare):
        raise BadRow("bad options", "an option is empty")
    lines = (f"{letter}. {option}" for letter, option in zip(LETTERS, bare, strict=False))
    return "\n".join((problem.strip(), *lines)), bare


def split_choices(problem: str) -> tuple[str, list[str]]:
    """A text that ends in its options, on lines of their own or behind "Choices:" -> (question, options).

    Without at least the options A and B at its end the text is given back, with no options.
    """
    marks = list(_CHOICES.finditer(problem))
    if marks:
        head, tail = problem[: marks[-1].start()], problem[marks[-1].end() :]
    else:
        first = _FIRST_CHOICE.search(problem)
        if not first:
            return problem, []
        head, tail = problem[: first.start()], problem[first.start() :]
    tail = tail.strip()
    starts: list[re.Match] = []
    for pattern in _CHOICE.values():
        match = pattern.search(tail, starts[-1].end() if starts else 0)
        if not match or (not starts and match.start()):
            break
        starts.append(match)
    if len(starts) < 2:
        return problem, []
    ends = [match.start() for match in starts[1:]] + [len(tail)]
    return head.strip(), [tail[start.end() : end].strip() for start, end in zip(starts, ends, strict=True)]


def choice(answer: str, options: Sequence[str]) -> str:
    """The letter of the option that an answer names, by letter or by its text.

    Raises:
      BadRow: it names none, or one that another option equals.
    """
    answer = answer.strip().strip("*$").strip()
    match = _LETTER.fullmatch(answer)
    letter = (match[1] or match[2]).upper() if match else ""
    if not letter or LETTERS.index(letter) >= len(options):
        same = [LETTERS[i] for i, option in enumerate(options) if _folded(option) == _folded(answer)]
        if not same:
            raise BadRow("answer is no option", f"the answer {short(answer)} is none of {len(options)} options")
        letter = same[0]
    gold = _folded(options[LETTERS.index(letter)])
    if sum(_folded(option) == gold for option in options) > 1:
        raise BadRow("ambiguous options", f"option {letter} is there twice")
    return letter


def final_answer(solution: str, options: Sequence[str] = ()) -> str:
    """The answer that a worked solution ends in: its last box, else what follows its last "Answer:".

    Args:
      options: of the question; the answer may then be of any kind, since it only has to be one of them.

    Raises:
      BadRow: it has none, or one that is too long to be compared.
    """
    answer = response.last_boxed(solution)
    if answer is None:
        matches = list(_ANSWER.finditer(solution))
        rest = solution[matches[-1].end() :][:ANSWER_LENGTH] if matches else ""
        answer = _SENTENCE_END.split(rest, maxsplit=1)[0]
    answer = answer.strip().strip("*$").strip().rstrip(".,;:").strip()
    if not answer:
        raise BadRow("no final answer", "the solution names no answer at its end")
    words = long_words(answer)
    if not options and (len(answer) > LONGEST_ANSWER or len(words) > 3 or not answer_type_of(answer)):
        raise BadRow("no final answer", f"the solution ends in {short(answer)}, which is prose")
    return answer


def _folded(value: str) -> str:
    return "".join(value.split()).strip("$.").casefold()
