"""TextVQA: text in photographs; ten people's answers a question.

Published: textvqa.org (TextVQA_0.5.1_val.json, its rows under "data"), Hugging Face lmms-lab/textvqa (Parquet), and
VLMEvalKit's table. An own file's index is question_id.

An answer that m of nine people gave has min(1, m / 3) of the credit, averaged over the ten ways to leave one out.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from capcur_jax.data.problem import BadRow
from capcur_jax.evaluation import tables
from capcur_jax.evaluation.benchmarks import vqa_text
from capcur_jax.evaluation.benchmarks.base import Benchmark, Row, Rule, Verdict
from capcur_jax.evaluation.benchmarks.measures import percent

_WHERE = "textvqa.org, Hugging Face lmms-lab/textvqa, or VLMEvalKit"
_FILES = ("TextVQA_VAL.tsv", "TextVQA*_val.json", "validation-*.parquet")
_PEOPLE = 10


def _row(entry: tables.Entry) -> Row:
    answers = tuple(map(str, entry.list("answer" if entry.is_table else "answers")))
    if len(answers) != _PEOPLE:
        raise BadRow("bad answers", f"{len(answers)} answers where {_PEOPLE} belong; give the validation split")
    cluster = entry.shown("image") if entry.is_table else entry.optional("image_id")
    index = entry.index if entry.is_table else entry.text("question_id")
    return Row(index, entry.text("question"), answers, _images(entry), cluster=cluster)


def _images(entry: tables.Entry) -> tuple[Path, ...]:
    """An own row of JSON names its image by an id alone."""
    if entry.is_table or entry.value.get("image") is not None:
        return entry.images("image")
    names = [f"{folder}{entry.text('image_id')}.jpg" for folder in ("", "train_images/", "val_images/")]
    return entry.named(*names)


def _credit(answer: str, people: list[str]) -> float:
    same = people.count(answer)
    return (same * min(1, (same - 1) / 3) + (len(people) - same) * min(1, same / 3)) / len(people)


def _rule(normalized: Callable[[str], str]) -> Rule:
    def rule(row: Row, text: str, extracted: str | None) -> Verdict:
        answer = normalized(text)
        return Verdict(_credit(answer, [normalized(gold) for gold in row.gold]), "rule", answer)

    return rule


BENCHMARK = Benchmark(
    name="textvqa",
    title="TextVQA",
    files=_FILES,
    where=_WHERE,
    sets={5000: "val"},
    digests={"b233b31f": ""},
    load=lambda path, images: tables.load(path, _FILES, images, _row, _WHERE),
    put=lambda row: f"{row.question}\nReply with one word or a short phrase.",
    official=_rule(vqa_text.official),
    kit=_rule(vqa_text.kit),
    metrics=lambda rows, verdicts, mode: {"score": percent(verdict.credit for verdict in verdicts)},
)
