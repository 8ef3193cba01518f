"""MathVista testmini: 1,000 questions with choices, numbers and lists. github.com/lupantech/MathVista.

The official scorer starts from an extraction: the reply where it is the bare answer, else a judge's. Of choices the one
nearest by edit distance counts, so that it gives credit to refusals too. The kit's compares letters and bare numbers.
"""

from __future__ import annotations

from capcur_jax.answers.letters import LETTERS
from capcur_jax.evaluation import rules, tables
from capcur_jax.evaluation.benchmarks import wording
from capcur_jax.evaluation.benchmarks.accuracy import accuracy
from capcur_jax.evaluation.benchmarks.base import Ask, Benchmark, Row, Verdict
from capcur_jax.evaluation.benchmarks.mathvista_answer import bare, official

_FILES = ("MathVista_MINI.tsv", "testmini*.json", "testmini*.parquet", "annot_testmini.json")
_WHERE = "github.com/lupantech/MathVista, Hugging Face AI4Math/MathVista, or VLMEvalKit"
_FACTS = ("task", "source", "category", "context", "grade", "language")


def _row(entry: tables.Entry) -> Row:
    about = entry.dict("metadata") or entry.value
    choices, answer = [str(choice) for choice in entry.list("choices")], entry.text("answer")
    letters = [letter for letter, choice in zip(LETTERS, choices, strict=False) if choice == answer]
    letter = entry.optional("answer_option") or (letters[0] if letters else answer)
    precision = entry.optional("precision")
    skills = about.get("skills") or []
    facts = {
        "type": entry.text("answer_type"), "answer": answer, "unit": entry.optional("unit"),
        "precision": int(float(precision)) if precision else None,
        "skills": tables.literal(skills, "skills") if isinstance(skills, str) and skills[:1] == "[" else skills,
        **{key: about.get(key, "") for key in _FACTS},
    }  # fmt: skip
    question = entry.optional("query") or entry.text("question")
    if not entry.is_table and not entry.optional("query"):
        question = wording.hinted(question, choices, facts["type"], facts["precision"], facts["unit"])
    images = entry.images("decoded_image" if entry.value.get("decoded_image") else "image")
    index = entry.index if entry.is_table else entry.text("pid")
    gold = (letter if choices else answer,)
    return Row(index, question, gold, images, dict(zip(LETTERS, choices, strict=False)), facts, entry.shown("image"))


def _kit(row: Row, text: str, extracted: str | None) -> Verdict | Ask:
    if row.options:
        verdict = rules.choice(row, text, extracted)
        if isinstance(verdict, Verdict):
            return verdict
        return Ask("extract") if extracted is None else Verdict(0.0, "judge", extracted)
    kind = row.facts["type"]
    if kind not in ("integer", "float"):
        return Verdict(0.0, "rule")  # of lists the kit compares nothing
    for reply in (text, extracted):
        if reply is not None and (value := bare(reply, kind)) is not None and value == bare(row.facts["answer"], kind):
            return Verdict(1.0, "rule", reply)
    return Ask("extract") if extracted is None else Verdict(0.0, "judge", extracted)


BENCHMARK = Benchmark(
    name="mathvista", title="MathVista (testmini)", files=_FILES, where=_WHERE, digests={"f199b98e": "MINI"},
    sets={1000: "testmini", 6141: "testmini and test"}, put=wording.unchanged, official=official, kit=_kit,
    load=lambda source, images: tables.load(source, _FILES, images, _row, _WHERE),
    metrics=accuracy(tasks="task", skills="skills", types="type", sources="source"),
)  # fmt: skip
