"""HallusionBench: yes or no about figures that mislead; a figure counts where all of its rows are right, so a question.

Published: github.com/tianyi-lab/HallusionBench (HallusionBench.json, 1,129 rows, 178 of them without an image), and
VLMEvalKit's table (951). An own file's index is the row's number from 0. The score is the mean of aAcc, fAcc and qAcc
in both modes, as boards have it. The authors' scorer is a judge for every row; here a plain yes or no needs none. In
`official`, "unclear" is right too where a question's figure is not shown.
"""

from __future__ import annotations

from typing import Any

from capcur_jax.data.problem import BadRow
from capcur_jax.evaluation import rules, tables
from capcur_jax.evaluation.benchmarks import wording
from capcur_jax.evaluation.benchmarks.base import Ask, Benchmark, Row, Verdict
from capcur_jax.evaluation.benchmarks.measures import percent, whole_groups

_WHERE = "github.com/tianyi-lab/HallusionBench, or VLMEvalKit"
_FILES = ("HallusionBench.tsv", "HallusionBench.json", "HallusionBench*.json")
_ANSWERS = {"0": "No", "1": "Yes", "no": "No", "yes": "Yes"}


def _row(entry: tables.Entry) -> Row:
    places = "set", "figure", "question"
    if entry.is_table:
        index, parts = entry.index, entry.index.split("_")
        if len(parts) < 6:
            raise BadRow("bad index", f"index {index!r} has no set, figure and question in parts 4 to 6")
        facts: dict[str, Any] = dict(zip(places, parts[3:6], strict=True))
        facts |= {"category": entry.text("category"), "subcategory": entry.text("l2-category"), "seen": True}
        gold, images = entry.text("answer"), entry.images("image")
    else:
        index, gold = str(entry.number), entry.text("gt_answer")
        facts = {place: entry.text(f"{place}_id") for place in places}
        category, facts["seen"] = entry.text("category"), entry.text("visual_input") != "0"
        facts |= {"category": category, "subcategory": f"{category}_{entry.text('subcategory')}"}
        facts["answer"] = entry.optional("gt_answer_details")
        name = f"{category}/{entry.text('subcategory')}/{facts['set']}_{facts['figure']}.png"
        names = entry.optional("filename") or name, name, f"hallusion_bench/{name}"
        images = entry.named(*names) if facts["seen"] else ()
    if gold.lower() not in _ANSWERS:
        raise BadRow("bad answer", f"the right answer {gold!r} is none of yes, no, 1, 0")
    cluster = "/".join((facts["subcategory"], facts["set"], facts["figure"]))
    return Row(index, entry.text("question"), (_ANSWERS[gold.lower()],), images, facts=facts, cluster=cluster)


def _official(row: Row, text: str, extracted: str | None) -> Verdict | Ask:
    read = rules.yes_no(text)
    if read is None and extracted is None:
        return Ask("yes_no")
    read = read or _ANSWERS.get(str(extracted).strip().lower(), "unclear")
    return Verdict(float(read in row.gold or (read == "unclear" and _is_unseen(row))), "rule", read)


def _metrics(rows: Any, verdicts: Any, mode: str) -> dict[str, Any]:
    """The kit's set has no rows without an image; of the own file they are left out, and counted."""
    pairs = [pair for pair in zip(rows, verdicts, strict=True) if mode != "kit" or pair[0].facts["seen"]]
    figures = [pair for pair in pairs if mode == "kit" or not _is_unseen(pair[0])]

    def whole(of: list[tuple[Row, Verdict]], place: str) -> float:
        keys = "subcategory", "set", place, *(() if mode == "kit" else ("category",))
        mine, theirs = [row for row, _ in of], [verdict for _, verdict in of]
        return whole_groups(mine, theirs, lambda row: tuple(row.facts[key] for key in keys))

    found = {"aAcc": percent(verdict.credit for _, verdict in pairs)}
    found |= {"fAcc": whole(figures, "figure"), "qAcc": whole(pairs, "question")}
    return {"score": sum(found.values()) / 3, **found, "left_out": len(rows) - len(pairs)}


def _is_unseen(row: Row) -> bool:
    """Whether it asks about a figure that is not shown."""
    return row.facts["category"] == "VS" and row.facts["figure"] == "0"


BENCHMARK = Benchmark(
    name="hallusionbench", title="HallusionBench", files=_FILES, where=_WHERE, sets={951: "with an image", 1129: "all"},
    digests={"0c23ac0d": ""}, load=lambda path, images: tables.load(path, _FILES, images, _row, _WHERE),
    put=wording.unchanged, official=_official, kit=rules.agreement, metrics=_metrics,
)  # fmt: skip
