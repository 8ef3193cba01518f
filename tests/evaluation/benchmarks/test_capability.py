"""This project's own sets and files of problems: the rows of training data, graded as training grades."""

from __future__ import annotations

import json

import pytest

from capcur_jax.data.problem import Problem
from capcur_jax.data.rows import write_rows
from capcur_jax.evaluation.benchmarks import capability
from capcur_jax.evaluation.benchmarks.base import Reply
from capcur_jax.evaluation.scoring import score
from capcur_jax.rewards.grade import Grader
from capcur_jax.rewards.reward import Reward
from tests.evaluation.benchmarks.extended_fixtures import HOSTILE, credit, image, verdicts

PROBLEMS = [
    ("How many?", "12"), ("Which? (A) red (B) blue", "B"), ("What is x?", r"\frac{1}{2}"),
    ("What shape?", "a circle"),
]  # fmt: skip
REPLIES = [
    r"\boxed{12}", r"<think>B?</think> \boxed{B}", r"\boxed{0.5}", r"\boxed{circle}", "12", r"\boxed{12", r"\boxed{13}",
    "", r"<think>\boxed{12}", r"\boxed{1} or \boxed{12}", r"\boxed{\text{B}}",
]  # fmt: skip


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_files_of_problems(tmp_path, suffix):
    picture = str(image(tmp_path / "one.png"))
    problems = [
        Problem("a", "<image>\n<image>How many?", "12", (picture, picture), kind="count", source="own"),
        Problem("b", "Between <image> and this?", "red", (picture,)),
        Problem("c", "What is 5 + 7?", "12", answers=("12", "a dozen")),
        Problem("d", "Describe it.", "", response="It is red."),
    ]
    write_rows(tmp_path / f"mine{suffix}", problems)
    rows = capability.benchmark("mine").load(tmp_path / f"mine{suffix}", tmp_path / "unpacked")
    assert [row.index for row in rows] == ["a", "b", "c"] and rows.left_out == {"without an answer": 1}
    assert rows[0].question == "How many?" and len(rows[0].images) == 2
    assert rows[1].question == "Between <image> and this?"  # where the image goes is the text's to say
    assert rows[2].gold == ("12", "a dozen") and rows[2].facts["problem"].answers == rows[2].gold
    assert rows[0].facts["kind"] == "count" and rows[0].cluster and not rows[2].cluster
    found = capability.benchmark("mine").metrics(rows, verdicts(1, 0, 0), "kit")
    assert found["kinds"] == {"count": 100} and found["sources"] == {"own": 100}


def test_rows_that_cannot_be_used_are_counted(tmp_path):
    lines = [{"problem": "1 + 1?", "answer": "2"}, {"problem": "", "answer": "2"}, "no json"]
    text = "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)
    (tmp_path / "mine.jsonl").write_text(text)
    rows = capability.benchmark("mine").load(tmp_path / "mine.jsonl", None)
    assert len(rows) == 1 and rows.left_out == {"no problem": 1, "not JSON": 1}


@pytest.mark.parametrize("read", ["raw", "box"])
def test_the_grade_is_that_of_training(read):
    """Whatever reading is asked for: the grader takes the last box itself."""
    problems = [Problem(f"{p}-{r}", *PROBLEMS[p]) for p in range(len(PROBLEMS)) for r in range(len(REPLIES))]
    replies = [reply for _ in PROBLEMS for reply in REPLIES]
    (benchmark,) = (one for one in capability.BENCHMARKS if one.name == "visual")
    rows = [capability.row_of(problem) for problem in problems]
    scored = score(benchmark, rows, [Reply(text) for text in replies], "official", read)
    with Grader(workers=1) as grader:
        expected = [one.accuracy for one in Reward(1, 1, grader)(problems, replies)]
    assert [verdict.credit for verdict in scored.verdicts] == expected and {0.0, 1.0} == set(expected)
    assert scored.shares["undecided"] == 0


def test_hostile_replies():
    row = capability.row_of(Problem("a", "?", "12"))
    for text in HOSTILE.values():
        assert credit(capability.BENCHMARKS[0], row, text, "kit") == 0
        assert credit(capability.BENCHMARKS[0], row, f"\\boxed{{{text}}}", "kit") == 0
