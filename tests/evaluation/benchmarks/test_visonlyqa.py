"""VisOnlyQA: the kit's table, the authors' files, and the real ones of CAPCUR_PUBLIC_DATA."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from capcur_jax.errors import InputError
from capcur_jax.evaluation.benchmarks.base import Row
from capcur_jax.evaluation.benchmarks.visonlyqa import BENCHMARK
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

NO_REASONING = "\n\nYour response should only include the final answer ({}). Do not include any reasoning."
CHOICE = {
    "image_path": "images/CLEVR/one.png", "question": None, "answer": "c", "prompt_reasoning": None,
    "prompt_no_reasoning": "The cube is X times taller. (a) 0.5 (b) 1 (c) 2 " + NO_REASONING.format("a, b, c"),
    "image_category": "3d", "task_category": "size", "question_type": "single_answer",
    "response_options": ["a", "b", "c"], "source": "CLEVR", "id": "one",
}  # fmt: skip
TRUTH = CHOICE | {
    "answer": "False", "response_options": ["True", "False"], "id": "two", "image_path": "images/S/two.png",
    "prompt_no_reasoning": "There is no triangle ABC. True or False?" + NO_REASONING.format("True, False"),
}  # fmt: skip
SEVERAL = CHOICE | {
    "answer": "a,c", "question_type": "multiple_answers", "id": "three",
    "prompt_no_reasoning": "Which have a ring? (a) one (b) two (c) three " + NO_REASONING.format("a, b, c"),
}  # fmt: skip


@pytest.fixture
def rows(tmp_path):
    folder = tmp_path / "own"
    for split, kind, row in (
        ("synthetic", "3d__size", CHOICE), ("synthetic", "syntheticgeometry__triangle", TRUTH),
        ("real", "chemistry__shape_multi", SEVERAL), ("synthetic_with_text", "text_3d__size", CHOICE),
    ):  # fmt: skip
        written(folder / split / f"{kind}.jsonl", [row])
    for name in ("CLEVR/one.png", "S/two.png"):
        image(folder / "images" / name)
    return BENCHMARK.load(folder, tmp_path / "unpacked")


def test_the_authors_files(rows, tmp_path):
    assert {row.index: row.facts["split"] for row in rows} == {
        "three": "Eval_Real", "one": "Eval_Synthetic", "two": "Eval_Synthetic",
    }  # fmt: skip
    by_id = {row.index: row for row in rows}
    assert by_id["one"].options == {"a": "0.5", "b": "1", "c": "2"} and by_id["one"].gold == ("c",)
    assert by_id["two"].options == {"True": "True", "False": "False"}
    assert by_id["one"].images[0].name == "one.png" and BENCHMARK.put(by_id["one"]) == CHOICE["prompt_no_reasoning"]
    twin = BENCHMARK.load(tmp_path / "own" / "synthetic_with_text" / "text_3d__size.jsonl", tmp_path / "unpacked")
    assert twin[0].facts["category"] == "text_3d__size" and twin[0].images == by_id["one"].images
    value = CHOICE | {"decoded_image": {"bytes": picture(), "path": None}}
    parquet = BENCHMARK.load(written(tmp_path / "hf" / "3d__size-0-of-1.parquet", [value]), tmp_path / "unpacked")
    assert (parquet[0].options, parquet[0].facts) == (by_id["one"].options, by_id["one"].facts)


def test_the_kits_table(tmp_path):
    cells = [
        {"index": 0, "image": cell(), "question": "The cube is X times taller.", "A": "0.5", "B": "1", "C": "2",
         "answer": "C", "split": "Eval_Synthetic", "category": "3d__size"},
        {"index": 1, "image": cell(), "question": "There is no triangle ABC.", "A": "The statement is true",
         "B": "The statement is false", "answer": "B", "split": "Eval_Real", "category": "geometry__triangle"},
    ]  # fmt: skip
    kit = BENCHMARK.load(table(tmp_path / "VisOnlyQA-VLMEvalKit.tsv", cells), tmp_path / "unpacked")
    assert [list(row.options) for row in kit] == [["A", "B", "C"], ["A", "B"]]
    assert kit[0].cluster == kit[1].cluster != ""  # one picture
    assert "C. 2" in BENCHMARK.put(kit[0])
    for mode in ("official", "kit"):
        assert credit(BENCHMARK, kit[0], "C", mode) == 1 and credit(BENCHMARK, kit[1], "A", mode) == 0
    found = BENCHMARK.metrics(kit, verdicts(1, 0), "kit")
    assert found["score"] == 50 and found["splits"] == {"Eval_Synthetic": 100, "Eval_Real": 0}


@pytest.mark.parametrize("text,found", [
    ("c", 1), ("(c)", 1), ("b", 0), ("(c) since (a) is not", "extract"), ("(b) is better", 0), ("a cat", "extract"),
    ("C", "extract"),
    ("2", "extract"), ("", "extract"),
])  # fmt: skip
def test_the_official_reading(rows, text, found):
    (one,) = (row for row in rows if row.index == "one")
    assert credit(BENCHMARK, one, text, "official") == found
    assert credit(BENCHMARK, one, "?", "official", " c ") == 1 and credit(BENCHMARK, one, "?", "official", "none") == 0


def test_true_and_false(rows):
    (two,) = (row for row in rows if row.index == "two")
    for mode in ("official", "kit"):
        assert [credit(BENCHMARK, two, text, mode) for text in ("False", "True", "The answer is False.")] == [1, 0, 1]
    assert credit(BENCHMARK, two, "True or False", "official") == "extract"
    assert credit(BENCHMARK, two, "True or False", "kit") == "letter"


def test_several_right_options(rows):
    """The kit has no such rows: its score leaves them out and says how many."""
    (three,) = (row for row in rows if row.index == "three")
    assert credit(BENCHMARK, three, "a, c", "official") == "extract"
    assert [credit(BENCHMARK, three, "?", "official", said) for said in ("a, c", "a", "c,a")] == [1, 0, 0]
    official, kit = (BENCHMARK.metrics(rows, verdicts(1, 1, 0), mode) for mode in ("official", "kit"))
    assert kit["left_out"] == 1 and official["left_out"] == 0
    assert official["score"] != kit["score"] and "Eval_Real" not in kit["splits"]


def test_a_gold_that_is_no_option_is_named(tmp_path):
    with pytest.raises(InputError, match=r"'d' is none of a, b, c"):
        BENCHMARK.load(written(tmp_path / "3d__size.jsonl", [CHOICE | {"answer": "d"}]), None)


def test_hostile_replies(rows):
    for row in rows:
        withstand(BENCHMARK, row)


def test_the_real_files():
    folder = Path(os.environ.get("CAPCUR_PUBLIC_DATA", "")) / "visonlyqa"
    if not os.environ.get("CAPCUR_PUBLIC_DATA") or not folder.is_dir():
        pytest.skip("CAPCUR_PUBLIC_DATA names no folder with visonlyqa")
    rows = BENCHMARK.load(folder, folder)  # images lie beside: nothing is unpacked
    assert len(rows) == 140 and len({row.facts["category"] for row in rows}) == 7
    assert all(row.images and row.images[0].is_file() and row.facts["split"] == "Eval_Synthetic" for row in rows)
    for row in rows:
        assert all(text != name or name in ("True", "False") for name, text in row.options.items()), row.options
        assert credit(BENCHMARK, row, row.gold[0], "official") == credit(BENCHMARK, row, f"({row.gold[0]})", "kit") == 1
        other = next(name for name in row.options if name not in row.gold)
        assert credit(BENCHMARK, row, f"({other})", "official") == credit(BENCHMARK, row, other, "kit") == 0
    by_file = {path.stem: len(BENCHMARK.load(path, None)) for path in sorted((folder / "val").glob("*.jsonl"))}
    assert len(by_file) == 14 and set(by_file.values()) == {20}


def test_one_row_stands_for_both_formats():
    """A letter counts in the case in which the options have it."""
    upper = Row("0", "?", ("A",), options={"A": "x", "B": "y"}, facts={"several": False})
    assert credit(BENCHMARK, upper, "(a)", "official") == "extract" and credit(BENCHMARK, upper, "(A)", "official") == 1
