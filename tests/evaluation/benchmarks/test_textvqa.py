"""TextVQA: ten answers, ten ways to leave one out, and what the spelling of an answer may differ in."""

from __future__ import annotations

import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from capcur_jax.errors import InputError
from capcur_jax.evaluation.benchmarks import vqa_text
from capcur_jax.evaluation.benchmarks.base import Row
from capcur_jax.evaluation.benchmarks.textvqa import BENCHMARK
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

PEOPLE = ["nokia"] * 3 + ["Nokia."] * 2 + ["toyota"] * 2 + ["the phone", "unanswerable", "10"]


def test_all_formats_give_the_same_rows(tmp_path):
    question = {"question": "what brand is this?", "image_id": "0054c91397f2fe05", "question_id": 34602}
    rows = [question | {"answers": PEOPLE}, question | {"answers": PEOPLE, "question_id": 34603}]
    image(tmp_path / "own" / "train_images" / "0054c91397f2fe05.jpg")
    for name, indent in (("line", None), ("many lines", 1)):
        file = tmp_path / "own" / "TextVQA_0.5.1_val.json"
        file.write_text(json.dumps({"dataset_type": "val", "dataset_name": name, "data": rows}, indent=indent))
        own = BENCHMARK.load(tmp_path / "own", tmp_path / "unpacked")
        assert [row.index for row in own] == ["34602", "34603"]
        assert own[0].images[0].name == "0054c91397f2fe05.jpg" and own[0].cluster == own[1].cluster
        assert own[0].gold == tuple(PEOPLE)
    rows = [row | {"image": {"bytes": picture(), "path": None}} for row in rows]
    parquet = BENCHMARK.load(written(tmp_path / "validation-0.parquet", rows), tmp_path / "unpacked")
    cells = [{"index": 0, "image": cell(), "question": question["question"], "answer": repr(PEOPLE), "split": "val"}]
    kit = BENCHMARK.load(table(tmp_path / "TextVQA_VAL.tsv", cells), tmp_path / "unpacked")
    assert parquet[0].gold == kit[0].gold == own[0].gold and len(parquet[0].images) == len(kit[0].images) == 1
    assert BENCHMARK.load(tmp_path / "own", None)[0].images == ()  # scoring needs no pictures


def test_ten_answers_are_needed(tmp_path):
    cells = [{"index": 0, "image": cell(), "question": "?", "answer": repr(PEOPLE[:9])}]
    with pytest.raises(InputError, match=r"row 1: 9 answers where 10 belong"):
        BENCHMARK.load(table(tmp_path / "TextVQA_VAL.tsv", cells), None)


@pytest.mark.parametrize("same", range(11))
@pytest.mark.parametrize("mode", ["official", "kit"])
def test_each_person_is_left_out_once(same, mode):
    people = ["a nokia"] * same + [f"other {number}" for number in range(10 - same)]
    expected = 0.0
    for others in itertools.combinations(people, 9):
        expected += min(1, others.count("a nokia") / 3) / 10
    assert credit(BENCHMARK, Row("0", "?", tuple(people)), "Nokia", mode) == pytest.approx(expected)


@pytest.mark.parametrize("text,official,kit", [
    ("The  Nokia", "nokia", "nokia"), ("an apple and a pear", "apple and pear", "apple and pear"),
    ("Ten", "10", "10"),
    ("none", "0", "0"), ("dont", "don't", "don't"), ("couldntve", "couldntve", "couldntve"),
    ("couldnt've", "couldn't've", "couldn't've"),
    ("yalld've", "yalld've", "yalld've"), ("y'alld've", "y'all'd've", "y'all'd've"),
    ("'ows'at", "'ow's'at", "'ow's'at"),
    ("somebody'd", "somebodyd", "somebodyd"), ("well", "well", "well"), ("1,000", "1000", "1000"),
    ("1.5", "1.5", "1.5"),
    ("5.", "5", "5."), ("st. john", "st john", "st john"), ("a-b", "b", "b"), ("a - b", "b", "b"),
    ("x-ray", "x ray", "x ray"),
    ("x-ray, 1,000", "x ray 1000", "xray 1000"), ("mary's", "mary 's", "mary's"), ("yes!", "yes", "yes"),
    ("what?", "what", "what"),
    ("50%", "50%", "50%"), ("one\ntwo\tthree", "1 2 3", "1 2 3"), ("", "", ""), ("the", "", ""), ("...", "", ""),
])  # fmt: skip
def test_spellings(text, official, kit):
    assert (vqa_text.official(text), vqa_text.kit(text)) == (official, kit)


def test_the_number_of_full_stops_that_go():
    """The published call hands a flag over as the count: of a model that repeats itself 32 of them go."""
    assert vqa_text.official("stop" + "." * 32) == "stop"
    assert vqa_text.official("stop" + "." * 34) == "stop.."


@given(st.text(alphabet="ab1.,'-! \n", max_size=30))
def test_case_and_outer_blanks_play_no_part(text):
    for normalized in (vqa_text.official, vqa_text.kit):
        assert normalized(f"  {text.upper()} ".lower()) == normalized(text.strip())


def test_hostile_replies():
    withstand(BENCHMARK, Row("0", "?", tuple(PEOPLE)))


def test_the_score_is_the_mean():
    rows = [Row(str(number), "?", tuple(PEOPLE)) for number in range(3)]
    assert BENCHMARK.metrics(rows, verdicts(1, 0.3, 0.2), "kit") == {"score": 50}
