"""ChartQA: numbers within 5 %, the percent sign, texts, and its two halves."""

from __future__ import annotations

import math

import pytest

from capcur_jax.evaluation.benchmarks.base import Row
from capcur_jax.evaluation.benchmarks.chartqa import BENCHMARK
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


def test_all_formats_give_the_same_rows(tmp_path):
    own = tmp_path / "own"
    for name in ("human", "augmented"):
        rows = [{"imgname": f"{name}.png", "query": f"How many, {name}?", "label": "14"}]
        written(own / f"test_{name}.json", rows)
        image(own / "png" / f"{name}.png")
    mine = BENCHMARK.load(own, tmp_path / "unpacked")
    assert [(row.index, row.facts["split"], row.images[0].name) for row in mine] == [
        ("0", "augmented", "augmented.png"), ("1", "human", "human.png"),
    ]  # fmt: skip
    rows = [
        {"query": f"How many, {name}?", "label": ["14"], "human_or_machine": kind, "image": {"bytes": picture()}}
        for kind, name in ((1, "augmented"), (0, "human"))
    ]  # fmt: skip
    parquet = BENCHMARK.load(written(tmp_path / "test-00000.parquet", rows), tmp_path / "unpacked")
    cells = [
        {"index": number, "image": cell(), "question": f"How many, {name}?", "answer": "14", "split": f"test_{name}"}
        for number, name in enumerate(("augmented", "human"))
    ]
    kit = BENCHMARK.load(table(tmp_path / "ChartQA_TEST.tsv", cells), tmp_path / "unpacked")
    for rows in (parquet, kit):
        assert [(row.question, row.gold, row.facts) for row in rows] == [
            (row.question, row.gold, row.facts) for row in mine
        ]


@pytest.mark.parametrize("gold,texts", [
    ("['14', '15']", ("14", "15")), ("[2014, 2015]", ("2014", "2015")), ("[Yes, No]", ("[Yes, No]",)),
    ("14", ("14",)),
])  # fmt: skip
def test_golds_in_brackets(tmp_path, gold, texts):
    cells = [{"index": 0, "image": cell(), "question": "?", "answer": gold, "split": "test_human"}]
    assert BENCHMARK.load(table(tmp_path / "ChartQA_TEST.tsv", cells), None)[0].gold == texts


@pytest.mark.parametrize("gold,text,right", [
    ("100", "105", 1), ("100", "95", 1), ("100", "105.1", 0), ("100", "-100", 0), ("-100", "-96", 1),
    ("45%", "0.45", 1),
    ("45%", "45%", 1), ("45%", "45", 0), ("45", "45%", 0), ("0", "0", 1), ("0", "0.0", 0), ("0", "0.001", 0),
    ("Yes", "yes", 1),
    ("Yes", "yes.", 0), ("14", "14 people", 0), ("1e2", "100", 1), ("100", "nan", 0), ("100", "inf", 0),
    ("100", "", 0), ("%", "%", 1),
    ("3.5", "3,5", 0), ("1000", "1,000", 0), ("2014", "2100", 1),
])  # fmt: skip
def test_relaxed(gold, text, right):
    for mode in ("official", "kit"):
        assert credit(BENCHMARK, Row("0", "?", (gold,)), text, mode) == right


def test_the_kit_takes_off_blanks_and_the_best_gold_counts():
    assert [credit(BENCHMARK, Row("0", "?", ("Yes",)), " yes\n", mode) for mode in ("official", "kit")] == [0, 1]
    assert credit(BENCHMARK, Row("0", "?", ("red", "10")), "10.2", "official") == 1


def test_hostile_replies():
    withstand(BENCHMARK, Row("0", "?", ("100", "Yes")))


def test_the_halves_weigh_the_same_in_the_official_score():
    rows = [
        Row(str(n), "?", ("1",), facts={"split": split}) for n, split in enumerate(("human", "augmented", "augmented"))
    ]
    official, kit = (BENCHMARK.metrics(rows, verdicts(1, 0, 0), mode) for mode in ("official", "kit"))
    assert official == {"score": 50, "human": 100, "augmented": 0} and math.isclose(kit["score"], 100 / 3)
