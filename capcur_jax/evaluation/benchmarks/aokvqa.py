"""A-OKVQA val: 1,145 questions that need knowledge of the world, four choices. github.com/allenai/aokvqa.

The official scorer compares texts of choices; a reply that is none of them is read as a letter.
"""

from __future__ import annotations

from capcur_jax.answers.letters import LETTERS
from capcur_jax.data.problem import BadRow
from capcur_jax.evaluation import rules, tables
from capcur_jax.evaluation.benchmarks import wording
from capcur_jax.evaluation.benchmarks.accuracy import accuracy
from capcur_jax.evaluation.benchmarks.base import Ask, Benchmark, Row, Verdict

_FILES = ("A-OKVQA.tsv", "a-okvqa.tsv", "aokvqa_v1p0_val.json", "validation*.parquet")
_WHERE = "github.com/allenai/aokvqa with COCO's val2017, Hugging Face HuggingFaceM4/A-OKVQA, or VLMEvalKit"


def _row(entry: tables.Entry) -> Row:
    question = entry.text("question")
    if entry.is_table:
        facts = {"hint": entry.optional("hint"), "category": entry.optional("category")}
        options, gold = entry.options(), entry.text("answer")
        return Row(entry.index, question, (gold,), entry.pictures, options, facts, cluster=entry.picture)
    choices, right = [str(choice) for choice in entry.list("choices")], entry.value.get("correct_choice_idx")
    if not isinstance(right, int) or not 0 <= right < len(choices) <= len(LETTERS):
        raise BadRow("no answer", "`correct_choice_idx` is none of the choices; give val, test has no answers")
    options = dict(zip(LETTERS, choices, strict=False))
    picture = entry.shown("image") or entry.text("image_id")
    name = "" if entry.value.get("image") else f"{int(entry.text('image_id')):012d}.jpg"
    images = entry.named(name, f"val2017/{name}") if name else entry.images("image")
    return Row(entry.text("question_id"), question, (LETTERS[right],), images, options, cluster=picture)


def _official(row: Row, text: str, extracted: str | None) -> Verdict | Ask:
    named = [letter for letter, option in row.options.items() if option == text.strip()]
    if named:
        return Verdict(float(row.gold[0] in named), "rule", named[0])
    return rules.choice(row, text, extracted)


BENCHMARK = Benchmark(
    name="aokvqa", title="A-OKVQA (val)", files=_FILES, where=_WHERE, sets={1145: "val"}, put=wording.choices,
    load=lambda source, images: tables.load(source, _FILES, images, _row, _WHERE), official=_official,
    kit=rules.choice, metrics=accuracy(),
)  # fmt: skip
