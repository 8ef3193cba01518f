"""How questions are put, in the order that VLMEvalKit has: hint, question, options, what to do. The words are ours."""

from __future__ import annotations

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
