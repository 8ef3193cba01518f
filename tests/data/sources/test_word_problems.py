"""The text set: right answers, splits that share no numbers, the same bytes everywhere."""

import collections
import hashlib
import re

import pytest

from capcur_jax.data.rows import read_problems
from capcur_jax.data.sources import word_problems


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return word_problems.build(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def rows(files):
    return {split: read_problems(file)[0] for split, file in files.items()}


@pytest.mark.parametrize(
    ("kind", "a", "b", "reasoning"),
    [
        ("add", 47, 38, "47 + 38 = 70 + 15 = 85."),
        ("add", 20, 31, "20 + 31 = 50 + 1 = 51."),
        ("subtract", 83, 47, "83 - 47 = 40 - 4 = 36."),
        ("subtract", 58, 12, "58 - 12 = 40 + 6 = 46."),
        ("subtract", 53, 53, "53 - 53 = 0 + 0 = 0."),
        ("multiply", 36, 3, "36 x 3 = 90 + 18 = 108."),
    ],
)
def test_worked_solution(kind, a, b, reasoning):
    answer = re.search(r"= (\d+)\.", reasoning).group(1)
    assert word_problems.worked(kind, {"a": a, "b": b}) == (reasoning, answer)


def test_unknown_kind_and_capability_are_errors(tmp_path):
    with pytest.raises(ValueError, match="no kind 'divide' of word problem; one of add, subtract, multiply"):
        word_problems.worked("divide", {"a": 1, "b": 1})
    with pytest.raises(ValueError, match="no capability 'visual'"):
        word_problems.build(tmp_path, "visual")


def test_sizes_and_balance(rows):
    assert {split: len(found) for split, found in rows.items()} == word_problems.COUNTS
    for found in rows.values():
        counts = collections.Counter(row.kind for row in found).values()
        assert len(counts) == 3 and max(counts) - min(counts) <= 1
        assert all(row.capability == "text" and row.images == () for row in found)
        assert {row.kind for row in found[:3]} == set(word_problems.KINDS)  # any first part is balanced


def operands(row):
    a, b = map(int, re.findall(r"\d+", row.problem))
    return a, b


def test_no_sum_of_one_split_is_in_another(rows):
    """Whatever the wording, and whichever of the two numbers comes first: so no answer can be remembered."""
    of_split = {
        split: {(row.kind, *sorted(operands(row))) for row in found if row.kind != "subtract"}
        | {(row.kind, *operands(row)) for row in found if row.kind == "subtract"}
        for split, found in rows.items()
    }
    assert not of_split["train"] & of_split["test"] and not of_split["train"] & of_split["validation"]
    assert not of_split["validation"] & of_split["test"]
    assert len(of_split["test"]) > 250  # not the same few numbers in many wordings


def test_no_text_twice(rows):
    texts = [row.problem for found in rows.values() for row in found]
    assert len(set(texts)) == len(texts)


def test_answers_follow_from_the_numbers_in_the_text(rows):
    for row in rows["train"] + rows["test"]:
        a, b = operands(row)
        result = {"add": a + b, "subtract": a - b, "multiply": a * b}[row.kind]
        assert row.answer == str(result) and result >= 0
        assert all(value in allowed for value, allowed in zip((a, b), word_problems.OPERANDS[row.kind], strict=True))


def test_another_salt_draws_other_texts_of_the_same_split(rows):
    other = [problem.problem for problem, _ in word_problems.questions("train", "other", 900)]
    assert len(set(other)) == 900
    assert len(set(other) & {row.problem for row in rows["train"]}) < 90


def test_bytes_are_those_of_the_version(files):
    digest = hashlib.sha256(b"".join(file.read_bytes() for file in files.values())).hexdigest()
    known = {"word-problems-3": "6237910259f3c1006f4fb8bc30a9bc40946dbd584623ecf2429f870644ac0fe5"}
    assert digest == known.get(word_problems.VERSION), "rows changed: raise VERSION, then note its digest here"
