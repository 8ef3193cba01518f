"""What kind of error wrong answers make: a judge quotes the first wrong step and gives one class of a closed set.

Shares of perception errors depend on the definition and on the judge: shares near 90 % come from "present anywhere",
near 67 % from "the first error". Both are counted here, and definition, judge and prompts stand beside them.
"""

from __future__ import annotations

import collections
import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from capcur_jax.data.problem import stable_hash
from capcur_jax.evaluation import judge_prompts, statistics
from capcur_jax.evaluation.folders import Answered
from capcur_jax.evaluation.judge import Judge, Question
from capcur_jax.evaluation.judge_prompts import part, shortened
from capcur_jax.evaluation.served import image_of
from capcur_jax.records.journal import digest_of

FILE = "errors.json"
SHOW = ("image", "facts", "nothing")
CLASSES = {
    "perception": "something in the figure is seen wrongly, overlooked or made up: an object, value, label or place",
    "reasoning": "a step does not follow from what was said before, or the plan can't lead to the answer",
    "knowledge": "a fact, formula or definition from outside figure and question is wrong or missing",
    "calculation": "numbers or terms are worked out wrongly",
    "question_misread": "the question or its options are understood wrongly, or another question is answered",
    "truncated": "the response breaks off before any wrong step",
    "unreadable": "the response can't be understood: empty, repetition, no sentence, another language throughout",
}
CONFIDENCE = ("high", "medium", "low")
PAPER = {
    "share": 86.9,
    "of": "wrong sampled answers of Qwen3-VL-8B on three visual math sets, judged by Claude-Haiku-4.5",
    "not known": "sets, prompt, classes, sample size, one label or several, whether the judge saw the image",
}

_TASK = (
    "The response to the question is wrong. Find its first wrong step and say of which kind the error is. Go through "
    "the response from its beginning, and compare what it says of the figure with {seen}.\n\nKinds of errors:\n"
    "{classes}\n\nYou may think first. Your reply has to end with exactly these four lines:\n"
    "First wrong step: (its words, copied from the response; or none)\n"
    "First error: (one of {names})\n"
    "Errors present: (all kinds that occur anywhere in the response, with commas between)\n"
    "Confidence: (one of {confidence})"
)
_CUT = "The response was cut off at its limit of tokens."
_AGAIN = (
    "That could not be read. Reply with the four lines alone: First wrong step: ..., First error: (one of {names}), "
    "Errors present: ..., Confidence: (one of {confidence})"
)
_LINES = ("first wrong step", "first error", "errors present", "confidence")
_TEXTS = "\x1f".join((_TASK, _CUT, _AGAIN, *CLASSES, *CLASSES.values(), judge_prompts.VERSION))
VERSION = "1-" + hashlib.sha256(_TEXTS.encode()).hexdigest()[:8]


def wrong(answered: Mapping[str, Answered], mode: str) -> list[Answered]:
    """The rows that were answered and got no credit, in the table's order."""
    return [
        one
        for one in answered.values()
        if not one.reply.failed and mode in one.verdicts and one.verdicts[mode].credit == 0
    ]


def drawn(rows: Sequence[Answered], limit: int) -> list[Answered]:
    """`limit` of the rows by the hash of their indices, 0: all; in their order."""
    if not limit or limit >= len(rows):
        return list(rows)
    chosen = set(sorted((one.row.index for one in rows), key=lambda index: stable_hash("errors", index))[:limit])
    return [one for one in rows if one.row.index in chosen]


def classify(
    rows: Sequence[Answered], judge: Judge, show: str = "image", facts: Callable[[Answered], str] = lambda one: ""
) -> list[dict[str, Any] | None]:
    """The error of each wrong answer.

    Args:
      show: what the judge compares with: the images, or "facts", the text of each that `facts` gives.

    Returns:
      For each row {"first": class, "present": classes anywhere, "quote": the first wrong step, "quoted": whether those
      words stand in the response, "confidence", "saw": "image" | "facts" | "nothing", "by": "judge" | "rule"}, or None
      where the judge was unreadable. Empty responses are "unreadable" by rule.

    Raises:
      InputError, RolloutError: the judge is not there; the same command goes on.
    """
    asked = [one for one in rows if one.reply.text.strip()]
    saw = {one.row.index: _saw(one, show, facts) for one in asked}
    answers = judge.ask([_question(one, *saw[one.row.index]) for one in asked])
    said = dict(zip((one.row.index for one in asked), answers, strict=True))
    found: list[dict[str, Any] | None] = []
    for one in rows:
        if one.row.index not in said:
            empty = {"quote": "", "quoted": False, "confidence": "high", "saw": "nothing", "by": "rule"}
            found.append({"first": "unreadable", "present": ["unreadable"], **empty})
        else:
            answer = said[one.row.index]
            found.append(answer and {**answer, "saw": saw[one.row.index][0], "by": "judge"})
    return found


