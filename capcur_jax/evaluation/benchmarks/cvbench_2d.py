"""CV-Bench-2D: counts and places of objects in images of ADE20K and COCO; the score is the mean of the two sources.

Published: Hugging Face nyu-visionx/CV-Bench (test_2d.jsonl or .parquet; test.* has the 3D rows as well), and
VLMEvalKit's table. An own file's index is idx. The authors count a column of right answers that one fills in oneself,
so `official` takes the letter that the reply gives, by this project's reader.
"""

from __future__ import annotations

from typing import Any

from capcur_jax.data.problem import BadRow
from capcur_jax.evaluation import rules, tables
from capcur_jax.evaluation.benchmarks import choices
from capcur_jax.evaluation.benchmarks.base import Benchmark, Row
from capcur_jax.evaluation.benchmarks.measures import by_class

_WHERE = "Hugging Face nyu-visionx/CV-Bench, or VLMEvalKit"
_FILES = ("CV-Bench-2D.tsv", "test_2d.parquet", "test_2d.jsonl", "test.parquet", "test.jsonl")


def _row(entry: tables.Entry) -> Row | str:
    if "3D" in (entry.optional("type"), entry.optional("split")):
        return "of CV-Bench-3D"
    gold = choices.bare(entry.text("answer"))
    texts = [str(text) for text in entry.list("choices")]
    options = entry.options() or dict(zip("ABCDEFGH", texts, strict=False))
    if len(texts) > 8:
        raise BadRow("bad choices", f"{len(texts)} choices where at most 8 are published")
    index = entry.index if entry.is_table else entry.text("idx")
    keys = ("image",) if entry.is_table or entry.value.get("image") is not None else ("filename",)
    facts = {"source": entry.text("source"), "task": entry.optional("task") or entry.optional("category")}
    facts["complete"] = True
    images, options = entry.images(*keys), choices.with_gold(options, gold)
    return Row(index, entry.text("prompt"), (gold,), images, options, facts, entry.shown(*keys))


def _metrics(rows: Any, verdicts: Any, mode: str) -> dict[str, Any]:
    sources = by_class(rows, verdicts, "source")
    score = sum(sources.values()) / len(sources)
    return {"score": score, **sources, "tasks": by_class(rows, verdicts, "task")}


BENCHMARK = Benchmark(
    name="cvbench_2d",
    title="CV-Bench-2D",
    files=_FILES,
    where=_WHERE,
    sets={1438: "all"},
    digests={"a7cff4cc": ""},
    load=lambda path, images: tables.load(path, _FILES, images, _row, _WHERE),
    put=choices.put,
    official=choices.letter_given,
    kit=rules.choice,
    metrics=_metrics,
)
