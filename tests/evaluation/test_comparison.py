"""Comparisons: the same questions alone, what differs is said, and the table fits a terminal."""

import argparse
import json

import numpy as np
import pytest

from capcur_jax.errors import InputError
from capcur_jax.evaluation import comparison, folders, statistics
from capcur_jax.evaluation.commands import compare
from tests.evaluation.made import answered, folder

LONG = "mathverse_vision_intensive"


def rows(seed, rate, count=60, **kinds):
    rng = np.random.default_rng(seed)
    return [
        answered(at, rng.random() < rate, cluster=f"image {at // 2}", tokens=int(rng.integers(5, 50)), **kinds)
        for at in range(count)
    ]


def pair_of(tmp_path, left, right, **kinds):
    a, b = folder(tmp_path / "a", {"x": left}, **kinds), folder(tmp_path / "b", {"x": right})
    (pair,) = comparison.compare(folders.read(a), folders.read(b), "official")
    return pair


def test_a_pair_is_the_paired_difference_of_its_rows(tmp_path):
    left, right = rows(0, 0.5), rows(1, 0.8)
    pair = pair_of(tmp_path, left, right)
    values = [[one.verdicts["official"].credit for one in side] for side in (left, right)]
    assert pair.right == statistics.paired_difference(*values, [one.cluster for one in left])
    assert pair.right.clusters == 30 and pair.p_holm == pair.right.p
    tokens = [[one.reply.tokens for one in side] for side in (left, right)]
    assert pair.tokens == statistics.paired_difference(*tokens, [one.cluster for one in left], bounded=False)


def test_rows_of_one_alone_and_changed_questions_are_left_out_and_said(tmp_path):
    left = [answered(at, True) for at in range(5)]
    right = [answered(at, False) for at in range(1, 4)] + [answered(4, False, question="Another?"), answered(9, True)]
    pair = pair_of(tmp_path, left, right)
    assert (pair.right.rows, pair.right.losses, pair.only, pair.other_questions) == (3, 3, (1, 1), 1)
    said = " | ".join(comparison.notes(pair))
    assert "1 rows of A alone, 1 of B alone" in said and "another question" in said


def test_rows_are_joined_by_index_not_by_place(tmp_path):
    left = [answered(at, at < 3) for at in range(6)]
    assert pair_of(tmp_path, left, left[::-1]).right.ties == 6


def test_conditions_that_differ_are_said_and_the_model_is_none(tmp_path):
    one, two = {"max_tokens": 48, "checkpoint": {"digest": "x"}, "read": "raw"}, {"max_tokens": 96, "read": "raw"}
    a = folder(tmp_path / "a", {"x": rows(0, 0.5)}, one)
    b = folder(tmp_path / "b", {"x": rows(0, 0.5)}, two)
    (pair,) = comparison.compare(folders.read(a), folders.read(b), "kit")
    assert pair.conditions == {"max_tokens": (48, 96)} and comparison.notes(pair) == ["max_tokens: 48 / 96"]


def test_a_main_number_that_is_no_mean_of_rows_is_said(tmp_path):
    sides = [folders.read(folder(tmp_path / name, {"x": rows(0, 0.5)})) for name in "ab"]
    sides[1].scores["benchmarks"]["x"]["kit"]["score"] = 12.25
    (pair,) = comparison.compare(*sides, "kit")
    assert comparison.notes(pair)[0].startswith(f"main number: {pair.scores[0]:.1f} / 12.2;")


def test_another_table_and_another_judge_are_said_but_not_what_judges_cost(tmp_path):
    judge = {"judge": "j1", "prompts": "1-a", "spent": {"calls": 5}}
    a = folder(tmp_path / "a", {"x": rows(0, 0.5)}, {"digest": "aa", "judge": judge})
    b = folder(tmp_path / "b", {"x": rows(0, 0.5)}, {"digest": "bb", "judge": judge | {"spent": {"calls": 7}}})
    (pair,) = comparison.compare(folders.read(a), folders.read(b), "kit")
    assert comparison.notes(pair) == ["digest: aa / bb"]


def test_lengths_are_of_all_of_right_answers_and_with_the_share_cut():
    found = comparison.lengths(
        [answered(1, True, tokens=10), answered(2, False, tokens=50, finish="length"), answered(3, True, tokens=None),
         answered(4, False, finish="", tokens=0), answered(5, False, tokens=None, failed="no server")],
        "kit",
    )  # fmt: skip
    assert (found["tokens"], found["tokens_right"], found["right"], found["failed"]) == (20, 10, 0.4, 0.2)
    assert found["cut"] == pytest.approx(1 / 3)
    assert comparison.lengths([answered(1, False, tokens=None)], "kit")["tokens_right"] is None


def test_nothing_in_common_is_an_error(tmp_path):
    a, b, c = (
        folders.read(folder(tmp_path / name, {benchmark: [answered(index, True)]}))
        for name, benchmark, index in (("a", "x", 1), ("b", "y", 1), ("c", "x", 2))
    )
    with pytest.raises(InputError, match="no benchmark in common"):
        comparison.compare(a, b, "kit")
    with pytest.raises(InputError, match="no question of x in common"):
        comparison.compare(a, c, "kit")


def test_p_values_are_adjusted_over_the_benchmarks(tmp_path):
    sides = [{"x": rows(seed, rate), "y": rows(seed, 0.5)} for seed, rate in ((0, 0.3), (1, 0.9))]
    a, b = (folders.read(folder(tmp_path / str(at), side)) for at, side in enumerate(sides))
    pairs = comparison.compare(a, b, "official")
    assert [pair.p_holm for pair in pairs] == statistics.holm([pair.right.p for pair in pairs])


def run(tmp_path, *paths):
    parser = argparse.ArgumentParser()
    compare.add_arguments(parser)
    output = tmp_path / "out.json"
    return compare.run(parser.parse_args([*map(str, paths), "--output", str(output)])), json.loads(output.read_text())


def test_the_command_prints_80_columns_without_folded_words(tmp_path, capsys):
    sides = [
        {LONG: rows(seed, rate, count=1200), "pope": rows(seed, 0.5)} for seed, rate in ((0, 0.3), (1, 0.9), (2, 0.3))
    ]
    paths = [folder(tmp_path / f"evaluation_{at}", side, {"limit": at}) for at, side in enumerate(sides)]
    result, saved = run(tmp_path, *paths)
    printed = capsys.readouterr().err
    assert max(map(len, printed.splitlines())) <= 80
    assert printed.count(LONG) >= 6 and "1,200" in printed and "could show" in printed and "<0.001" in printed
    assert "limit: 0 / 1" in printed and "limit: 0 / 2" in printed
    assert result["differ"] == {"B": [LONG], "C": []}
    assert saved["B"]["benchmarks"][LONG]["right"]["rows"] == 1200
    assert saved["C"]["path"].endswith("evaluation_2")


def test_one_folder_is_nothing_to_compare(tmp_path):
    with pytest.raises(InputError, match="two evaluations"):
        run(tmp_path, folder(tmp_path / "a", {"x": rows(0, 0.5)}))
