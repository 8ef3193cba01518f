"""V*: small things in large photographs, their attributes and relative positions.

Published: Hugging Face craigwu/vstar_bench (test_questions.jsonl and two folders of images), and VLMEvalKit's table. An
own file's index is question_id.

The authors' program compares how likely a model finds each option and reads no text. `official` is therefore the letter
that the reply gives, by this project's reader, against the published label.
"""

from __future__ import annotations

from typing import Any

from capcur_jax.answers.letters import options_of
from capcur_jax.evaluation import rules, tables
from capcur_jax.evaluation.benchmarks import choices
from capcur_jax.evaluation.benchmarks.accuracy import accuracy
from capcur_jax.evaluation.benchmarks.base import Benchmark, Row

_WHERE = "Hugging Face craigwu/vstar_bench, or VLMEvalKit"
_FILES = ("VStarBench.tsv", "test_questions.jsonl")


def _row(entry: tables.Entry) -> Row:
    facts: dict[str, Any] = {"category": entry.text("category")}
    if entry.is_table:
        question, gold, options, index = entry.text("question"), entry.text("answer"), entry.options(), entry.index
    else:  # the text has the options as "(A) ..." lines, and says to answer with the letter
        question, gold, index = entry.text("text"), entry.text("label"), entry.text("question_id")
        options, facts["complete"] = options_of(question), True
    images = entry.images("image")
    return Row(index, question, (gold,), images, choices.with_gold(options, gold), facts, entry.shown("image"))


BENCHMARK = Benchmark(
    name="vstar",
    title="V*",
    files=_FILES,
    where=_WHERE,
    sets={191: "all"},
    digests={"b18854d7": ""},
    load=lambda path, images: tables.load(path, _FILES, images, _row, _WHERE),
    put=choices.put,
    official=choices.letter_given,
    kit=rules.choice,
    metrics=accuracy(categories="category"),
)
