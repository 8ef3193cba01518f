"""Pass rates: what is sampled, how it is graded and kept, and that a killed job comes to the same figures."""

import dataclasses
import json
import math

import numpy as np
import pytest
from scipy import stats

from capcur_jax.curation import difficulty
from capcur_jax.data.__main__ import main
from capcur_jax.data.draw import drawn
from capcur_jax.data.problem import Drop, Problem
from capcur_jax.data.prompts import PromptBuilder
from capcur_jax.data.rows import read_problems, write_rows
from capcur_jax.errors import InputError
from capcur_jax.records.journal import Journal
from capcur_jax.rewards.reward import Score
from capcur_jax.rollout.engine import Sample, Sampling
from tests.conftest import random_image

SAMPLES, BATCH = 4, 3


class Engine:
    """Its responses depend on seed and number alone, as the contract has it; it dies when it is told."""

    def __init__(self, dies_at=None):
        self.calls, self._dies_at = [], dies_at

    def generate(self, prompts, sampling, n, seed, images):
        if len(self.calls) == self._dies_at:
            raise KeyboardInterrupt
        self.calls.append(len(prompts))
        random = np.random.default_rng(seed)
        draw = lambda: random.integers(40, 60, random.integers(1, 6)).astype(np.int32)  # noqa: E731
        return [[Sample.whole(t := draw(), np.zeros(len(t)), "stop", 0) for _ in range(n)] for _ in prompts]


def reward(problems, responses):
    """Right is what has an even length."""
    return [Score(float(len(r) % 2 == 0), float(len(r) % 2 == 0), 0.0, r or None) for r in responses]


@pytest.fixture
def problems(tmp_path):
    rows = []
    for number in range(8):
        path = tmp_path / f"{number}.jpg"
        random_image(32, 24, seed=number).save(path)
        rows.append(Problem(str(number), f"What is {number}?", "red", (str(path),), metadata={"n": number}))
    path = tmp_path / "4.jpg"
    path.write_bytes(path.read_bytes()[:-120])  # its header is sound
    return rows


@pytest.fixture
def builder(processor):
    return PromptBuilder(processor, "suffix", 256, 64)


def measured(path, problems, builder, engine, reward=reward):
    seen = []
    with Journal(path, {"samples": SAMPLES}) as journal:
        difficulty.measure(
            problems, engine=engine, builder=builder, reward=reward, sampling=Sampling(8, 0.7), samples=SAMPLES,
            seed=3, batch=BATCH, journal=journal, images=True, progress=seen.append,
        )  # fmt: skip
        return list(difficulty.rated(problems, journal, {"model": "base"})), seen


def test_a_pass_rate_is_the_mean_of_what_the_reward_says(tmp_path, problems, builder):
    engine = Engine()
    rows, seen = measured(tmp_path / "journal", problems, builder, engine)
    assert engine.calls == [3, 2, 2] and len(seen) == 8 and seen.count("broken image") == 1
    (drop,) = [row for row in rows if isinstance(row, Drop)]
    assert drop.reason == "broken image" and "4.jpg" in drop.detail and drop.where == "row 4"
    for problem in (row for row in rows if isinstance(row, Problem)):
        assert len(problem.predictions) == len(problem.correctness) == SAMPLES
        assert problem.correctness == tuple(float(len(text) % 2 == 0) for text in problem.predictions)
        assert problem.pass_rate == sum(problem.correctness) / SAMPLES
        assert problem.pass_rate_by["model"] == "base" and problem.pass_rate_by["mean_tokens"] > 0
        assert problem.metadata == {"n": int(problem.id)}
    assert len({problem.pass_rate for problem in rows if isinstance(problem, Problem)}) > 1


def test_a_pass_rate_with_verdicts_that_timed_out_says_how_many(tmp_path, problems, builder):
    def late(problems, responses):
        return [dataclasses.replace(s, timed_out=i < 2) for i, s in enumerate(reward(problems, responses))]

    rows, _ = measured(tmp_path / "journal", problems[:3], builder, Engine(), late)
    assert [row.pass_rate_by.get("timed_out") for row in rows] == [2, None, None]


