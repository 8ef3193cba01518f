"""VisOnlyQA: what is seen in geometry, chemistry, charts and 3D scenes, as true or false and as choices.

Published: github.com/psunlpgroup/VisOnlyQA (a file <kind>.jsonl a kind, images/ beside or above), Hugging Face
ryokamoi/VisOnlyQA_Eval_Real_v1.1 and _Eval_Synthetic (Parquet), and VLMEvalKit's table, which leaves out the kind with
several right options. An own file's index is id. Files text_<kind> describe the figure in words first: they are another
set, which a folder does not bring in; give the file itself.

`official` is the authors' program: the one option that stands in the reply in brackets, else the one that stands in it
at all, as a part of a word too, else a judge.
"""

from __future__ import annotations

import re
from typing import Any

from capcur_jax.evaluation import rules, tables
from capcur_jax.evaluation.benchmarks import choices
from capcur_jax.evaluation.benchmarks.accuracy import accuracy
from capcur_jax.evaluation.benchmarks.base import Ask, Benchmark, Row, Verdict

_WHERE = "github.com/psunlpgroup/VisOnlyQA, Hugging Face ryokamoi/VisOnlyQA_Eval_*, or VLMEvalKit"
_FILES = ("VisOnlyQA-VLMEvalKit.tsv", "visonlyqa_vlmevalkit.tsv", "[!t]*__*.jsonl", "[!t]*__*.parquet")
_TEXTS = re.compile(r"\(([a-z])\)\s+(.*?)(?=\s+\([a-z]\)\s|\s*\n|\s*\Z)")
_SYNTHETIC = re.compile(r"(?:text_)?(?:syntheticgeometry|3d)__")


def _row(entry: tables.Entry) -> Row:
    if entry.is_table:
        options, gold = entry.options(), entry.text("answer")
        facts: dict[str, Any] = {"split": entry.text("split"), "category": entry.text("category"), "several": False}
        index, question, images = entry.index, entry.text("question"), entry.images("image")
        return Row(index, question, (gold,), images, choices.with_gold(options, gold), facts, entry.shown("image"))
    names, question = [str(name) for name in entry.list("response_options")], entry.text("prompt_no_reasoning")
    texts = dict(_TEXTS.findall(question))
    options = {name: texts.get(name, name) for name in names}
    kind, gold = re.split(r"-\d", entry.file.stem)[0], entry.text("answer")
    several = entry.optional("question_type") == "multiple_answers"
    facts = {"split": "Eval_Synthetic" if _SYNTHETIC.match(kind) else "Eval_Real", "category": kind}
    facts |= {"several": several, "complete": True}
    images = entry.images("decoded_image" if entry.value.get("decoded_image") is not None else "image_path")
    options = options if several else choices.with_gold(options, gold)
    return Row(entry.text("id"), question, (gold,), images, options, facts, entry.text("image_path"))


def _official(row: Row, text: str, extracted: str | None) -> Verdict | Ask:
    if not row.facts["several"]:
        for form in ("({})", "{}"):
            found = [name for name in row.options if form.format(name) in text]
            if len(found) == 1:
                return Verdict(float(found[0] in row.gold), "rule", found[0])
    if extracted is None:
        return Ask("extract")
    read = extracted.replace(" ", "")
    if not row.facts["several"]:
        read = next((name for name in row.options if name in read), read)
    return Verdict(float(read in row.gold), "rule", read)


def _kit(row: Row, text: str, extracted: str | None) -> Verdict | Ask:
    return _official(row, text, extracted) if row.facts["several"] else rules.choice(row, text, extracted)


def _metrics(rows: Any, verdicts: Any, mode: str) -> dict[str, Any]:
    """The kit's set has no rows with several right options; of the own files they are left out, and counted."""
    kept = [pair for pair in zip(rows, verdicts, strict=True) if mode != "kit" or not pair[0].facts["several"]]
    found = accuracy(splits="split", categories="category")([row for row, _ in kept], [one for _, one in kept], mode)
    return found | {"left_out": len(rows) - len(kept)}


BENCHMARK = Benchmark(
    name="visonlyqa", title="VisOnlyQA", files=_FILES, where=_WHERE, digests={"cf460a31": ""},
    sets={1150: "the kit's", 500: "real", 700: "synthetic", 1200: "real and synthetic"},
    load=lambda path, images: tables.load(path, _FILES, images, _row, _WHERE),
    put=choices.put, official=_official, kit=_kit, metrics=_metrics,
)  # fmt: skip