def summary(rows: Sequence[Answered], found: Sequence[dict[str, Any] | None], of: int | None = None) -> dict[str, Any]:
    """Counts and shares with 95 % intervals of what `classify` found, clustered as the rows are.

    Args:
      of: wrong answers in all, where only some of them were drawn.
    """
    known = [(one, error) for one, error in zip(rows, found, strict=True) if error]
    clusters = [one.cluster for one, _ in known]

    def share(values: list[bool]) -> dict[str, Any]:
        interval = statistics.mean_interval([float(value) for value in values], clusters) if values else None
        return {"rows": sum(values), "share": list(interval) if interval else None}

    return {
        "wrong": len(rows) if of is None else of,
        "drawn": len(rows),
        "classified": len(known),
        "undecided": len(rows) - len(known),
        "first": {name: share([error["first"] == name for _, error in known]) for name in CLASSES},
        "anywhere": {name: share([name in error["present"] for _, error in known]) for name in CLASSES},
        "confidence": dict(collections.Counter(error["confidence"] for _, error in known)),
        "judge saw": dict(collections.Counter(error["saw"] for _, error in known)),
        "quotes that stand in the response": sum(bool(error["quoted"]) for _, error in known),
    }


def read(reply: str, response: str, classes: Sequence[str]) -> dict[str, Any] | None:
    """What the last four lines of a judge's reply say, None where they are not those that were asked for."""
    lines = [line.strip().strip("*").strip() for line in reply.splitlines() if line.strip()][-len(_LINES) :]
    values = []
    for name, line in zip(_LINES, lines, strict=False):
        found = re.fullmatch(rf"{name}\s*:\**\s*(.*)", line, re.IGNORECASE | re.DOTALL)
        if not found:
            return None
        values.append(found[1].strip())
    if len(values) < len(_LINES):
        return None
    quote, first, present, confidence = values
    words = [_class(word) for word in re.split(r"[,;]", present)]
    first, confidence = _class(first), confidence.lower().strip(" .()*")
    if first not in classes or any(word not in classes for word in words) or confidence not in CONFIDENCE:
        return None
    quote = quote.strip(" \"'“”`")
    quote = "" if quote.lower().strip("().") == "none" else quote[:500]
    everything = [name for name in CLASSES if name == first or name in words]
    quoted = bool(quote) and _squeezed(quote) in _squeezed(response)
    return {"first": first, "present": everything, "quote": quote, "quoted": quoted, "confidence": confidence}


def _class(word: str) -> str:
    return re.sub(r"[\s-]+", "_", word.strip(" .()*`'\"").lower())


def _squeezed(text: str) -> str:
    return "".join(text.split()).lower()


def _saw(one: Answered, show: str, facts: Callable[[Answered], str]) -> tuple[str, str]:
    """(what the judge sees of the figure, the facts' text)"""
    if show == "image" and one.row.images and all(path.is_file() for path in one.row.images):
        return "image", ""
    text = facts(one) if show == "facts" else ""
    return ("facts", text) if text else ("nothing", "")


def _question(one: Answered, saw: str, facts: str) -> Question:
    row, response = one.row, one.reply.text
    # What ended by itself can't have been cut off.
    classes = [name for name in CLASSES if name != "truncated" or one.reply.finish != "stop"]
    names, confidence = ", ".join(classes), ", ".join(CONFIDENCE)
    seen = {"image": "the image", "facts": "the facts of the figure", "nothing": "the question"}[saw]
    parts = {"Facts of the figure": facts} if facts else {}
    parts |= {"Question": row.question, "Options": "\n".join(f"{a}. {b}" for a, b in row.options.items())}
    parts |= {"Right answer": judge_prompts.golds(row), "Wrong response": shortened(response)}
    task = _TASK.format(
        seen=seen, classes="\n".join(f"{name}: {CLASSES[name]}" for name in classes), names=names, confidence=confidence
    )
    text = judge_prompts.RULES + "".join(part(title, text) for title, text in parts.items() if text)
    text += f"{_CUT}\n\n" * (one.reply.finish == "length") + task

    def messages() -> list[dict]:
        images = [image_of(path) for path in row.images] if saw == "image" else []
        return [{"role": "user", "content": [*images, {"type": "text", "text": text}] if images else text}]

    digests = [digest_of(str(path)) for path in row.images] if saw == "image" else []
    return Question(
        name=f"{row.index} error",
        content=(VERSION, text, *digests),
        messages=messages,
        read=lambda reply: read(reply, response, classes),
        again=_AGAIN.format(names=names, confidence=confidence),
    )
