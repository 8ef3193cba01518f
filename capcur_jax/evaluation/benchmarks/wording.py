"""How questions are put, in the order that VLMEvalKit has: hint, question, options, what to do. The words are ours."""

from __future__ import annotations

from collections.abc import Sequence

from capcur_jax.answers.letters import LETTERS
from capcur_jax.evaluation.benchmarks.base import Row

SELECT = "Select the right answer from the options above."


def choices(row: Row, closing: str = SELECT) -> str:
    """A question with its options, one line each; `facts` may have a hint. closing: the last line, "" for none."""
    hint = row.facts.get("hint", "")
    lines = [f"Hint: {hint}"] if hint else []
    lines.append(f"Question: {row.question}")
    if row.options:
        lines += ["Options:", *(f"{letter}. {text}" for letter, text in row.options.items())]
        lines += [closing] if closing else []
    return "\n".join(lines)


def unchanged(row: Row) -> str:
    """The published text, which already says how to answer."""
    return row.question


def hinted(question: str, options: Sequence[str], kind: str = "", precision: int | None = None, unit: str = "") -> str:
    """A question of a mathematical set as VLMEvalKit's table has it: what to answer, the question, "(A) ..." lines."""
    if options:
        wanted = "the letter of the right option at the end, such as A, B, C or D"
    else:
        places = {1: "one decimal place, such as 1.2", 2: "two decimal places, such as 1.23"}.get(
            precision or 0, "decimals"
        )
        wanted = {
            "integer": "the value as a whole number at the end, such as 1, 2 or 3",
            "float": f"the value as a number with {places}, at the end",
            "list": "the values as a list at the end, such as [1, 2, 3]",
        }.get(kind, "the final answer at the end")
    lines = [
        f"Hint: Answer the question and give {wanted}.",
        f"Question: {question}" + (f" (Unit: {unit})" if unit else ""),
    ]
    if options:
        lines += ["Choices:", *(f"({letter}) {text}" for letter, text in zip(LETTERS, options, strict=False))]
    return "\n".join(lines)
