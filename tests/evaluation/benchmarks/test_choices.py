"""V* and CV-Bench-2D, whose authors' scorers read no text: formats, the letter of a reply, and their means."""

from __future__ import annotations

import math

import pytest

from capcur_jax.errors import InputError
from capcur_jax.evaluation.benchmarks import cvbench_2d, vstar
from capcur_jax.evaluation.benchmarks.base import Row
from tests.evaluation.benchmarks.extended_fixtures import (
    cell,
    credit,
    image,
    picture,
    table,
    verdicts,
    withstand,
    written,
)

V, CV = vstar.BENCHMARK, cvbench_2d.BENCHMARK
ROW = Row("0", "?", ("B",), options={"A": "rubber", "B": "cotton"}, facts={"complete": True, "category": "x"})


def test_vstar_in_both_formats(tmp_path):
    closing = "\nAnswer with the option's letter from the given choices directly."
    text = "What is the glove made of?\n(A) rubber\n(B) cotton" + closing
    rows = [
        {"image": "direct_attributes/sa_1.jpg", "text": text, "category": "direct_attributes", "question_id": "0",
         "label": "B"},
        {"image": "relative_position/sa_2.jpg", "text": "Is it left?\n(A) left\n(B) right" + closing,
         "category": "relative_position", "question_id": "1", "label": "A"},
    ]  # fmt: skip
    for row in rows:
        image(tmp_path / "own" / row["image"])
    written(tmp_path / "own" / "test_questions.jsonl", rows)
    mine = V.load(tmp_path / "own", tmp_path / "unpacked")
    assert mine[0].options == {"A": "rubber", "B": "cotton"} and V.put(mine[0]) == text
    cells = [
        {"index": 0, "image": cell(), "question": "What is the glove made of?", "A": "rubber", "B": "cotton",
         "answer": "B", "category": "direct_attributes"},
        {"index": 1, "image": cell(1), "question": "Is it left?", "A": "left", "B": "right", "C": "None", "answer": "A",
         "category": "relative_position"},
    ]  # fmt: skip
    kit = V.load(table(tmp_path / "VStarBench.tsv", cells), tmp_path / "unpacked")
    assert kit[1].options["C"] == "None"  # a text, and an option
    assert [(row.index, row.gold, row.facts["category"]) for row in mine] == [
        (row.index, row.gold, row.facts["category"]) for row in kit
    ]
    found = V.metrics(mine, verdicts(1, 0), "kit")
    assert found == {"score": 50, "categories": {"direct_attributes": 100, "relative_position": 0}}


def cv(number: int, source: str, kind: str = "2D", **more) -> dict:
    return {
        "idx": number, "type": kind, "task": "Count", "question": "How many?", "choices": ["3", "2", "1"],
        "answer": "(B)", "prompt": "How many? Select from the following choices.\n(A) 3\n(B) 2\n(C) 1",
        "filename": f"img/2D/{number}.png", "source": source, **more,
    }  # fmt: skip


def test_cv_bench_in_both_formats(tmp_path):
    rows = [cv(0, "ADE20K"), cv(1, "COCO"), cv(2, "COCO"), cv(3, "Omni3D", "3D")]
    for row in rows:
        image(tmp_path / "own" / row["filename"])
    written(tmp_path / "own" / "test.jsonl", rows)
    mine = CV.load(tmp_path / "own", tmp_path / "unpacked")
    assert len(mine) == 3 and mine.left_out == {"of CV-Bench-3D": 1}
    rows = [cv(0, "ADE20K", image={"bytes": picture(), "path": None})]
    parquet = CV.load(written(tmp_path / "test_2d.parquet", rows), tmp_path / "unpacked")
    cells = [
        {"index": number, "image": cell(), "question": "How many?", "A": "3", "B": "2", "C": "1", "answer": "B",
         "prompt": rows[0]["prompt"], "source": source, "task": "Count", "split": "2D"}
        for number, source in enumerate(("ADE20K", "COCO", "COCO"))
    ]  # fmt: skip
    kit = CV.load(table(tmp_path / "CV-Bench-2D.tsv", cells), tmp_path / "unpacked")
    for one, other in zip(mine, kit, strict=True):
        assert (one.question, one.gold, one.options, one.facts) == (
            other.question,
            other.gold,
            other.options,
            other.facts,
        )
    assert parquet[0].question == kit[0].question == CV.put(kit[0])
    found = CV.metrics(kit, verdicts(1, 1, 0), "official")
    assert found["score"] == 75 and found["ADE20K"] == 100 and math.isclose(found["tasks"]["Count"], 200 / 3)


@pytest.mark.parametrize("text,official,kit", [
    ("B", 1, 1), ("(B)", 1, 1), ("b", 1, "letter"), ("**B**", 1, 1), ("A", 0, 0),
    ("Answer: B. Because it is soft and warm", 1, "letter"),
    ("cotton", "letter", 1), ("It is cotton.", "letter", 1), ("A or B", "letter", "letter"),
    ("A glove made of cotton", "letter", 1), ("", "letter", "letter"),
    ("Z", "letter", 0),
])  # fmt: skip
def test_the_letter_of_a_reply(text, official, kit):
    assert (credit(V, ROW, text, "official"), credit(CV, ROW, text, "kit")) == (official, kit)


def test_what_a_judge_extracted():
    assert [credit(V, ROW, "hm", "official", said) for said in ("B", "A", "none")] == [1, 0, 0]


def test_hostile_replies():
    withstand(V, ROW)


def test_a_gold_that_is_no_option_is_named(tmp_path):
    with pytest.raises(InputError, match=r"row 1: the right answer 'D' is none of A, B"):
        cells = [{"index": 0, "image": cell(), "question": "?", "A": "1", "B": "2", "answer": "D", "category": "x"}]
        V.load(table(tmp_path / "VStarBench.tsv", cells), None)
