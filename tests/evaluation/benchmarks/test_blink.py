"""BLINK: both formats, the authors' way to read a reply, and two means."""

from __future__ import annotations

import math

import pytest

from capcur_jax.errors import InputError
from capcur_jax.evaluation.benchmarks.base import Row
from capcur_jax.evaluation.benchmarks.blink import BENCHMARK
from tests.evaluation.benchmarks.extended_fixtures import cell, credit, picture, table, verdicts, withstand, written

OPTIONS = {"A": "the first image", "B": "the second image"}
ROW = Row("val_Jigsaw_1", "Which?", ("B",), options=OPTIONS, facts={"task": "Jigsaw", "complete": True})


def own(task: str, number: int, answer: str = "(B)", images: int = 2) -> dict:
    pictures = {f"image_{place}": {"bytes": picture(place), "path": None} for place in range(1, images + 1)}
    pictures |= {f"image_{place}": None for place in range(images + 1, 5)}
    return {
        "idx": f"val_{task}_{number}", "question": "Which?", "sub_task": task, "answer": answer, **pictures,
        "choices": list(OPTIONS.values()),
        "prompt": "Which?\nSelect from the following choices.\n(A) the first image\n(B) the second image",
    }  # fmt: skip


def test_both_formats_give_the_same_rows(tmp_path):
    for task in ("Jigsaw", "IQ_Test"):
        written(tmp_path / "own" / task / "val-00000-of-00001.parquet", [own(task, number) for number in (1, 2)])
    mine = BENCHMARK.load(tmp_path / "own", tmp_path / "unpacked")
    assert [row.index for row in mine] == ["val_IQ_Test_1", "val_IQ_Test_2", "val_Jigsaw_1", "val_Jigsaw_2"]
    images = repr([cell(1), cell(2)])
    cells = [
        OPTIONS | {"index": number, "image": images, "question": "Which?", "category": task, "answer": "B"}
        for number, task in enumerate(("IQ_Test", "IQ_Test", "Jigsaw", "Jigsaw"))
    ]
    kit = BENCHMARK.load(table(tmp_path / "BLINK.tsv", cells), tmp_path / "unpacked")
    for one, other in zip(mine, kit, strict=True):
        assert (one.gold, one.options, one.facts["task"]) == (other.gold, other.options, other.facts["task"])
        assert [path.read_bytes() for path in one.images] == [path.read_bytes() for path in other.images]
        assert [path.read_bytes() for path in one.images] == [picture(1), picture(2)]  # in order
    assert BENCHMARK.put(mine[0]) == own("IQ_Test", 1)["prompt"] and "B. the second image" in BENCHMARK.put(kit[0])


def test_hidden_answers_are_refused(tmp_path):
    with pytest.raises(InputError, match="answers of BLINK's test split are not published"):
        BENCHMARK.load(written(tmp_path / "test-0.parquet", [own("Jigsaw", 1, "hidden")]), tmp_path)


def test_the_old_table_is_known_as_such():
    assert "wrong" in BENCHMARK.digests["3b6649b6"] and BENCHMARK.digests["d5e8af14"] == ""


@pytest.mark.parametrize("text,found", [
    ("B", 1), ("(B)", 1), ("A", 0), ("E", 0), ("(E)", 0), ("It is (B) the second image", 1), ("b", "letter"),
    ("B.", "letter"), ("(B).", "letter"),
    ("(A) and (B)", "letter"), ("(A) is left, (B) is right.\n\nI take (B) here", 1), ("(A)\n\nNone", 0),
    ("(A) (B)\n\nNone", "letter"),
    ("", "letter"), (" B", "letter"), ("(A) or (B)\n\n(A) or (B)", "letter"), ("(B) or (C)", 1),
])  # fmt: skip
def test_the_official_reading(text, found):
    assert credit(BENCHMARK, ROW, text, "official") == found


@pytest.mark.parametrize("said,right", [("(B)", 1), ("B", 1), ("(A)", 0), ("Z", 0), ("(B) the second", 0), ("", 0)])
def test_what_a_judge_extracted_counts_word_for_word(said, right):
    assert credit(BENCHMARK, ROW, "the right one", "official", said) == right


def test_the_kit_reads_a_letter_among_the_last_words():
    assert credit(BENCHMARK, ROW, "The answer is B.", "kit") == 1
    assert credit(BENCHMARK, ROW, "The second image", "kit") == 1
    assert credit(BENCHMARK, ROW, "B is right because of its edges", "kit") == "letter"


def test_hostile_replies():
    withstand(BENCHMARK, ROW)


def test_tasks_weigh_the_same_in_the_official_score():
    tasks = "Jigsaw", "Counting", "Counting"
    rows = [Row(str(number), "?", ("A",), facts={"task": task}) for number, task in enumerate(tasks)]
    official, kit = (BENCHMARK.metrics(rows, verdicts(1, 0, 0), mode) for mode in ("official", "kit"))
    assert official["score"] == 50 and math.isclose(kit["score"], 100 / 3)
    assert official["tasks"] == {"Jigsaw": 100, "Counting": 0}