def test_a_reward_without_an_accuracy_has_no_pass_rate(tmp_path, problems, builder):
    def unknown(problems, responses):
        return [dataclasses.replace(score, accuracy=math.nan) for score in reward(problems, responses)]

    with pytest.raises(InputError, match=r"no accuracy: return"):
        measured(tmp_path / "j", problems, builder, Engine(), unknown)


@pytest.mark.parametrize("dies_at", [0, 1, 2])
def test_a_killed_job_goes_on_to_the_same_figures_without_asking_twice(tmp_path, problems, builder, dies_at):
    unbroken, _ = measured(tmp_path / "unbroken", problems, builder, Engine())
    with pytest.raises(KeyboardInterrupt):
        measured(tmp_path / "journal", problems, builder, Engine(dies_at))
    rest = Engine()
    assert measured(tmp_path / "journal", problems, builder, rest)[0] == unbroken
    assert rest.calls == [3, 2, 2][dies_at:]
    # A kill between two records of a batch: it is sampled again, what was kept stays.
    lines = (tmp_path / "journal").read_bytes().splitlines(keepends=True)
    (tmp_path / "journal").write_bytes(b"".join(lines[:5]) + lines[5][:10])
    again = Engine()
    assert measured(tmp_path / "journal", problems, builder, again)[0] == unbroken and again.calls == [2, 2]


def test_a_changed_row_is_measured_anew(tmp_path, problems, builder):
    measured(tmp_path / "journal", problems, builder, Engine())
    changed = [dataclasses.replace(problems[0], answer="blue"), *problems[1:]]
    engine = Engine()
    measured(tmp_path / "journal", changed, builder, engine)
    assert engine.calls == [3]


def test_a_changed_or_repaired_image_is_measured_anew_and_a_moved_one_is_not(tmp_path, problems, builder):
    measured(tmp_path / "journal", problems, builder, Engine())
    (tmp_path / "moved").mkdir()
    for number in (0, 1, 2):
        (tmp_path / f"{number}.jpg").rename(tmp_path / "moved" / f"{number}.jpg")
        path = str(tmp_path / "moved" / f"{number}.jpg")
        problems[number] = dataclasses.replace(problems[number], images=(path,))
    random_image(32, 24, seed=4).save(tmp_path / "4.jpg")
    engine = Engine()
    rows, seen = measured(tmp_path / "journal", problems, builder, engine)
    assert engine.calls == [3] and seen == [""] and not any(isinstance(row, Drop) for row in rows)
    random_image(32, 24, seed=70).save(tmp_path / "7.jpg")
    measured(tmp_path / "journal", problems, builder, engine)
    assert engine.calls == [3, 2]


def test_rows_that_cannot_be_measured_are_told_apart(problems, builder):
    rows = [problems[0], Problem("caption", "Describe.", "", response="A."), Problem("long", "word " * 900, "1")]
    found = list(difficulty.measurable(rows, builder))
    assert found[0][0] == problems[0] and found[0][1] == builder.measure(problems[0])
    assert [drop.reason for drop in found[1:]] == ["no answer", "unusable prompt"]


@pytest.fixture
def files(tmp_path):
    write_rows(tmp_path / "rows.jsonl", [Problem(str(n), f"What is {n} + 1?", str(n + 1)) for n in range(5)])
    settings = ["--config.prompt.token_buckets=(96,)", "--config.rollout.slots=8", "--samples", "2"]
    return [
        "difficulty", "--input", str(tmp_path / "rows.jsonl"), "--output", str(tmp_path / "out.parquet"),
        "--max_new_tokens", "8", *settings,
    ]  # fmt: skip


