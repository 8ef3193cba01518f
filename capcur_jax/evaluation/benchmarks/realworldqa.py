"""RealWorldQA: 765 photographs, most of them from cars. Hugging Face xai-org/RealworldQA.

xAI published no scorer. `official` takes the answer word for word, without case and a last full stop, as the question
asks for it ("answer with the letter", "a single word"), or by the letter rule where there are options.
"""

from __future__ import annotations

from capcur_jax.answers.letters import options_of
from capcur_jax.evaluation import rules, tables
from capcur_jax.evaluation.benchmarks.accuracy import accuracy
from capcur_jax.evaluation.benchmarks.base import Ask, Benchmark, Row, Verdict
from capcur_jax.evaluation.benchmarks.mmstar import put

_FILES = ("RealWorldQA.tsv", "annotations.json*", "realworldqa*.json*", "test-*.parquet")
_WHERE = "Hugging Face xai-org/RealworldQA, or VLMEvalKit"


def _row(entry: tables.Entry) -> Row:
    question = entry.text("question")
    options = entry.options() or options_of(question)  # an own file has them inside the question
    facts = {"whole": not entry.options(), "category": entry.optional("category"), "hint": entry.optional("hint")}
    index = entry.index if entry.is_table else str(entry.number)
    images, gold = entry.images("image"), entry.text("answer").strip()
    return Row(index, question, (gold,), images, options, facts, entry.shown("image"))


def _exact(row: Row, text: str) -> bool:
    return text.strip().rstrip(".").strip().lower() == row.gold[0].rstrip(".").lower()


def _official(row: Row, text: str, extracted: str | None) -> Verdict | Ask:
    if row.options and not _exact(row, text):
        return rules.choice(row, text, extracted)
    return Verdict(float(_exact(row, text)), "rule", text.strip())


def _kit(row: Row, text: str, extracted: str | None) -> Verdict | Ask:
    if row.options:
        return rules.choice(row, text, extracted)
    if _exact(row, text if extracted is None else extracted):
        return Verdict(1.0, "rule", row.gold[0])
    return Ask("extract") if extracted is None else Ask("equal", answer=extracted)


BENCHMARK = Benchmark(
    name="realworldqa", title="RealWorldQA", files=_FILES, where=_WHERE, sets={765: "test"}, put=put,
    load=lambda source, images: tables.load(source, _FILES, images, _row, _WHERE), official=_official, kit=_kit,
    digests={"4de008f5": "the kit's"}, metrics=accuracy(categories="category"),
)  # fmt: skip
