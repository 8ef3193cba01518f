"""Questions with options whose published text may hold them already, and the letter that a reply gives."""

from __future__ import annotations

from collections.abc import Mapping

from capcur_jax.answers.letters import letter_in
from capcur_jax.data.problem import BadRow
from capcur_jax.evaluation.benchmarks import wording
from capcur_jax.evaluation.benchmarks.base import Ask, Row, Verdict


def put(row: Row) -> str:
    """The published text where it is complete (`facts` say so), else question, options and what to do."""
    return row.question if row.facts.get("complete") else wording.choices(row)


def with_gold(options: Mapping[str, str], gold: str) -> Mapping[str, str]:
    """The options. Raises BadRow: the right answer is none of them."""
    if gold not in options:
        raise BadRow("bad answer", f"the right answer {gold!r} is none of {', '.join(options) or 'no options'}")
    return options


def bare(answer: str) -> str:
    """ "(A)" as "A"."""
    return answer.strip().removeprefix("(").removesuffix(")")


def letter_given(row: Row, text: str, extracted: str | None) -> Verdict | Ask:
    """The letter that a reply gives as its answer, for sets whose authors' scorer reads no text; else a judge."""
    letters = "".join(row.options)
    for reply in (text, extracted):
        if reply is not None and (found := letter_in(reply, letters)):
            return Verdict(float(found in row.gold), "rule", found)
    return Ask("letter") if extracted is None else Verdict(0.0, "rule")
