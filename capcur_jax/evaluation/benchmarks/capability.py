"""This project's own sets (perception, text, visual) and any file of problems, graded as training grades.

Rows are those of docs/data.md. A reply is right where the answer in its last box is, by the grader of the reward, as in
training. There is no judge, and both modes have the same rule.
"""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from pathlib import Path

from capcur_jax.answers.response import last_boxed
from capcur_jax.data.problem import IMAGE_MARK, Problem
from capcur_jax.data.rows import read_problems
from capcur_jax.evaluation import tables
from capcur_jax.evaluation.benchmarks import wording
from capcur_jax.evaluation.benchmarks.accuracy import accuracy
from capcur_jax.evaluation.benchmarks.base import Benchmark, Row, Verdict
from capcur_jax.rewards.grade import Grader
from capcur_jax.rewards.reward import gold_of

NAMES = ("perception", "text", "visual")


def row_of(problem: Problem) -> Row:
    """A problem as a row; `facts["problem"]` has the whole. Marks for images that stand in front go: images come first.

    A mark inside the text stays, so that who puts the question can put the image there.
    """
    question = problem.problem
    while question.startswith(IMAGE_MARK):
        question = question.removeprefix(IMAGE_MARK).lstrip()
    facts = {"problem": problem, "kind": problem.kind, "source": problem.source}
    gold = problem.answers or (problem.answer,)
    images = tuple(map(Path, problem.images))
    return Row(problem.id, question, gold, images, facts=facts, cluster="\n".join(problem.images))


def _load(name: str, path: Path, images: Path | None) -> tables.Rows:
    problems, drops = read_problems(path, name if name in NAMES else "", images)
    left_out = Counter(drop.reason for drop in drops)
    left_out["without an answer"] = sum(not problem.answer for problem in problems)
    rows = [row_of(problem) for problem in problems if problem.answer]
    return tables.Rows(rows, [path], tables.md5(path) if path.is_file() else "", +left_out)


@functools.cache
def _grader() -> Grader:
    """Of this process; its workers start with the first pair of formulas, and end with the process."""
    return Grader()


def _rule(row: Row, text: str, extracted: str | None) -> Verdict:
    answer = last_boxed(text)
    return Verdict(float(_grader().judge([(answer, gold_of(row.facts["problem"]))])[0].correct), "rule", answer)


def benchmark(name: str, title: str = "") -> Benchmark:
    """One of NAMES, or a file of the user's own under a name."""
    files = f"{name}.jsonl", f"{name}.parquet"
    return Benchmark(
        name=name, title=title or name, files=files, where="a file of problems", sets={},
        load=functools.partial(_load, name), put=wording.unchanged, official=_rule, kit=_rule, reading="raw",
        metrics=accuracy(kinds="kind", sources="source"),
    )  # fmt: skip


def of_file(path: Path) -> Benchmark:
    """A file of the user's own; it is its own data, whatever folder is given."""
    own = benchmark(path.name.partition(".")[0])
    return dataclasses.replace(own, files=(path.name,), load=lambda _, images: _load(own.name, path, images))


BENCHMARKS = tuple(map(benchmark, NAMES))
