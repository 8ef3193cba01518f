"""ORZ-Math: mathematical text questions with answers, the 13k hard ones of Open-Reasoner-Zero.

From: github.com/Open-Reasoner-Zero/Open-Reasoner-Zero, data/orz_math_13k_collection_hard.json (Hugging Face
Open-Reasoner-Zero/orz_math_13k_collection_hard); the larger orz_math_57k_collected.json and
orz_math_72k_collection_extended.json are of the same format and read where the first is not there. Licence: MIT. The
file is a list of dialogues of two turns: {"from": "human", "value": question} and {"from": "assistant",
"ground_truth": {"value": answer, "pass_at_n": ...}} (`pass_at_n`, where it is there: the share of an own model's
answers that were right).

Ids are the file (13k) and the row's number in it. Metadata: `pass_at_n`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from capcur_jax.answers import response
from capcur_jax.data.problem import BadRow, Drop, Problem
from capcur_jax.data.sources import published
from capcur_jax.data.sources.published import Record

FILES = (
    "orz_math_13k_collection_hard.json",
    "orz_math_72k_collection_extended.json",
    "orz_math_57k_collected.json",
)
ORIGIN = "https://github.com/Open-Reasoner-Zero/Open-Reasoner-Zero (data/orz_math_13k_collection_hard.json)"


def read(directory: Path, images: Path) -> Iterator[Problem | Drop]:
    """The rows of the first of FILES that is in `directory` or its folder data/. Raises InputError."""
    patterns = [name for file in FILES for name in (file, f"data/{file}")]
    file = published.find(directory, patterns, ORIGIN)[0]
    yield from published.problems(map(_as_object, published.records(file)), _convert)


def _as_object(record: Record) -> Record:
    """A dialogue as an object; other readers of JSON make {"0": turn, "1": turn} of it."""
    if isinstance(record.value, list):
        return record._replace(value={str(number): turn for number, turn in enumerate(record.value)})
    return record


def _convert(record: Record) -> Problem:
    turns = [record.value.get(number) for number in ("0", "1")]
    asked, answered = (turn if isinstance(turn, dict) else {} for turn in turns)
    if asked.get("from") != "human" or answered.get("from") != "assistant":
        raise BadRow("bad dialogue", "not a human turn and then an assistant turn")
    truth = answered.get("ground_truth")
    if not isinstance(truth, dict):
        raise BadRow("no answer", "`ground_truth` is missing")
    answer = published.as_text(truth.get("value"), "ground_truth")
    answer = response.last_boxed(answer) or answer
    if not answer.strip():
        raise BadRow("no answer", "`ground_truth` holds no value")
    rate: Any = truth.get("pass_at_n")
    return published.question(
        "orz_math",
        f"{record.file.stem.split('_')[2]}-{record.number}",
        published.text(asked, "value"),
        answer,
        capability="text",
        metadata={"pass_at_n": rate if isinstance(rate, float | int) else None},
    )
