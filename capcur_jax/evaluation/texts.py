"""Benchmarks' questions with their figures in words: VisOnlyQA's text twins, MathVerse's text versions, captions."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from capcur_jax.errors import InputError
from capcur_jax.evaluation import tables
from capcur_jax.evaluation.benchmarks import mathverse, visonlyqa
from capcur_jax.evaluation.benchmarks.base import Benchmark, Row
from capcur_jax.evaluation.counterfactual import facts_text, reveals

_TWINS = ("text_*__*.jsonl", "text_*__*.parquet")  # of VisOnlyQA
_VERSION = "Text Dominant"  # of MathVerse: what the figure says is in its question


def told(benchmark: Benchmark, rows: Sequence[Row], data: Path | None) -> tuple[list[tuple[Row, Row]], Counter[str]]:
    """The rows of which there is a text, each with its row without image; and how many others there are, and why.

    The text's row has the index of the other. MathVerse's texts are its own and stay as they are; others are left out
    where they hold the answer.

    Args:
      data: the benchmark's folder, where the texts lie too; None: rows have their own.

    Raises:
      InputError: the folder holds no texts.
    """
    known = _published(benchmark, data)
    found, left_out = [], Counter[str]()
    for row in rows:
        if not row.images:
            left_out["without image"] += 1
            continue
        text = known.get(_name(benchmark, row), "")
        facts = text.removesuffix(row.question) if text else _facts(row)
        if not facts:
            left_out["without a text of the figure"] += 1
        elif not _is_mathverse(benchmark) and reveals(facts, [row.options.get(gold, gold) for gold in row.gold]):
            left_out["whose text holds the answer"] += 1
        else:
            found.append((row, dataclasses.replace(row, question=text or f"{facts}\n\n{row.question}", images=())))
    return found, left_out


def _published(benchmark: Benchmark, data: Path | None) -> dict[str, str]:
    """Name -> the whole question of the text version."""
    if benchmark is visonlyqa.BENCHMARK:
        if data is None:
            raise InputError("visonlyqa: give --data, the folder with its files, text_<kind>.jsonl among them")
        files = tables.find(data if data.is_dir() else data.parent, _TWINS, benchmark.where)[1]
        rows = [row for file in files for row in benchmark.load(file, None)]
        return {row.index.removeprefix("text_"): row.question for row in rows}
    if _is_mathverse(benchmark):
        if data is None:
            raise InputError(f"{benchmark.name}: give --data, a folder with MathVerse's version {_VERSION} too")
        return {str(row.facts["problem"]): row.question for row in mathverse.benchmark(_VERSION).load(data, None)}
    return {}


def _name(benchmark: Benchmark, row: Row) -> str:
    return str(row.facts["problem"]) if _is_mathverse(benchmark) else row.index


def _is_mathverse(benchmark: Benchmark) -> bool:
    return benchmark in mathverse.BENCHMARKS


def _facts(row: Row) -> str:
    return facts_text(row.index, row.facts.get("caption"), row.images)
