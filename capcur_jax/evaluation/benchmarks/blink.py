"""BLINK: fourteen tasks of perception with up to four images a question (val; the answers of test are hidden).

Published: Hugging Face BLINK-Benchmark/BLINK (a folder of Parquet a task), and VLMEvalKit's table. An own file's index
is idx. `official` is the authors' program: a reply that is a letter, else the one "(X)" among its words or those of its
last paragraph, else a judge; its score is the mean of the tasks, the kit's that of the rows.
"""

from __future__ import annotations

from typing import Any

from capcur_jax.data.problem import BadRow
from capcur_jax.evaluation import rules, tables
from capcur_jax.evaluation.benchmarks import choices
from capcur_jax.evaluation.benchmarks.base import Ask, Benchmark, Row, Verdict
from capcur_jax.evaluation.benchmarks.measures import by_class, percent

_WHERE = "Hugging Face BLINK-Benchmark/BLINK, or VLMEvalKit"
_FILES = ("BLINK.tsv", "val-*.parquet", "val*.jsonl", "*.jsonl")
_IMAGES = "image_1", "image_2", "image_3", "image_4"
_ALONE = {form.format(letter) for letter in "ABCDE" for form in ("{}", "({})")}


def _row(entry: tables.Entry) -> Row:
    gold = choices.bare(entry.text("answer"))
    if gold == "hidden":
        raise BadRow("no answer", "the answers of BLINK's test split are not published; give its val split")
    if entry.is_table:
        index, question, options, task = entry.index, entry.text("question"), entry.options(), entry.text("category")
    else:
        index, question, task = entry.text("idx"), entry.text("prompt"), entry.text("sub_task")
        options = dict(zip("ABCDE", map(str, entry.list("choices")), strict=False))
    facts = {"task": task, "complete": not entry.is_table}
    images, options = entry.images(*_IMAGES), choices.with_gold(options, gold)
    return Row(index, question, (gold,), images, options, facts, entry.shown(*_IMAGES))


def _official(row: Row, text: str, extracted: str | None) -> Verdict | Ask:
    marks = {f"({letter})" for letter in row.options}
    words, last = (marks & set(part.split()) for part in (text, text.rpartition("\n\n")[2]))
    read = extracted
    if text in _ALONE:
        read = text
    elif words and 1 in (len(words), len(last)):
        read = min(last if len(last) == 1 else words)
    elif extracted is None:
        return Ask("letter")
    # What stands there counts word for word: "(A) red" of a judge is none of the options.
    return Verdict(float(str(read) in (row.gold[0], f"({row.gold[0]})")), "rule", read)


def _metrics(rows: Any, verdicts: Any, mode: str) -> dict[str, Any]:
    tasks = by_class(rows, verdicts, "task")
    mean = percent(verdict.credit for verdict in verdicts)
    return {"score": mean if mode == "kit" else sum(tasks.values()) / len(tasks), "rows_mean": mean, "tasks": tasks}


BENCHMARK = Benchmark(
    name="blink", title="BLINK", files=_FILES, where=_WHERE, sets={1901: "val"},
    digests={"d5e8af14": "", "3b6649b6": "before 2026-05-11: 134 relative-reflectance answers are wrong"},
    load=lambda path, images: tables.load(path, _FILES, images, _row, _WHERE),
    put=choices.put, official=_official, kit=rules.choice, metrics=_metrics,
)  # fmt: skip
