"""ChartQA: questions about charts, half by people and half made from captions; numbers within 5 % are right.

Published: github.com/vis-nlp/ChartQA (test_augmented.json, test_human.json with png/), Hugging Face
HuggingFaceM4/ChartQA (Parquet), and VLMEvalKit's table. An own file's index is the row's number from 0, over both.
"""

from __future__ import annotations

from pathlib import PurePath
from typing import Any

from capcur_jax.data.problem import BadRow
from capcur_jax.evaluation import tables
from capcur_jax.evaluation.benchmarks.base import Benchmark, Row, Verdict
from capcur_jax.evaluation.benchmarks.measures import by_class, percent

_WHERE = "github.com/vis-nlp/ChartQA, Hugging Face HuggingFaceM4/ChartQA, or VLMEvalKit"
_FILES = ("ChartQA_TEST.tsv", "test_*.json", "test-*.parquet")
_NEAR = 0.05


def _row(entry: tables.Entry) -> Row:
    key = "answer" if entry.is_table else "label"
    given = entry.value.get(key)
    try:  # a text in brackets may be a list of accepted answers, or an answer in brackets
        gold = entry.list(key) if isinstance(given, list) or str(given).lstrip()[:1] == "[" else [given]
    except BadRow:
        gold = [given]
    if entry.is_table:
        split = entry.text("split").removeprefix("test_")
    else:
        by_people = entry.value.get("human_or_machine")  # 0: human
        split = "human" if by_people == 0 or "human" in PurePath(entry.file).stem else "augmented"
    index = entry.index if entry.is_table else str(entry.number)
    question = entry.text("question" if entry.is_table else "query")
    accepted = tuple(str(one) for one in gold if one is not None)
    name = entry.optional("imgname")
    images = entry.named(name, f"png/{name}") if name else entry.images("image")
    return Row(index, question, accepted, images, facts={"split": split}, cluster=name or entry.shown("image"))


def _number(text: str) -> float | None:
    """ "45%" is 0.45, as the scorer has it; a gold of 45 does not agree with it."""
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


def near(answer: str, gold: str) -> bool:
    """Relaxed accuracy: a number within 5 % of a gold number other than 0, else the same text in any case."""
    found, expected = _number(answer), _number(gold)
    if found is not None and expected:
        return abs(found - expected) / abs(expected) <= _NEAR
    return answer.lower() == gold.lower()


def _official(row: Row, text: str, extracted: str | None) -> Verdict:
    return Verdict(float(any(near(text, gold) for gold in row.gold)), "rule", text)


def _metrics(rows: Any, verdicts: Any, mode: str) -> dict[str, Any]:
    splits = by_class(rows, verdicts, "split")
    every = [verdict.credit for verdict in verdicts]
    return {"score": percent(every) if mode == "kit" else sum(splits.values()) / len(splits), **splits}


BENCHMARK = Benchmark(
    name="chartqa", title="ChartQA", files=_FILES, where=_WHERE, sets={2500: "test"}, digests={"c902e0aa": ""},
    load=lambda path, images: tables.load(path, _FILES, images, _row, _WHERE),
    put=lambda row: f"{row.question}\nReply with one word, a number or a short phrase.",
    official=_official, kit=lambda row, text, extracted: _official(row, text.strip(), extracted), metrics=_metrics,
)  # fmt: skip
