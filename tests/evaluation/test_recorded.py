from __future__ import annotations

import gzip
import json

import pytest

from capcur_jax.errors import InputError
from capcur_jax.evaluation import recorded
from capcur_jax.evaluation.benchmarks.base import Reply, Row
from tests.evaluation.published import lines, table, workbook

ROWS = [Row(str(index), "q", ("B",)) for index in (10, 11, 12)]


def made(tmp_path, rows):
    return recorded.read(lines(tmp_path / "p.jsonl", rows))


@pytest.mark.parametrize("text", ["None", "NA", "nan", "", "=1+2", 'a\tb\nc "d"', "5"])
def test_texts_come_back_from_every_kind_of_file(tmp_path, text):
    rows = [{"index": 1, "question": "q", "prediction": text, "answer": "B"}]
    (tmp_path / "list.json").write_text(json.dumps(rows))
    files = (
        lines(tmp_path / "a", rows),
        table(tmp_path / "b", rows),
        workbook(tmp_path / "c", rows),
        tmp_path / "list.json",
    )
    for file in files:
        (found,) = recorded.read(file)
        assert found.index == "1" and found.reply == Reply(text)


def test_indices_are_compared_as_text(tmp_path):
    found = made(tmp_path, [{"index": 11, "prediction": "b"}, {"index": "10", "prediction": "a"}])
    rows, replies, said = recorded.join(ROWS, found, tmp_path)
    assert [(row.index, reply.text) for row, reply in zip(rows, replies, strict=True)] == [("10", "a"), ("11", "b")]
    assert said == ["1 of 3 rows have no prediction: the score is of a subset"]


def test_numbers_of_rows_stand_in_for_indices(tmp_path):
    found = made(tmp_path, [{"index": number, "prediction": str(number)} for number in (2, 0, 1)])
    _, replies, said = recorded.join(ROWS, found, tmp_path)
    assert [reply.text for reply in replies] == ["0", "1", "2"] and "numbers from 0" in said[0]


def test_predictions_of_no_row_are_counted(tmp_path):
    found = made(tmp_path, [{"index": 10, "prediction": "a"}, {"index": 99, "prediction": "b"}])
    rows, _, said = recorded.join(ROWS, found, tmp_path)
    assert len(rows) == 1 and "1 predictions of no row of the data, not scored" in said
    with pytest.raises(InputError, match="none of 1 predictions"):
        recorded.join(ROWS, found[1:], tmp_path)


def test_predictions_beside_other_answers_are_of_another_file(tmp_path):
    data = [Row(str(index), "q", ("ABCD"[index % 4],)) for index in range(40)]
    rows = [{"index": index, "prediction": "A", "answer": "ABCD"[(index + 1) % 4]} for index in range(40)]
    with pytest.raises(InputError, match="40 of 40 predictions stand beside another answer"):
        recorded.join(data, recorded.read(table(tmp_path / "a.tsv", rows)), tmp_path)
    rows = [row | {"answer": "ABCD"[index % 4] if index else "D"} for index, row in enumerate(rows)]
    _, _, said = recorded.join(data, recorded.read(table(tmp_path / "a.tsv", rows)), tmp_path)
    assert said == ["1 predictions that stand beside another answer than the row's"]


def test_extracted_and_failed(tmp_path):
    rows = [{"index": 1, "prediction": "x", "extracted": "B"}, {"index": 2, "prediction": None},
            {"index": 3, "prediction": recorded.FAILED}, {"index": 4, "prediction": "\ud83d a",
            "extracted": 5}]  # fmt: skip
    found = [prediction.reply for prediction in made(tmp_path, rows)]
    assert found[0] == Reply("x", extracted="B") and found[1].failed and found[2].failed
    assert found[3].text == "� a" and found[3].extracted == "5"


def test_an_extraction_stands_for_a_reply_that_is_missing(tmp_path):
    rows = [{"index": 1, "prediction": None, "extracted": [1, 2]}, {"index": 2, "prediction": recorded.FAILED,
            "extracted": "B"}, {"index": 3, "prediction": "x", "extracted": None}]  # fmt: skip
    found = [prediction.reply for prediction in made(tmp_path, rows)]
    assert [reply.extracted for reply in found] == ["[1, 2]", "B", None] and not any(reply.failed for reply in found)


def test_numbers_in_a_workbook_are_the_same_answers(tmp_path):
    data = [Row(str(index), "q", (f"{index}.0",)) for index in range(40)]
    rows = [{"index": index, "prediction": "A", "answer": index} for index in range(40)]
    assert recorded.join(data, recorded.read(workbook(tmp_path / "a.xlsx", rows)), tmp_path)[2] == []


def test_answers_of_yes_and_no_that_agree_by_chance_are_of_another_file(tmp_path):
    data = [Row(str(index), "q", ("Yes" if index % 2 else "No",)) for index in range(40)]
    rows = [{"index": index, "prediction": "No", "answer": "Yes" if index % 3 else "No"} for index in range(40)]
    with pytest.raises(InputError, match="of 40 predictions stand beside another answer"):
        recorded.join(data, recorded.read(table(tmp_path / "a.tsv", rows)), tmp_path)


def test_a_compressed_file_is_named(tmp_path):
    (tmp_path / "p.jsonl.gz").write_bytes(gzip.compress(b'{"index": 1, "prediction": "a"}\n'))
    with pytest.raises(InputError, match="gzip; unpack it"):
        recorded.read(tmp_path / "p.jsonl.gz")


def test_a_cell_as_long_as_can_be_was_cut(tmp_path):
    file = workbook(
        tmp_path / "a.xlsx", [{"index": 10, "prediction": "x" * recorded.XLSX_CELL}, {"index": 11, "prediction": "y"}]
    )
    found = recorded.read(file)
    assert [prediction.reply.finish for prediction in found] == ["length", ""]
    assert any("cut off" in line for line in recorded.join(ROWS, found, tmp_path)[2])


@pytest.mark.parametrize("rows, told", [
    ([{"index": 1}], "`prediction` is missing"), ([{"prediction": "a"}], "`index` is missing"), ([], "no table"),
    ([{"index": 1, "prediction": "a"}] * 2, "twice"), ([{"index": 1, "prediction": ["a"]}], "`prediction` is a list"),
])  # fmt: skip
def test_what_is_no_prediction_is_refused(tmp_path, rows, told):
    with pytest.raises(InputError, match=told):
        made(tmp_path, rows)
