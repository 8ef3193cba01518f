"""DynaMath: both published formats, the two ways in which its short answer is read, average and worst case."""

from __future__ import annotations

import json
import math

import pytest

from capcur_jax.errors import InputError
from capcur_jax.evaluation.benchmarks.base import Row
from capcur_jax.evaluation.benchmarks.dynamath import BENCHMARK
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


def _question(question: str, answer: str, kind: str, subject: str, level: str) -> dict:
    return {"question": question, "answer": answer, "answer_type": kind, "subject": subject, "level": level}


QUESTIONS = {
    "1": _question("How long is the dark line?", "2.0944", "float", "algebra", "high school"),
    "2": _question("Is it even? choice: (A) yes (B) no", "B", "multiple choice", "arithmetic", "elementary school"),
    "3": _question("Which month is hottest?", "May", "text", "statistics", "elementary school"),
}


def row(kind: str, gold: str) -> Row:
    return Row("1", "?", (gold,), facts={"kind": kind, "seed": "1", "subject": "", "level": ""})


def reply(answer: object) -> str:
    return (
        "Let me see.\n"
        + json.dumps({"solution": "by steps", "short answer": answer}, indent=1, ensure_ascii=False)
        + "\nDone."
    )


def test_all_formats_give_the_same_rows(tmp_path):
    cells = [
        {"index": number, "image": cell(number), "varid": variant, "qid": seed, "question": value["question"],
         "answer": value["answer"], "answer_type": value["answer_type"], "subject": value["subject"],
         "knowledge_level": value["level"]}
        for number, (variant, seed, value) in enumerate(
            (variant, seed, value) for variant in (1, 2) for seed, value in QUESTIONS.items())
    ]  # fmt: skip
    kit = BENCHMARK.load(table(tmp_path / "DynaMath.tsv", cells), tmp_path / "unpacked")
    for variant in (1, 2):
        folder = tmp_path / "own" / f"trial{variant}"
        rows = {seed: value | {"image": f"image/image{seed}.png"} for seed, value in QUESTIONS.items()}
        written(folder / "dataset.json", rows)
        for seed in QUESTIONS:
            image(folder / "image" / f"image{seed}.png", variant)
        rows = [
            {"id": seed, "image": f"images/{seed}.png", "decoded_image": {"bytes": picture(variant), "path": None},
             "question": value["question"], "ground_truth": value["answer"], "answer_type": value["answer_type"],
             "subject": value["subject"], "knowledge_level": value["level"]}
            for seed, value in QUESTIONS.items()
        ]  # fmt: skip
        written(tmp_path / "parquet" / "data" / f"sample_variant{variant}-00000-of-00001.parquet", rows)
    for folder in ("own", "parquet"):
        rows = BENCHMARK.load(tmp_path / folder, tmp_path / "unpacked")
        assert [one.index for one in rows] == ["1_1", "2_1", "3_1", "1_2", "2_2", "3_2"]
        for mine, theirs in zip(rows, kit, strict=True):
            assert (mine.question, mine.gold, mine.cluster) == (theirs.question, theirs.gold, theirs.cluster)
            assert mine.facts == theirs.facts
            assert mine.images[0].read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert [one.index for one in kit] == list("012345")
    assert all(one.cluster == one.facts["seed"] for one in kit)


@pytest.mark.parametrize("kind,gold,answer,right", [
    ("float", "2.0944", "2.094", 1), ("float", "2.0944", "2.096", 0), ("float", "6.2832", "2π", 1),
    ("float", "3.1416", "1.0π cm", 1), ("float", "9.4248", "3π/1", 1), ("float", "12", "12 cm", 1),
    ("float", "12", "12cm", 0),
    ("float", "0.5", "1/2", 0), ("float", "3.1416", "π", 0), ("float", "1000", "1,000", 0), ("float", "12", "nan", 0),
    ("float", "12", "²", 0), ("float", "-9", "-9.0005", 1), ("float", "12", "1.2e1", 1), ("float", "12", "", 0),
    ("multiple choice", "B", "B", 1), ("multiple choice", "B", "(B) no", 1), ("multiple choice", "B", "A", 0),
])  # fmt: skip
def test_numbers_and_letters_are_right_in_both(kind, gold, answer, right):
    assert credit(BENCHMARK, row(kind, gold), reply(answer), "official") == right
    if answer not in ("12cm", "1/2", "π", "1,000", "²", ""):  # what isn't read is no wrong answer to the kit yet
        assert credit(BENCHMARK, row(kind, gold), reply(answer), "kit") == right
    else:
        assert credit(BENCHMARK, row(kind, gold), reply(answer), "kit") == "extract"
        assert credit(BENCHMARK, row(kind, gold), reply(answer), "kit", extracted=gold) == 1
        assert credit(BENCHMARK, row(kind, gold), reply(answer), "kit", extracted="none") == 0


