"""Recorded predictions of the extended benchmarks through the command, and what each benchmark says of itself."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from capcur_jax import evaluate
from capcur_jax.evaluation.benchmarks import capability, registry
from tests.evaluation.benchmarks.extended_fixtures import cell, table, written

EXTENDED = "dynamath", "hallusionbench", "blink", "visonlyqa", "cvbench_2d", "vstar", "chartqa", "textvqa"


def scored(capsys, benchmark: str, rows: list[dict], replies: list[str], folder: Path) -> dict:
    data = table(folder / f"{benchmark}.tsv", rows)
    lines = [{"index": row["index"], "prediction": reply} for row, reply in zip(rows, replies, strict=True)]
    file = written(folder / f"{benchmark}_predictions.jsonl", lines)
    assert evaluate.main(["score", f"--benchmark={benchmark}", f"--predictions={file}", f"--data={data}"]) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_dynamath(capsys, tmp_path):
    rows = [
        {"index": f"{seed}{variant}", "image": cell(), "qid": seed, "varid": variant, "question": "?", "answer": "1.5",
         "answer_type": "float", "subject": "algebra", "knowledge_level": "high school"}
        for seed in (1, 2) for variant in (1, 2)
    ]  # fmt: skip
    replies = ['{"short answer": "1.500"}', '{"short answer": 1.5}', '{"short answer": "2"}', "no number"]
    found = scored(capsys, "dynamath", rows, replies, tmp_path)
    assert (found["official"]["average"], found["official"]["worst_case"], found["official"]["undecided"]) == (
        50,
        50,
        0,
    )
    assert (found["kit"]["average"], found["kit"]["worst_case"], found["kit"]["undecided"]) == (25, 0, 2)
    assert found["official"]["right"] == 2 and found["rows"] == 4


def test_hallusionbench(capsys, tmp_path):
    rows = [
        {"index": f"hallusion_VD_map_0_{figure}_{question}", "image": cell(), "question": "Is it?", "answer": answer,
         "category": "VD", "l2-category": "VD_map"}
        for figure, question, answer in ((0, 0, "Yes"), (0, 1, "No"), (1, 0, "No"), (1, 1, "Yes"))
    ]  # fmt: skip
    found = scored(capsys, "hallusionbench", rows, ["Yes.", "No.", "No.", "I can't tell"], tmp_path)
    for mode in ("official", "kit"):
        numbers = found[mode]
        assert (numbers["aAcc"], numbers["fAcc"], numbers["qAcc"], numbers["undecided"]) == (75, 50, 50, 1)
        assert numbers["score"] == pytest.approx(175 / 3, abs=1e-5)


def test_textvqa_has_parts_of_a_point(capsys, tmp_path):
    people = ["red"] * 2 + ["blue"] * 8
    rows = [{"index": 0, "image": cell(), "question": "?", "answer": repr(people), "split": "val"}]
    found = scored(capsys, "textvqa", rows, ["Red."], tmp_path)
    assert found["kit"]["score"] == pytest.approx(60) and found["kit"]["right"] == 0


def test_a_file_of_problems(capsys, tmp_path):
    data = written(tmp_path / "mine.jsonl", [{"id": "a", "problem": "1 + 1?", "answer": "2"}])
    file = written(tmp_path / "replies.jsonl", [{"index": "a", "prediction": r"So \boxed{2}."}])
    arguments = ["score", f"--benchmark={data}", f"--predictions={file}", f"--data={data}"]
    assert evaluate.main(arguments) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["benchmark"] == "mine" and found["official"]["score"] == found["kit"]["score"] == 100


@pytest.mark.parametrize("name", [*EXTENDED, *capability.NAMES])
def test_what_a_benchmark_says_of_itself(name):
    one = registry.get(name)
    assert one.name == name and one.title and one.where and len(one.files) >= 2
    if name in EXTENDED:
        assert one.files[0].endswith(".tsv") and one.sets and all(len(digest) == 8 for digest in one.digests)


@pytest.mark.parametrize("module", [*EXTENDED, "capability"])
def test_a_benchmark_is_a_small_module(module):
    file = Path(registry.__file__).with_name(f"{module}.py")
    assert len(file.read_text(encoding="utf-8").splitlines()) <= 80
