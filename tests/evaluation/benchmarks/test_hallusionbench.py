"""HallusionBench: rows with and without an image, yes and no, and what counts as one figure or one question."""

from __future__ import annotations

import math

import pytest

from capcur_jax.errors import InputError
from capcur_jax.evaluation.benchmarks.base import NOTHING, Reply, Row
from capcur_jax.evaluation.benchmarks.hallusionbench import BENCHMARK
from capcur_jax.evaluation.scoring import score
from tests.evaluation.benchmarks.extended_fixtures import cell, credit, image, table, verdicts, withstand, written


def own(category: str, subcategory: str, figure: int, question: int, answer: str, seen: str = "1") -> dict:
    return {
        "category": category, "subcategory": subcategory, "visual_input": seen, "set_id": "0", "figure_id": str(figure),
        "sample_note": "", "question_id": str(question), "question": f"Is {figure} more than {question}?",
        "gt_answer": answer, "gt_answer_details": "It is so.",
        "filename": f"./hallusion_bench/{category}/{subcategory}/0_{figure}.png" if seen != "0" else None,
    }  # fmt: skip


OWN = [
    own("VD", "ocr", 0, 0, "1"), own("VD", "ocr", 0, 1, "0"), own("VD", "ocr", 1, 0, "0"), own("VD", "ocr", 1, 1, "1"),
    own("VS", "ocr", 0, 0, "1", "0"), own("VS", "ocr", 1, 0, "1"), own("VS", "ocr", 2, 0, "0", "2"),
]  # fmt: skip


@pytest.fixture
def rows(tmp_path):
    for value in OWN:
        if value["filename"]:
            image(tmp_path / value["filename"])
    return BENCHMARK.load(written(tmp_path / "HallusionBench.json", OWN), tmp_path / "unpacked")


def kit_row(number: int, value: dict) -> dict:
    places = f"{value['set_id']}_{value['figure_id']}_{value['question_id']}"
    return {
        "index": f"hallusion_{value['category']}_{value['subcategory']}_{places}", "image": cell(number),
        "question": value["question"], "answer": "Yes" if value["gt_answer"] == "1" else "No",
        "category": value["category"], "l2-category": f"{value['category']}_{value['subcategory']}",
    }  # fmt: skip


def test_both_formats_give_the_same_rows(rows, tmp_path):
    seen = [value for value in OWN if value["visual_input"] != "0"]
    cells = [kit_row(number, value) for number, value in enumerate(seen)]
    kit = BENCHMARK.load(table(tmp_path / "HallusionBench.tsv", cells), tmp_path / "unpacked")
    mine = [row for row in rows if row.facts["seen"]]
    assert [row.index for row in rows] == list("0123456") and rows[4].images == ()
    for one, other in zip(mine, kit, strict=True):
        assert (one.question, one.gold, one.cluster) == (other.question, other.gold, other.cluster)
        shared = ("category", "subcategory", "set", "figure", "question", "seen")
        assert [one.facts[key] for key in shared] == [other.facts[key] for key in shared]
        assert len(one.images) == len(other.images) == 1
    assert BENCHMARK.put(rows[0]) == "Is 0 more than 0?"  # nothing is appended


def test_figures_and_questions_count_as_a_whole(rows):
    found = BENCHMARK.metrics(rows, verdicts(1, 1, 1, 0, 0, 1, 1), "kit")
    # Without the row that has no image: figures VD 0 (both right), VD 1, VS 1, VS 2; questions VD 0, VD 1, VS 0.
    assert math.isclose(found["aAcc"], 100 * 5 / 6) and found["fAcc"] == 75 and math.isclose(found["qAcc"], 100 * 2 / 3)
    assert found["left_out"] == 1
    assert math.isclose(found["score"], (found["aAcc"] + found["fAcc"] + found["qAcc"]) / 3)
    found = BENCHMARK.metrics(rows, verdicts(1, 1, 1, 0, 0, 1, 1), "official")
    # With it: it is no figure, but its question is not right with every picture any more.
    assert math.isclose(found["aAcc"], 100 * 5 / 7) and found["fAcc"] == 75 and math.isclose(found["qAcc"], 100 / 3)
    assert found["left_out"] == 0


def test_equal_numbers_in_two_subcategories_are_two_figures():
    """VD and VS both have a subcategory ocr with set 0, figure 1."""
    found = [BENCHMARK.metrics(_ocr(), verdicts(1, 0), mode)["fAcc"] for mode in ("official", "kit")]
    assert found == [50, 50]


def _ocr():
    shared = {"set": "0", "figure": "1", "question": "0", "seen": True}
    return [
        Row(name, "?", ("Yes",), facts=shared | {"category": name, "subcategory": f"{name}_ocr"})
        for name in ("VD", "VS")
    ]


@pytest.mark.parametrize("text,found", [
    ("Yes", 1), ("Yes, it is.", 1), ("No.", 0), ("yes and no", "yes_no"), ("Notice the yes-men", "yes_no"),
    ("", "yes_no"),
    (r"\boxed{\text{Yes}}", 1), ("**Yes**", "yes_no"), ("I cannot say", "yes_no"),
])  # fmt: skip
def test_replies(rows, text, found):
    for mode in ("official", "kit"):
        if text != "Notice the yes-men":
            assert credit(BENCHMARK, rows[0], text, mode) == found
        else:  # "no" in "notice" is none, "yes" before a hyphen is one
            assert credit(BENCHMARK, rows[0], text, mode) == 1


def test_what_a_judge_extracted(rows):
    for said, right in (("Yes", 1), ("no", 0), ("1", 1), ("0", 0), ("Unknown", 0), ("2", 0)):
        assert credit(BENCHMARK, rows[0], "hm", "official", said) == right
    assert credit(BENCHMARK, rows[0], "hm", "kit", "Yes") == 1
    assert credit(BENCHMARK, rows[0], "No", "kit", "Yes") == 0  # the rule comes first


def test_unclear_is_right_without_a_figure(rows):
    unseen, shown = rows[4], rows[5]
    assert credit(BENCHMARK, unseen, "hm", "official", "unclear") == 1
    assert credit(BENCHMARK, unseen, "No", "official") == 0
    assert credit(BENCHMARK, shown, "hm", "official", "unclear") == 0


def test_a_judge_who_finds_no_answer(rows):
    class Judge:
        def decide_all(self, asks):
            return [NOTHING] * len(asks)

    replies = [Reply("hm")] * len(rows)
    for mode, right in (("official", {"4"}), ("kit", set())):
        found = score(BENCHMARK, rows, replies, mode, judge=Judge())
        assert {row.index for row, one in zip(rows, found.verdicts, strict=True) if one.credit} == right
        assert {one.by for one in found.verdicts} == {"judge"}


def test_hostile_replies(rows):
    withstand(BENCHMARK, rows[0])


def test_bad_rows_are_named(tmp_path):
    cells = [kit_row(0, OWN[0]) | {"index": "7"}]
    with pytest.raises(InputError, match=r"row 1: index '7' has no set, figure and question"):
        BENCHMARK.load(table(tmp_path / "HallusionBench.tsv", cells), tmp_path)
    with pytest.raises(InputError, match=r"row 1: the right answer '2' is none of yes, no"):
        BENCHMARK.load(written(tmp_path / "HallusionBench.json", [OWN[0] | {"gt_answer": "2"}]), None)
