"""WeMath testmini: 1,740 questions in 525 groups, steps and the composite of each. github.com/We-Math/We-Math.

The score is of groups: whether a right composite comes with right steps (mastery) or without (rote memorization).
"""

from __future__ import annotations

import re

from capcur_jax.answers.letters import LETTERS
from capcur_jax.evaluation import rules, tables
from capcur_jax.evaluation.benchmarks import wording
from capcur_jax.evaluation.benchmarks.base import Ask, Benchmark, Row, Verdict
from capcur_jax.evaluation.benchmarks.wemath_groups import metrics, role

_FILES = ("WeMath.tsv", "testmini*.json", "testmini*.parquet")
_WHERE = "github.com/We-Math/We-Math (data), Hugging Face We-Math/We-Math, or VLMEvalKit"
_DROPPED = str.maketrans("", "", "<>:.")


def _row(entry: tables.Entry) -> Row:
    facts = {key: entry.text(key) for key in ("ID", "key")}
    role(facts["key"])
    facts |= {"concept": entry.optional("knowledge concept"), "hint": entry.optional("hint")}
    options = entry.options() if entry.is_table else _options(entry.text("option"))
    index = entry.index if entry.is_table else str(entry.number)
    images = entry.images("image_path" if entry.optional("image_path") else "image")
    return Row(index, entry.text("question"), (entry.text("answer"),), images, options, facts, cluster=facts["ID"])


def _options(text: str) -> dict[str, str]:
    """ "A. 3;B. 4; C. 5" by letter. A letter counts behind a semicolon and in its turn."""
    starts, place = [], 0
    for letter in LETTERS:
        match = re.compile(rf"(?:\A|;|(?<=\n))\s*{letter}\s*[.、:．]\s*").search(text, place)
        if not match:
            break
        starts.append(match)
        place = match.end()
    ends = [match.start() for match in starts[1:]] + [len(text)]
    return {
        LETTERS[at]: text[match.end() : end].strip() for at, (match, end) in enumerate(zip(starts, ends, strict=True))
    }


def _official(row: Row, text: str, extracted: str | None) -> Verdict | Ask:
    answer = text.rpartition("Answer")[2].strip().translate(_DROPPED).strip()[:1]
    found = answer if answer and answer in "ABCDEFGH" else None
    return Verdict(float(found == row.gold[0]), "rule", found)


BENCHMARK = Benchmark(
    name="wemath", title="WeMath (testmini)", files=_FILES, where=_WHERE, sets={1740: "testmini"},
    digests={"b5e969a0": "since 2025-01-27", "056142c8": "before 2025-01-27, without options"},
    load=lambda source, images: tables.load(source, _FILES, images, _row, _WHERE),
    put=lambda row: wording.choices(row, closing=""), official=_official, kit=rules.choice, metrics=metrics,
)  # fmt: skip
