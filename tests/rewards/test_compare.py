"""The rules of docs/rewards.md, and pairs of answers of every kind."""

import json
import re
from pathlib import Path

import pytest

from capcur_jax.answers.kinds import ANSWER_TYPES, answer_type_of, gold_of
from capcur_jax.rewards import grade

PAGE = Path(__file__).parents[2] / "docs" / "rewards.md"
PAIRS = [json.loads(line) for line in Path(__file__).with_name("pairs.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def grader():
    with grade.Grader(workers=2, timeout_s=20.0, memory_mb=1024) as shared:
        yield shared


def _tables():
    """The tables of the page, each as its rows, cell by cell; code marks are taken off."""
    table = []
    for line in [*PAGE.read_text().splitlines(), ""]:
        if line.startswith("|"):
            table.append([cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]])
        elif table:
            yield table[0], table[2:]
            table = []


def _code(cell):
    return [text.strip() for text in re.findall(r"`([^`]+)`", cell)]


def test_the_tables_of_the_page_hold(grader):
    cases = []
    for head, rows in _tables():
        if head[-1] == "right":
            for row in rows:
                question, (gold,), (predicted,) = row[0] if len(row) == 4 else "", _code(row[-3]), _code(row[-2])
                cases.append((question, gold, predicted, row[-1] == "yes"))
    verdicts = grader.grade([(predicted, gold_of(gold, problem=question)) for question, gold, predicted, _ in cases])
    assert len(cases) > 90
    assert [case for case, verdict in zip(cases, verdicts, strict=True) if verdict != case[-1]] == []


def test_the_kinds_of_the_page_are_found():
    kinds = next(rows for head, rows in _tables() if head[0] == "answer_type")
    assert [row[0] for row in kinds] == list(ANSWER_TYPES)
    wrong = [(kind, answer) for kind, _, cell in kinds for answer in _code(cell) if answer_type_of(answer) != kind]
    assert not wrong
    both = next(rows for head, rows in _tables() if head[0] == "gold" and head[1] == "kind")
    assert all(answer_type_of(_code(gold)[0]) == kind for gold, kind, _ in both)


def test_pairs_of_every_kind(grader):
    verdicts = grader.grade([(predicted, gold) for gold, predicted, _ in PAIRS])
    assert [pair for pair, verdict in zip(PAIRS, verdicts, strict=True) if verdict != bool(pair[2])] == []
    assert grader.timeouts == grader.failures == 0


def test_a_gold_in_a_box_is_right(grader):
    golds = sorted({gold for gold, _, _ in PAIRS})
    assert [
        gold for gold, right in zip(golds, grader.grade(list(zip(golds, golds, strict=True))), strict=True) if not right
    ] == []


def test_every_accepted_answer_counts(grader):
    gold = gold_of("Acme Foods Incorporated", ("Acme Foods Incorporated", "Acme Foods", "3", r"\frac{x}{2}"))
    said = ["acme foods", "3.0", "0.5x", "Acme", "4", "x"]
    assert grader.grade([(text, gold) for text in said]) == [True] * 3 + [False] * 3


def test_a_declared_kind_decides(grader):
    pairs = [("1/2", "6/12", ""), ("1/2", "6/12", "code"), ("6/12", "6/12", "code"), ("4, 3", "(3, 4)", "set"),
             ("cat", "cat", "letter"), ("5", "5 cm", "number"), ("5 kg", "5 cm", "number")]  # fmt: skip
    verdicts = grader.grade([(said, gold_of(gold, kind=kind)) for said, gold, kind in pairs])
    assert verdicts == [True, False, True, False, True, True, False]
