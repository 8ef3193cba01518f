"""The command that scores recorded predictions: which set they are of, and its last line."""

from __future__ import annotations

import json

from capcur_jax import evaluate
from tests.evaluation.published import lines

WHOLE = [
    {"id": str(number), "question": "How many?\n<image1>", "options": [], "answer": str(number), "image": "a.jpg",
     "level": 1, "subject": "counting"} for number in range(1, 13)
]  # fmt: skip
MINI = WHOLE[3:7]


def scored(capsys, folder, *indices):
    rows = [{"index": index, "prediction": f"It is {index}."} for index in indices]
    file = lines(folder.parent / "predictions.jsonl", rows)
    code = evaluate.main(["score", "--benchmark=mathvision", f"--predictions={file}", f"--data={folder}"])
    out = capsys.readouterr()
    return code, json.loads(out.out.splitlines()[-1]), out.err


def test_of_a_folder_with_both_sets_the_one_that_has_the_predictions(tmp_path, capsys):
    folder = tmp_path / "data"
    folder.mkdir()
    lines(folder / "testmini.jsonl", MINI)
    lines(folder / "test.jsonl", WHOLE)
    for indices, rows, file in ((range(1, 13), 12, "test"), ((1, 2, 5), 3, "test"), ((4, 5, 6, 7), 4, "testmini"),
                                ((5,), 1, "testmini")):  # fmt: skip
        code, result, told = scored(capsys, folder, *indices)
        assert code == 0 and f"/{file}.jsonl" in told and result["rows"] == rows
        assert list(result) == ["benchmark", "rows", "official", "kit"] and result["benchmark"] == "mathvision"
        assert result["official"]["score"] == 100 and result["official"]["right"] == result["official"]["rows"] == rows


def test_a_folder_with_one_set_is_that_set(tmp_path, capsys):
    folder = tmp_path / "data"
    folder.mkdir()
    lines(folder / "testmini.jsonl", MINI)
    code, result, told = scored(capsys, folder, *range(1, 13))
    assert code == 0 and result["rows"] == 4 and "8 predictions of no row of the data" in told
