"""Which rows are asked where not all are: a sample of the file, the same whatever the order of its rows."""

import collections
import dataclasses
import gzip

import pytest

from capcur_jax import presets
from capcur_jax.data.draw import drawn, shares
from capcur_jax.data.problem import Problem
from capcur_jax.data.rows import read_problems, write_rows
from capcur_jax.data.sets import Sets

# Sorted by kind and source, as many public sets are.
SORTED = [
    Problem(f"q{i}", f"question {i}?", str(i % 7), kind="easy" if i < 600 else "hard", source=f"part {i // 400}")
    for i in range(1200)
]


def texts(problems):
    return [problem.problem for problem in problems]


def test_a_draw_from_a_sorted_file_has_the_kinds_and_sources_of_the_whole():
    found = drawn(SORTED, 300, "test.jsonl")
    assert len({problem.id for problem in found}) == 300
    kinds, sources = (collections.Counter(getattr(p, key) for p in found) for key in ("kind", "source"))
    assert abs(kinds["easy"] - 150) < 40 and all(abs(sources[f"part {n}"] - 100) < 40 for n in range(3))


@pytest.mark.parametrize("count", [0, 1, 100, 5000])
def test_the_order_of_the_rows_changes_nothing_and_more_contain_fewer(count):
    found = drawn(SORTED, count, "test.jsonl")
    assert found == drawn(SORTED[::-1], count, "test.jsonl") == drawn(SORTED[500:] + SORTED[:500], count, "test.jsonl")
    assert found[:70] == drawn(SORTED, 70, "test.jsonl")[: len(found)]
    assert len(found) == min(count or 1200, 1200)


@pytest.mark.parametrize("end", [".jsonl", ".jsonl.gz"])
def test_rows_that_are_called_by_their_line_are_drawn_by_what_they_say(tmp_path, end):
    """A line says nothing of a row: in another order it is another row's."""
    plain = [{"problem": problem.problem, "answer": problem.answer} for problem in SORTED[:60]]
    found = []
    for name, rows in (("one", plain), ("other", plain[::-1])):
        (tmp_path / name).mkdir()
        file = tmp_path / name / f"test{end}"
        text = "".join(f'{{"problem": "{r["problem"]}", "answer": "{r["answer"]}"}}\n' for r in rows)
        file.write_bytes(gzip.compress(text.encode()) if end.endswith(".gz") else text.encode())
        problems, _ = read_problems(file)
        assert problems[0].id == "test-1"
        found.append(texts(drawn(problems, 20, file)))
    assert found[0] == found[1] and found[0] != texts(SORTED[:20])


def test_a_set_draws_from_its_own_file(tmp_path):
    config = presets.get("laptop")
    for number, rows in enumerate((SORTED, SORTED[::-1])):
        write_rows(tmp_path / f"{number}.jsonl", rows)
    found = []
    for number in range(2):
        config.data.sets.text.test = str(tmp_path / f"{number}.jsonl")
        found.append(texts(Sets(config.data, tmp_path).drawn("text", "test", 50)))
    assert found[0] == found[1] == texts(drawn(SORTED, 50, "0.jsonl"))


def test_shares_of_kinds_and_sources():
    some = [*SORTED[599:602], dataclasses.replace(SORTED[0], kind="")]
    assert shares(some) == {
        "kinds": {"hard": 0.5, "none": 0.25, "easy": 0.25},
        "sources": {"part 1": 0.75, "part 0": 0.25},
    }
    assert shares([Problem("a", "?", "1")]) == {"kinds": {}, "sources": {}}
