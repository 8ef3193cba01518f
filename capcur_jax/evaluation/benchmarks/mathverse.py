"""MathVerse testmini: 788 problems in several versions. github.com/ZrrSkywalker/MathVerse.

Only a judge scores it: one extracts the answer, one says whether it equals the standard answer. Equal texts need none.
A file with all five versions (3,940 rows) holds each of them; the other rows are left out and counted.
"""

from __future__ import annotations

from capcur_jax.evaluation import tables
from capcur_jax.evaluation.benchmarks import wording
from capcur_jax.evaluation.benchmarks.accuracy import accuracy
from capcur_jax.evaluation.benchmarks.base import Ask, Benchmark, Row, Verdict

_WHERE = "Hugging Face AI4Math/MathVerse, or VLMEvalKit"


def _row(entry: tables.Entry, version: str) -> Row | str:
    found = entry.optional("problem_version")
    if found and found != version:
        return "of another version"
    about = entry.dict("metadata")
    asked = entry.optional("query_wo") or entry.text("question")
    facts = {
        "problem": entry.optional("problem_index"), "version": version, "type": entry.optional("question_type"),
        "subject": about.get("subject", ""), "subfield": about.get("subfield", ""),
        # What a judge reads: of Vision Only the own question is empty, it stands in the picture.
        "judged": entry.optional("question_for_eval") or entry.optional("question") or asked,
    }  # fmt: skip
    index = entry.index if entry.is_table else entry.text("sample_index")
    gold = (entry.text("answer"),)
    return Row(index, asked, gold, entry.images("image"), facts=facts, cluster=facts["problem"])


def _rule(row: Row, text: str, extracted: str | None) -> Verdict | Ask:
    answer = text if extracted is None else extracted
    if answer.strip() == row.gold[0].strip():
        return Verdict(1.0, "rule", answer.strip())
    if extracted is None:
        return Ask("extract", question=row.facts["judged"])
    return Ask("equal", answer=extracted.strip(), question=row.facts["judged"])


def benchmark(version: str, digest: str = "") -> Benchmark:
    """One of the versions, by its name in the files."""
    words = version.replace(" ", "_")
    files = (f"MathVerse_MINI_{words}.tsv", "MathVerse_MINI.tsv", "testmini*.json", "testmini*.parquet")
    return Benchmark(
        name=f"mathverse_{words.lower()}", title=f"MathVerse, {version}", files=files, where=_WHERE,
        sets={788: f"testmini, {version}"}, digests={digest: version, "5017caca": "MINI, all five versions"},
        load=lambda source, images: tables.load(source, files, images, lambda entry: _row(entry, version), _WHERE),
        put=wording.unchanged, official=_rule, kit=_rule,
        metrics=accuracy(versions="version", subjects="subject", subfields="subfield", types="type"),
    )  # fmt: skip


BENCHMARKS = (benchmark("Vision Intensive", "01cbd35b"), benchmark("Vision Only", "68a11d46"))
