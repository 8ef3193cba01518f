"""MMStar: 1,500 questions that can't be answered without the picture, six categories. Hugging Face Lin-Chen/MMStar.

The official scorer looks at the beginning of a reply alone: "B", "(B)", "option B", "the answer is B".
"""

from __future__ import annotations

from capcur_jax.answers.letters import options_of
from capcur_jax.evaluation import rules, tables
from capcur_jax.evaluation.benchmarks import wording
from capcur_jax.evaluation.benchmarks.accuracy import accuracy
from capcur_jax.evaluation.benchmarks.base import Ask, Benchmark, Row, Verdict

_FILES = ("MMStar.tsv", "mmstar*.parquet", "val-*.parquet", "*.jsonl")
_WHERE = "Hugging Face Lin-Chen/MMStar, or VLMEvalKit"
_STARTS = ("", "(", "option ", "the answer is ")


def _row(entry: tables.Entry) -> Row:
    facts = {key: entry.optional(key) for key in ("category", "l2_category", "bench", "hint")}
    question = entry.text("question")
    options = entry.options() or options_of(question)  # an own file has them inside the question
    facts["whole"] = not entry.options()
    index = tables.index_text(entry.value["index"]) if "index" in entry.value else str(entry.number)
    images, gold = entry.images("image"), entry.text("answer").strip()
    return Row(index, question, (gold,), images, options, facts, entry.shown("image"))


def put(row: Row) -> str:
    """The published text where it has the options."""
    return row.question if row.facts["whole"] else wording.choices(row)


def _official(row: Row, text: str, extracted: str | None) -> Verdict | Ask:
    reply = text.lower().strip().replace("\n", " ")
    named = [reply[len(start)].upper() for start in _STARTS if reply.startswith(start) and len(reply) > len(start)]
    right = row.gold[0] in named
    return Verdict(float(right), "rule", row.gold[0] if right else named[-1] if named else None)


BENCHMARK = Benchmark(
    name="mmstar", title="MMStar", files=_FILES, where=_WHERE, sets={1500: "val"}, digests={"e1ecd214": "the kit's"},
    load=lambda source, images: tables.load(source, _FILES, images, _row, _WHERE), put=put, official=_official,
    kit=rules.choice, metrics=accuracy(categories="category", l2_categories="l2_category"),
)  # fmt: skip
