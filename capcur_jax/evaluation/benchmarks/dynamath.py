"""DynaMath: 501 seed questions, each in ten variants; a seed right in all of them is the worst case.

Published: github.com/DynaMath/DynaMath (trial1 to trial10, each a dataset.json by number of the seed), Hugging Face
DynaMath/DynaMath_Sample (sample_variant1 to 10, Parquet), VLMEvalKit's table. An own file's index is seed_variant.
"""

from __future__ import annotations

import re
from typing import Any

from capcur_jax.data.problem import BadRow
from capcur_jax.evaluation import tables
from capcur_jax.evaluation.benchmarks import short_answer
from capcur_jax.evaluation.benchmarks.base import Ask, Benchmark, Row, Verdict
from capcur_jax.evaluation.benchmarks.measures import by_class, percent, whole_groups

_WHERE = "github.com/DynaMath/DynaMath, Hugging Face DynaMath/DynaMath_Sample, or VLMEvalKit"
_FILES = ("DynaMath.tsv", "trial*/dataset.json", "*variant*.parquet", "*variant*.jsonl", "dataset.json")
_JSON = 'Answer with a JSON object of two keys: "solution" for your steps and "short answer" for the result alone.'
_FORMS = {
    "multiple choice": 'The "short answer" is the letter of the right choice.',
    "float": 'The "short answer" is a number with three decimals.',
    "text": 'Numbers in the "short answer" have three decimals.',
}


def _row(entry: tables.Entry) -> Row:
    kind = entry.text("answer_type")
    if kind not in _FORMS:
        raise BadRow("bad answer_type", f"`answer_type` {kind!r} is none of {', '.join(_FORMS)}")
    seed = entry.optional("qid") or entry.text("id")
    place = re.findall(r"(?:trial|variant)[_ ]?(\d+)", str(entry.file))
    variant = entry.optional("varid") or (place[-1] if place else "1")
    facts = {"kind": kind, "seed": seed, "subject": entry.optional("subject")}
    facts["level"] = entry.optional("knowledge_level") or entry.optional("level")
    index = entry.index if entry.is_table else f"{seed}_{variant}"
    gold = entry.optional("answer") or entry.text("ground_truth")
    images = entry.images("decoded_image" if entry.value.get("decoded_image") else "image")
    return Row(index, entry.text("question"), (gold,), images, facts=facts, cluster=seed)


def _official(row: Row, text: str, extracted: str | None) -> Verdict:
    answer, gold, kind = short_answer.official(text) or "", row.gold[0], row.facts["kind"]
    right = short_answer.near(answer, gold) if kind == "float" else gold in answer
    if kind == "multiple choice":
        right = answer == gold if len(answer) == 1 else gold in answer[:3]
    return Verdict(float(right), "rule", answer)


def _kit(row: Row, text: str, extracted: str | None) -> Verdict | Ask:
    gold, kind = row.gold[0], row.facts["kind"]
    answer = short_answer.kit(text, kind)
    if answer is None:
        if extracted is None:
            return Ask("extract")
        answer = short_answer.of_kind(extracted, kind) or ""
    right = short_answer.near(answer, gold) if kind == "float" else answer == gold
    if kind == "text":
        right = bool(answer) and answer.lower() in gold.lower()
    return Verdict(float(right), "rule", answer)


def _metrics(rows: Any, verdicts: Any, mode: str) -> dict[str, Any]:
    average = percent(verdict.credit for verdict in verdicts)
    worst = whole_groups(rows, verdicts, lambda row: row.facts["seed"])
    classes = {f"{fact}s": by_class(rows, verdicts, fact) for fact in ("subject", "level")}
    return {"score": average, "average": average, "worst_case": worst, **classes}


BENCHMARK = Benchmark(
    name="dynamath", title="DynaMath", files=_FILES, where=_WHERE, sets={5010: "all", 501: "one variant"},
    digests={"b8425ad9": ""}, load=lambda path, images: tables.load(path, _FILES, images, _row, _WHERE),
    put=lambda row: f"## Question\n{row.question}\n\n## Answer\n{_JSON} {_FORMS[row.facts['kind']]}",
    official=_official, kit=_kit, metrics=_metrics,
)  # fmt: skip
