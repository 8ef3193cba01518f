"""POPE: whether an object is in the picture, yes or no; three splits of 3,000. github.com/AoiDragon/POPE.

VLMEvalKit's table has each picture and question once, with the splits it belongs to; it counts in each of them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from capcur_jax.evaluation import rules, tables
from capcur_jax.evaluation.benchmarks import wording
from capcur_jax.evaluation.benchmarks.base import Ask, Benchmark, Row, Verdict
from capcur_jax.evaluation.benchmarks.measures import percent

_FILES = ("POPE.tsv", "coco_pope_*.json*", "*.parquet")
_WHERE = "github.com/AoiDragon/POPE (output/coco) with COCO's val2014, Hugging Face lmms-lab/POPE, or VLMEvalKit"
SPLITS = ("random", "popular", "adversarial")


def _load(source: Path, images: Path | None) -> tables.Rows:
    several = len(tables.find(source, _FILES, _WHERE)[1]) > 1  # of several files `question_id` is that of each
    return tables.load(source, _FILES, images, lambda entry: _row(entry, several), _WHERE)


def _row(entry: tables.Entry, several: bool) -> Row:
    named = re.findall("|".join(SPLITS), entry.file.name)
    splits = entry.optional("category").split(",") if entry.optional("category") else named[-1:]
    gold = entry.text("label" if "label" in entry.value else "answer").strip().capitalize()
    own = str(entry.number) if several or "category" in entry.value else entry.text("question_id")
    question = entry.text("text" if "text" in entry.value else "question")
    index, picture = entry.index if entry.is_table else own, entry.shown("image")
    facts = {"splits": tuple(split.strip() for split in splits)}
    return Row(index, question, (gold,), entry.images("image"), facts=facts, cluster=picture)


def _official(row: Row, text: str, extracted: str | None) -> Verdict | Ask:
    words = text.partition(".")[0].replace(",", "").split(" ")
    found = "No" if {"No", "not", "no"} & set(words) else "Yes"
    return Verdict(float(found in row.gold), "rule", found)


def _metrics(rows: Sequence[Row], verdicts: Sequence[Verdict], mode: str) -> dict[str, Any]:
    pairs = list(zip(rows, verdicts, strict=True))
    by_split = {name: [pair for pair in pairs if name in pair[0].facts["splits"]] for name in SPLITS}
    pooled = [pair for pair in pairs for _ in pair[0].facts["splits"] or ("",)]
    whole = _numbers(pooled)
    splits = {name: _numbers(found) for name, found in by_split.items() if found}
    mean = percent(numbers["f1"] / 100 for numbers in splits.values())
    return {"score": whole["f1"], **whole, **splits, "mean_f1": mean, "pooled_rows": len(pooled)}


def _numbers(pairs: Sequence[tuple[Row, Verdict]]) -> dict[str, float]:
    """In per cent. An answer that can't be read is no Yes, and wrong."""
    said = sum(verdict.read == "Yes" for _, verdict in pairs)
    there = sum("Yes" in row.gold for row, _ in pairs)
    both = sum(verdict.read == "Yes" and "Yes" in row.gold for row, verdict in pairs)
    return {
        "f1": 200 * both / (said + there) if said + there else 0.0,
        "accuracy": percent(verdict.credit for _, verdict in pairs),
        "precision": 100 * both / said if said else 0.0,
        "recall": 100 * both / there if there else 0.0,
        "yes_share": 100 * said / len(pairs) if pairs else 0.0,
    }


BENCHMARK = Benchmark(
    name="pope", title="POPE", files=_FILES, where=_WHERE, load=_load, put=wording.unchanged, official=_official,
    sets={5127: "all splits, each question once", 9000: "all splits", 3000: "one split", 2910: "LLaVA's random split"},
    digests={"c12f5acb": "the kit's"}, kit=rules.agreement, metrics=_metrics,
)  # fmt: skip
