"""The command: every question with its image and with its text, several times, kept in a journal."""

import json
import os
from pathlib import Path

import pytest

from capcur_jax import evaluate
from capcur_jax.data.problem import Problem
from capcur_jax.data.rows import write_rows
from capcur_jax.evaluation import texts
from capcur_jax.evaluation.benchmarks import mathverse, registry, visonlyqa
from tests.conftest import random_image
from tests.rollout.scripted_server import Raw, ScriptedServer, has_image, turn_text

PUBLIC = os.environ.get("CAPCUR_PUBLIC_DATA", "")


def visonly(path, kind, name, question, answer="b"):
    row = {
        "id": name, "image_path": "images/x.png", "prompt_no_reasoning": question, "prompt_reasoning": None,
        "answer": answer, "question_type": "single_answer", "response_options": ["a", "b"], "source": "s",
    }  # fmt: skip
    with (path / f"{kind}.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")


@pytest.fixture
def visonlyqa_folder(tmp_path):
    path = tmp_path / "visonlyqa"
    (path / "images").mkdir(parents=True)
    random_image(32, 32, seed=1).save(path / "images" / "x.png")
    for at in range(4):
        question = f"Which is question {at}? (a) 45 degrees (b) 90 degrees \n\nOnly the letter."
        visonly(path, "3d__angle", f"q{at}", question)
        facts = "The corner has 90 degrees." if at == 3 else "Sides 3, 4 and 5 meet."
        if at != 2:
            visonly(path, "text_3d__angle", f"text_q{at}", f"{facts}\n\n{question}")
    return path


def test_visonlyqas_twins_are_joined_by_id_and_answers_are_kept_out(visonlyqa_folder, tmp_path):
    rows = visonlyqa.BENCHMARK.load(visonlyqa_folder, tmp_path / "images")
    found, left_out = texts.told(visonlyqa.BENCHMARK, rows, visonlyqa_folder)
    assert [row.index for row, _ in found] == ["q0", "q1"]
    assert left_out == {"without a text of the figure": 1, "whose text holds the answer": 1}
    for row, told in found:
        assert told.images == () and told.question == f"Sides 3, 4 and 5 meet.\n\n{row.question}"
        assert (told.index, told.gold, told.options) == (row.index, row.gold, row.options)


def test_mathverses_versions_are_joined_by_problem(tmp_path):
    rows = []
    for version, text in (("Text Dominant", "A circle of radius 2. "), ("Vision Intensive", "")):
        for problem in ("1", "2"):
            rows.append({
                "sample_index": f"{version} {problem}", "problem_index": problem, "problem_version": version,
                "question": f"{text}What is its area {problem}?", "image": "x.png", "answer": "4",
                "question_type": "free-form", "metadata": {}, "query_wo": f"{text}What is its area {problem}?",
                "query_cot": "", "question_for_eval": "What?",
            })  # fmt: skip
    (tmp_path / "testmini.json").write_text(json.dumps(rows))
    random_image(32, 32, seed=1).save(tmp_path / "x.png")
    benchmark = registry.get("mathverse_vision_intensive")
    loaded = benchmark.load(tmp_path, tmp_path / "images")
    found, left_out = texts.told(benchmark, loaded, tmp_path)
    assert [(row.index, told.question) for row, told in found] == [
        (f"Vision Intensive {problem}", f"A circle of radius 2. What is its area {problem}?") for problem in "12"
    ]
    assert not left_out and benchmark in mathverse.BENCHMARKS


@pytest.mark.skipif(not PUBLIC, reason="CAPCUR_PUBLIC_DATA names no folder with VisOnlyQA")
def test_real_twins(tmp_path):
    folder = Path(PUBLIC) / "visonlyqa"
    rows = visonlyqa.BENCHMARK.load(folder, tmp_path / "images")
    found, left_out = texts.told(visonlyqa.BENCHMARK, rows, folder)
    assert len(found) + sum(left_out.values()) == len(rows) and len(found) >= 20
    for row, told in found:
        assert told.question.endswith(row.question) and len(told.question) > len(row.question) + 20


def run(server, workdir, benchmark, *more, code=0):
    words = [f"--benchmarks={benchmark}", f"--address={server.address}", "--model=m", f"--workdir={workdir}"]
    assert evaluate.main(["counterfactual", *words, "--retries=0", "--concurrency=2", *map(str, more)]) == code


def test_wrong_answers_that_a_text_mends(visonlyqa_folder, tmp_path, capsys):
    reply = lambda body: "a" if has_image(body) else "b"  # noqa: E731
    with ScriptedServer(reply) as server:
        words = ["visonlyqa", f"--data={visonlyqa_folder}", "--samples=3"]
        run(server, tmp_path / "w", *words)
        assert len(server.requests) == 12 and sum(map(has_image, server.requests)) == 6
        assert {body["temperature"] for body in server.requests} == {0.7}
        assert all("gold" not in turn_text(body) for body in server.requests)
        run(server, tmp_path / "w", *words)
        assert len(server.requests) == 12
    kept = json.loads((tmp_path / "w" / "counterfactual.json").read_text())
    found = kept["sets"]["visonlyqa"]
    assert (found["text"]["questions"], found["text"]["samples"]) == (2, 3)
    assert found["text"]["wrong_right"][0] == 1 and found["text"]["limited_of_wrong"][0] == 1
    assert kept["conditions"]["model"] == "m" and kept["judge"] == "none"
    printed = capsys.readouterr().err
    assert "visonlyqa" in printed and "100.0" in printed and "1 whose text holds" in printed


def test_captions_of_ones_own_and_what_can_not_be(tmp_path, capsys):
    random_image(32, 32, seed=1).save(tmp_path / "x.png")
    row = Problem("a", "How many dots?", "3", (str(tmp_path / "x.png"),), metadata={"caption": "Some dots."})
    write_rows(tmp_path / "own.jsonl", [row])
    write_rows(tmp_path / "bare.jsonl", [Problem("a", "How many?", "3", (str(tmp_path / "x.png"),))])
    with ScriptedServer(lambda body: "\\boxed{3}" if "Some dots." in turn_text(body) else Raw(400, b"no")) as server:
        run(server, tmp_path / "w", tmp_path / "own.jsonl", code=2)
        assert "4 questions have no reply" in capsys.readouterr().err
        server._reply = lambda body: "\\boxed{3}"
        run(server, tmp_path / "w", tmp_path / "own.jsonl")
        assert len(server.requests) == 12  # what was answered is not asked again
        run(server, tmp_path / "b", tmp_path / "bare.jsonl", code=2)
        assert "captions" in capsys.readouterr().err
        run(server, tmp_path / "c", tmp_path / "own.jsonl", "--temperature=0", code=2)
        assert "--temperature" in capsys.readouterr().err
