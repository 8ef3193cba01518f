"""Tables of predictions: what is written comes back, texts that look like nothing included."""

import csv
from pathlib import Path

import pytest

from capcur_jax.errors import InputError
from capcur_jax.evaluation import folders
from capcur_jax.evaluation.benchmarks import mathvista
from capcur_jax.evaluation.benchmarks.base import Reply, Row, Verdict
from capcur_jax.evaluation.folders import Answered
from tests.evaluation.made import answered, folder
from tests.evaluation.published import base64_of, table

HARD = ["None", "nan", "", "NA", 'say "hi"\tthen\n"bye"', "a\r\nb", "'", "\\n", "[1, 2]", "日本", "x" * 200_000, "=1+1"]


def test_what_is_written_comes_back(tmp_path):
    rows = [
        Answered(
            Row(str(at), text or "q", ("A", "None") if at % 2 else (text or "gold",), (Path("/i m/1.png"),) * (at % 3),
                {"A": "None", "C": text or "c"}, {"category": "nan", "level": 3}, "c1" if at else ""),
            Reply(text, "length", None if at % 2 else at, failed="no" if at == 2 else ""),
            {"official": Verdict(0.25, "judge", "None"), "kit": Verdict(1.0, "rule", None)},
        )
        for at, text in enumerate(HARD)
    ]  # fmt: skip
    file = tmp_path / "predictions" / "x.tsv"
    folders.write_predictions(file, rows)
    found = folders.read_predictions(file)
    assert list(found) == [row.row.index for row in rows]
    for one in rows:
        back = found[one.row.index]
        assert back.row.gold == one.row.gold and back.row.question == one.row.question
        assert back.row.options == one.row.options and back.row.images == one.row.images
        assert (back.reply, back.verdicts) == (one.reply, one.verdicts)
        assert back.category == "nan" and back.row.facts["level"] == "3"
        assert back.cluster == (one.row.cluster or f"row {one.row.index}")


def test_tables_are_the_kits_with_every_cell_quoted(tmp_path):
    file = tmp_path / "x.tsv"
    folders.write_predictions(file, [answered("7", True, text="None", category="algebra")])
    head, row = file.read_text().splitlines()
    assert head.split("\t")[:6] == ['"index"', '"question"', '"A"', '"B"', '"answer"', '"category"']
    assert all(cell[0] == cell[-1] == '"' for cell in row.split("\t"))
    assert next(csv.DictReader(file.open(), delimiter="\t"))["prediction"] == "None"


def test_a_tables_own_columns_are_there_for_the_kits_scorers(tmp_path):
    published = table(tmp_path / "MathVista_MINI.tsv", [
        {"index": 4, "image": base64_of(4), "question": "Hint: ...", "answer": "red", "answer_option": "A",
         "choices": "['red', 'blue']", "question_type": "multi_choice", "answer_type": "text", "precision": "",
         "unit": "None", "task": "t", "skills": "['s']"}])  # fmt: skip
    (row,) = mathvista.BENCHMARK.load(published, None)
    verdicts = {"official": Verdict(1.0, "rule", "red"), "kit": Verdict(1.0, "rule", "A")}
    folders.write_predictions(tmp_path / "x.tsv", [Answered(row, Reply("A"), verdicts)])
    (cells,) = csv.DictReader((tmp_path / "x.tsv").open(), delimiter="\t")
    assert (cells["answer_option"], cells["choices"], cells["question_type"]) == (
        "A",
        "['red', 'blue']",
        "multi_choice",
    )
    assert cells["answer_type"] == "text" and cells["unit"] == "None" and cells["skills"] == '["s"]'
    assert "image" not in cells and len(next(csv.reader((tmp_path / "x.tsv").open(), delimiter="\t"))) == len(cells)
    back = folders.read_predictions(tmp_path / "x.tsv")["4"]
    assert back.row.gold == row.gold == ("A",) and back.row.facts["question_type"] == "multi_choice"


def test_a_run_stands_for_its_final_evaluation(tmp_path):
    folder(tmp_path / "run" / "evaluation" / "final", {"perception": [answered(1, True)]})
    found = folders.read(tmp_path / "run")
    assert found.name == "run" and list(found.answered["perception"]) == ["1"]
    assert folders.score_of(found, "perception", "kit") == 100 and folders.score_of(found, "other", "kit") is None


def test_conditions_are_flat_and_the_benchmarks_own_count(tmp_path):
    path = folder(tmp_path, {"x": [answered(1, True)]}, {"sampling": {"temperature": 0}, "limit": 5}, {"limit": 7})
    assert folders.conditions(folders.read(path), "x") == {"sampling.temperature": 0, "limit": 7}


@pytest.mark.parametrize("spoil, said", [
    (lambda f: (f / "scores.json").unlink(), "no scores.json"),
    (lambda f: (f / "scores.json").write_text("[]"), "holds no scores"),
    (lambda f: (f / "scores.json").write_text("{"), "can't be read"),
    (lambda f: (f / "predictions" / "x.tsv").unlink(), "holds no predictions"),
    (lambda f: (f / "predictions" / "x.tsv").write_text("a\tb\n1\t2\n"), "no column"),
    (lambda f: (f / "predictions" / "x.tsv").write_text("index\tanswer\tprediction\n1\tB\n"), "row 1"),
    (lambda f: (f / "predictions" / "x.tsv").write_text("index\tanswer\tprediction\n1\tB\tB\n1\tB\tB\n"), "twice"),
    (lambda f: (f / "predictions" / "x.tsv").write_text("index\tanswer\tprediction\tkit\n1\tB\tB\t7\n"), "no credit"),
    (lambda f: (f / "predictions" / "x.tsv").write_bytes(b"\xff\xfe"), "can't be read"),
])  # fmt: skip
def test_a_spoiled_folder_is_said(tmp_path, spoil, said):
    spoil(folder(tmp_path, {"x": [answered(1, True)]}))
    with pytest.raises(InputError, match=said):
        folders.read(tmp_path)


def test_a_fact_that_no_row_has_is_no_column(tmp_path):
    """VLMEvalKit's scorers make a group of each empty cell, and then stop at columns of one name."""
    file, verdicts = tmp_path / "x.tsv", {"official": Verdict(1.0, "rule", "A")}
    row = Row("1", "What?", ("A",), facts={"category": "", "hint": None, "level": "2"})
    folders.write_predictions(file, [Answered(row, Reply("A"), verdicts)])
    with file.open(encoding="utf-8", newline="") as lines:
        head = next(csv.reader(lines, delimiter="\t"))
    assert "level" in head and not {"category", "hint"} & {*head}