def test_the_command_and_its_journal(files, tmp_path, capsys):
    assert main([*files, "--limit", "4"]) == 0
    first = json.loads(capsys.readouterr().out)
    drawn_ids = {row.id for row in drawn([Problem(str(n), "", "") for n in range(5)], 4, "rows.jsonl")}
    assert {row.id for row in read_problems(tmp_path / "out.parquet")[0]} == drawn_ids != set("0123")
    assert first["explained_by_answer"] == {}
    assert first["rows"] == first["kept"] == 4 and sum(first["histogram"]) == 4 and len(first["histogram"]) == 11
    assert main(files) == 0  # one more
    rows, _ = read_problems(tmp_path / "out.parquet", images=tmp_path / "images")
    assert [row.id for row in rows] == list("01234")
    assert "always wrong" in capsys.readouterr().err
    by = rows[0].pass_rate_by
    assert (by["samples"], by["temperature"], by["max_new_tokens"], by["engine"]) == (2, 0.7, 8, "local")
    assert main([*files, "--temperature", "0.5"]) == 2
    assert "temperature 0.7, now 0.5" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--config.prompt.max_token=1"], "no such key, or it holds another type of value: 'max_token'; Did you mean"),
        (["--config.rollout.sglang.router=python"], "config.rollout.sglang.addresses"),
        (["--config.prompt.max_tokens=3"], "none of 5 rows can be measured"),
        (["--sample", "4"], "unknown argument --sample;"),
        (["--config.checkpoint="], "config.checkpoint is empty"),
        (["--config", "configs/nowhere.py"], "nowhere"),
        (["--temperature", "-1"], "temperature"),
        (["surplus"], "unknown argument 'surplus'"),
    ],
)
def test_mistakes_get_one_line(files, changes, message, capsys):
    assert main([*files, *changes]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") <= 3 or "Examples of dropped rows" in error


def test_the_help_says_how_the_release_measured(capsys):
    with pytest.raises(SystemExit):
        main(["difficulty", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "--top_p 0.9 and the instruction as a system turn (--config.prompt.instruction=system)" in said


def rated(kind, rates, seed=0):
    """100 problems of each answer, right that often in 8 samples each."""
    random = np.random.default_rng(seed)
    return [
        Problem(f"{kind}-{answer}-{n}", "?", answer, kind=kind, pass_rate=float(random.binomial(8, rate) / 8))
        for answer, rate in rates.items()
        for n in range(100)
    ]


def test_kinds_whose_pass_rates_follow_their_answers_are_told():
    """The share against scipy's F: with n rows and k answers it is (k - 1) (F - 1) / ((k - 1) F + n - k)."""
    sides, sizes = rated("side", {"left": 0.3, "right": 0.7}), rated("size", {"small": 0.4, "large": 0.6, "huge": 0.5})
    even = rated("shape", {"circle": 0.5, "square": 0.5, "triangle": 0.5})
    free = [Problem(f"sum-{n}", "?", str(n), kind="sum", pass_rate=n / 300) for n in range(300)]
    first, second = difficulty.followed([*even, *sizes, *free, *sides])
    assert (first.kind, first.rows, first.lowest[0], first.highest[0]) == ("side", 200, "left", "right")
    left, right = ([one.pass_rate for one in sides if one.answer == answer] for answer in ("left", "right"))
    F = stats.f_oneway(left, right).statistic
    assert first.share == pytest.approx((F - 1) / (F + 198))
    assert (first.lowest[1], first.highest[1]) == pytest.approx((np.mean(left), np.mean(right)))
    assert (second.kind, second.lowest[0], second.highest[0]) == ("size", "small", "large")


def test_rates_without_a_tie_to_answers_explain_nothing_on_average():
    shares = [difficulty.followed(rated("k", dict.fromkeys("abcdefgh", 0.5), seed)) for seed in range(50)]
    assert not any(shares)
    assert difficulty.followed([Problem("a", "?", "1", kind="k")] * 50) == []
    assert difficulty.followed(rated("k", {"one": 0.2})) == difficulty.followed(rated("k", {"a": 0.0, "b": 0.0})) == []
