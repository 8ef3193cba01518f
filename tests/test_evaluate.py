"""The command line of scores, on small files of our own and on published ones where they are."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from capcur_jax import evaluate
from capcur_jax.evaluation.benchmarks import registry
from tests.evaluation.published import choices, lines, table, workbook

PUBLIC = Path(os.environ.get("CAPCUR_PUBLIC_DATA", "/nonexistent"))


def scored(capsys, name, predictions, *options):
    """(the last line of stdout, what was said on stderr)."""
    assert evaluate.main(["score", f"--benchmark={name}", f"--predictions={predictions}", *options]) == 0
    out, told = capsys.readouterr()
    return json.loads(out.rstrip("\n").split("\n")[-1]), told


def refused(capsys, *arguments):
    assert evaluate.main(["score", *arguments]) == 2
    return capsys.readouterr().err


def test_the_last_line_is_the_result(tmp_path, capsys):
    data = table(tmp_path / "MMStar.tsv", [choices(1), choices(2), choices(3, category="math")])
    predictions = lines(
        tmp_path / "p.jsonl", [{"index": 1, "prediction": "B"}, {"index": "3", "prediction": "It is b"}]
    )
    found, told = scored(capsys, "mmstar", predictions, f"--data={data}")
    assert list(found) == ["benchmark", "rows", "official", "kit"] and found["rows"] == 2
    kit = {"score": 50, "right": 1, "rows": 2, "undecided": 1, "categories": {"math": 0}, "l2_categories": {}}
    assert found["kit"] == kit and found["official"] == kit | {"undecided": 0}
    assert "no whole set" in told and "md5" in told and "1 of 3 rows have no prediction" in told


@pytest.mark.parametrize("write", [table, workbook, lines])
def test_predictions_may_bring_the_answers(tmp_path, capsys, write):
    rows = [
        {"index": at, "question": "q", "A": "None", "B": "x", "answer": "A", "prediction": "None"} for at in range(3)
    ]
    file = write(tmp_path / "model_MMStar.x", rows)
    if write is lines:
        assert "no right answers; give" in refused(capsys, "--benchmark=mmstar", f"--predictions={file}")
    else:
        assert scored(capsys, "mmstar", file)[0]["kit"]["score"] == 100


def test_what_can_not_be_scored_is_told_in_a_line(tmp_path, capsys):
    predictions = lines(tmp_path / "p.jsonl", [{"index": 1, "prediction": "B"}])
    without = table(tmp_path / "MMStar.tsv", [choices(1, answer="")])
    given = "--benchmark=mmstar", f"--predictions={predictions}"
    assert "`answer` is missing" in refused(capsys, *given, f"--data={without}")
    assert "no such file or folder" in refused(capsys, *given, "--data=/nowhere")
    assert "no benchmark 'x'" in refused(capsys, "--benchmark=x", given[1])
    assert "no such file" in refused(capsys, given[0], "--predictions=/nowhere")


def test_the_list_names_all(capsys):
    assert evaluate.main(["--list"]) == 0
    told = capsys.readouterr().out
    assert all(f"{name}: " in told for name in registry.benchmarks()) and "3,040" in told


def test_nothing_heavy_is_imported(tmp_path):
    data = table(tmp_path / "MMStar.tsv", [choices(1, prediction="B")])
    code = (
        "import sys; from capcur_jax import evaluate; "
        f"evaluate.main(['score', '--benchmark=mmstar', '--predictions={data}']); "
        "assert not {'jax', 'torch', 'transformers', 'sympy'} & set(sys.modules)"
    )
    environment = os.environ | {"CAPCUR_TESTS": ""}  # it could import PyTorch
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True)


def test_many_rows_take_no_time(tmp_path, capsys):
    first = choices(0)
    data = table(tmp_path / "MMStar.tsv", [first, *(first | {"index": at, "image": "0"} for at in range(1, 20_000))])
    predictions = lines(tmp_path / "p", [{"index": at, "prediction": "I think (B)."} for at in range(20_000)])
    start = time.process_time()
    found, _ = scored(capsys, "mmstar", predictions, f"--data={data}")
    assert found["kit"]["right"] == 20_000 and time.process_time() - start < 20


# ---------------------------------------------------------------------- published files

CASES = {  # file below the folder, rows, question with images
    "mathvision": ("mathvision", 304, True),
    "wemath": ("wemath", 180, True),
    "mathvista": ("mathvista/testmini_head.json", 150, False),
    "pope": ("pope", 600, False),
}


@pytest.mark.skipif(not PUBLIC.is_dir(), reason="CAPCUR_PUBLIC_DATA names no folder with published sets")
@pytest.mark.parametrize("name", CASES)
def test_published_files_are_read_and_their_own_answers_score_whole(tmp_path, capsys, name):
    path, count, with_images = CASES[name]
    benchmark = registry.get(name)
    rows = benchmark.load(PUBLIC / path, tmp_path if with_images else None)
    assert len(rows) == count
    for row in rows:
        assert benchmark.put(row) and (not with_images or all(image.stat().st_size for image in row.images))
        assert not row.options or row.gold[0] in row.options, row.index
    gold = [{"index": row.index, "prediction": row.gold[0], "extracted": row.gold[0]} for row in rows]
    found, _ = scored(capsys, name, lines(tmp_path / "p", gold), f"--data={PUBLIC / path}")
    assert found["official"]["score"] == 100 and found["official"]["undecided"] == 0
    lists = sum(row.facts.get("type") == "list" for row in rows)
    assert found["kit"]["right"] == count - lists and found["rows"] == count
