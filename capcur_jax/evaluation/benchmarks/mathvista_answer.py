"""MathVista's own scorer: an extraction, brought into the form of the gold answer, equals it or not."""

from __future__ import annotations

import re

from capcur_jax.evaluation.benchmarks.base import Ask, Row, Verdict
from capcur_jax.evaluation.distance import edits

_LETTER = re.compile(r"\(([a-zA-Z])\)")


def official(row: Row, text: str, extracted: str | None) -> Verdict | Ask:
    """Starts from a recorded extraction, else from the reply where it is the bare answer, else from a judge's."""
    choices, kind = list(row.options.values()), row.facts["type"]
    if extracted is None and (text == "" or text in choices or (not choices and bare(text, kind) is not None)):
        extracted = text
    if extracted is None:
        return Ask("extract")
    found = _choice(row, extracted) if choices else _normalized(extracted, kind, row.facts["precision"])
    return Verdict(float(found == row.facts["answer"]), "rule", found)


def bare(text: str, kind: str) -> float | None:
    """The value of a reply that is nothing but a number of its kind ("integer", "float")."""
    try:
        return {"integer": int, "float": float}[kind](text)
    except (KeyError, ValueError):
        return None


def _choice(row: Row, text: str) -> str:
    """The text of the choice that "(B)" or "B" names; else of the nearest one, the first of several."""
    text = text.strip()
    named = _LETTER.search(text)
    text = named[1].upper() if named else text
    return row.options.get(text) or min(row.options.values(), key=lambda choice: edits(text, choice))


def _normalized(text: str, kind: str, precision: int | None) -> str | None:
    try:
        if kind == "integer":
            return str(int(float(text)))
        return str(round(float(text), precision)) if kind == "float" else text
    except (ValueError, OverflowError):
        return None