def test_texts_are_compared_the_other_way_round():
    """The official scorer looks for the right answer in the reply's, the kit for the reply's in the right one."""
    may = row("text", "In May")
    assert [credit(BENCHMARK, may, reply("In May, I think"), mode) for mode in ("official", "kit")] == [1, 0]
    assert [credit(BENCHMARK, may, reply("may"), mode) for mode in ("official", "kit")] == [0, 1]
    assert [credit(BENCHMARK, may, reply(""), mode) for mode in ("official", "kit")] == [0, 0]  # "" is in every text


def test_a_number_without_quotes_is_read_by_the_official_scorer_alone():
    assert credit(BENCHMARK, row("float", "5"), reply(5), "official") == 1
    assert credit(BENCHMARK, row("float", "5"), reply(5), "kit") == "extract"
    assert credit(BENCHMARK, row("float", "5"), reply(5), "kit", extracted="5.000") == 1


def test_backslashes_go_before_json_is_read():
    """Both scorers do it, so that an escaped letter is none and a formula is broken."""
    for mode in ("official", "kit"):
        escaped = credit(BENCHMARK, row("float", "6.2832"), r'{"short answer": "2\u03c0"}', mode)
        assert escaped == (0 if mode == "official" else "extract")
        assert credit(BENCHMARK, row("text", "frac12"), r'{"short answer": "\frac12"}', mode) == 1


def test_a_box_breaks_the_json():
    boxed = reply("5") + r" So it is \boxed{5}."
    assert credit(BENCHMARK, row("float", "5"), boxed, "official") == 0
    assert credit(BENCHMARK, row("float", "5"), boxed, "kit") == "extract"
    assert credit(BENCHMARK, row("float", "5"), r"\boxed{5}", "official") == 0


def test_without_json():
    """The official scorer takes the last line less its last character; a number alone is JSON of another kind."""
    five = row("float", "5")
    assert credit(BENCHMARK, five, "It is so.\n5.", "official") == 1
    assert credit(BENCHMARK, five, "It is so.\n5", "official") == 0
    assert credit(BENCHMARK, five, "5", "official") == 0
    assert credit(BENCHMARK, five, "5", "kit") == 1  # the whole reply is a number
    assert credit(BENCHMARK, row("multiple choice", "B"), "Thinking of it, B.", "official") == 0
    assert credit(BENCHMARK, row("multiple choice", "B"), "B.", "official") == 1


def test_several_letters_are_the_judges():
    assert credit(BENCHMARK, row("multiple choice", "B"), reply("A or B"), "kit") == "extract"
    assert credit(BENCHMARK, row("multiple choice", "B"), reply("b"), "kit") == 1
    assert credit(BENCHMARK, row("multiple choice", "B"), reply("b"), "official") == 0


@pytest.mark.parametrize("kind,gold", [("float", "5"), ("multiple choice", "B"), ("text", "May")])
def test_hostile_replies(kind, gold):
    withstand(BENCHMARK, row(kind, gold))


def test_the_worst_case_is_of_seeds():
    facts = {"kind": "float", "subject": "algebra", "level": "high school"}
    places = [(str(seed), variant) for seed in (1, 2, 3) for variant in range(1, 11)]
    rows = [Row(f"{seed}_{variant}", "?", ("1",), facts=facts | {"seed": seed}) for seed, variant in places]
    found = BENCHMARK.metrics(rows, verdicts(*[1] * 10, *[1] * 9, 0, *[0] * 10), "kit")
    assert math.isclose(found["average"], 100 * 19 / 30) and math.isclose(found["worst_case"], 100 / 3)
    assert found["score"] == found["average"] and found["subjects"] == {"algebra": found["average"]}


def test_the_question_says_what_form_the_answer_has():
    put = {kind: BENCHMARK.put(row(kind, "1")) for kind in ("float", "multiple choice", "text")}
    assert all("solution" in text and "short answer" in text for text in put.values())
    assert "three decimals" in put["float"] and "letter" in put["multiple choice"] and len(set(put.values())) == 3


def test_an_unknown_kind_of_answer_is_named(tmp_path):
    rows = [
        {"index": 0, "image": cell(), "question": "?", "answer": "1", "answer_type": "integer", "qid": 1, "varid": 1}
    ]
    with pytest.raises(InputError, match=r"row 1: `answer_type` 'integer' is none of"):
        BENCHMARK.load(table(tmp_path / "DynaMath.tsv", rows), tmp_path)
