"""MathVision (MATH-V): competition problems with figures, testmini 304 of test 3,040. github.com/mathllm/MATH-V.

The official scorer needs no judge: it finds the answer by phrases and boxes, and compares texts, tuples and values to
two decimals; an option's text counts as well as its letter.
"""

from __future__ import annotations

import re

from capcur_jax.answers.letters import LETTERS
from capcur_jax.evaluation import arithmetic, rules, tables
from capcur_jax.evaluation.benchmarks import wording
from capcur_jax.evaluation.benchmarks.accuracy import accuracy
from capcur_jax.evaluation.benchmarks.base import Ask, Benchmark, Row, Verdict
from capcur_jax.evaluation.benchmarks.mathvision_answer import equal, final_answer

_WHOLE = "MathVision.tsv", "test.jsonl", "test-*.parquet"
_FILES = "MathVision_MINI.tsv", "testmini*.jsonl", "testmini*.parquet", *_WHOLE
_WHERE = "github.com/mathllm/MATH-V (data, images), Hugging Face MathLLMs/MathVision, or VLMEvalKit"
_BOX = re.compile(r"\\boxed\{([^}]*)\}")


def _row(entry: tables.Entry) -> Row:
    options = [str(option) for option in entry.list("choices" if entry.is_table else "options")]
    facts = {"subject": entry.optional("category") or entry.optional("subject"), "level": entry.optional("level")}
    question, answer = entry.text("question"), entry.text("answer")
    if not entry.is_table:
        question = wording.hinted(question, options)
    images = entry.images("decoded_image" if entry.value.get("decoded_image") else "image")
    index = entry.index if entry.is_table else entry.text("id")
    named = dict(zip(LETTERS, options, strict=False))
    return Row(index, question, (answer,), images, named, facts, entry.shown("image"))


def _official(row: Row, text: str, extracted: str | None) -> Verdict | Ask:
    gold, found = row.gold[0], final_answer(text)
    right = equal(gold, found) or equal(row.options.get(gold, ""), found)
    return Verdict(float(right), "rule", found)


def _kit(row: Row, text: str, extracted: str | None) -> Verdict | Ask:
    replies = [_unboxed(reply) for reply in (text, extracted) if reply is not None]
    if row.options:
        verdict = rules.choice(row, *replies)
        if isinstance(verdict, Verdict):
            return verdict
        return Ask("extract") if extracted is None else Verdict(0.0, "judge", extracted)
    for reply in replies:
        if _same(reply, row.gold[0]):
            return Verdict(1.0, "rule", reply)
    return Ask("extract") if extracted is None else Verdict(0.0, "judge", extracted)


def _unboxed(reply: str) -> str:
    """Of a reply with a box the first one's content, to its first brace."""
    box = _BOX.search(reply)
    return box[1] if box else reply


def _same(reply: str, gold: str) -> bool:
    reply, gold = reply.lower().strip(), gold.lower().strip()
    if reply == gold:
        return True
    values = arithmetic.value(reply), arithmetic.value(gold)
    return None not in values and abs(values[0] - values[1]) < 1e-6


BENCHMARK = Benchmark(
    name="mathvision", title="MathVision", files=_FILES, where=_WHERE, put=wording.unchanged, official=_official,
    kit=_kit, sets={304: "testmini", 3040: "test, the whole set"}, digests={"060fe4fa": "MINI", "93f6de14": "full"},
    load=lambda source, images: tables.load(source, _FILES, images, _row, _WHERE),
    metrics=accuracy(subjects="subject", levels="level"),
    whole=lambda source, images: tables.load(source, _WHOLE, images, _row, _WHERE),
)  # fmt: skip
