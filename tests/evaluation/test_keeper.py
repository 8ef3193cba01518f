"""What a run keeps of its evaluations reads back as any evaluation does."""

import contextlib
import json
import math

import numpy as np
import pytest

from capcur_jax import presets
from capcur_jax.data.problem import Problem
from capcur_jax.data.prompts import PromptBuilder
from capcur_jax.evaluation import comparison, folders, heldout, keeper
from capcur_jax.evaluation.keeper import Keeper, drop_validations
from capcur_jax.evaluation.recorded import FAILED
from capcur_jax.rewards.reward import Score
from capcur_jax.rollout.engine import Sample, Sampling
from tests.evaluation.test_heldout import Engine, reward


@pytest.fixture
def builder(processor):
    return PromptBuilder(processor, "suffix", 60, 999)


def kept(tmp_path, builder, problems, accuracy=None):
    """Evaluates with a scripted engine: the answer to question number i is its length, i % 5 + 1."""

    class Numbers(Engine):
        def generate(self, prompts, sampling, n, seed, images):
            return super().generate([f"{len(prompt)}" for prompt in prompts], sampling, n, seed, images)

    def scored(asked, responses):
        found = reward(asked, responses)
        return found if accuracy is None else [Score(0.0, accuracy, 0.0, one.answer) for one in found]

    made = Keeper(lambda label: tmp_path / (label or "validation"), lambda: {"checkpoint": "c", "step": 3})
    kinds = dict(engine=Numbers(), builder=builder, reward=scored, sampling=Sampling(8, 0.25))
    result = heldout.evaluate(problems, keep=made.begin("text", problems, builder), **kinds)
    made.write("base", {"split": "test", "questions": 9}, kinds["sampling"], builder)
    return result


def test_every_question_is_kept_with_its_verdict_and_the_figures_are_the_records(tmp_path, builder):
    problems = [Problem(f"p{n}", f"What is {n} + 3?", str(n % 3), kind=f"k{n % 2}") for n in range(9)]
    problems.append(Problem("long", "word " * 80, "1"))
    result = kept(tmp_path, builder, problems)
    read = folders.read(tmp_path / "base")
    answered = read.answered["text"]
    assert list(answered) == [problem.id for problem in problems]
    entry = read.scores["benchmarks"]["text"]
    for mode in ("official", "kit"):
        assert entry[mode]["score"] == pytest.approx(100 * result["accuracy"])
        low, high = entry[mode]["interval"]
        assert low <= entry[mode]["score"] <= high and set(entry[mode]["kinds"]) >= {"k0", "k1"}
    assert entry["replies"]["tokens"] == pytest.approx(result["response_length"])
    assert entry["replies"]["failed"] == 0.1 and result["left_out"] == 1
    assert "60" in answered["long"].reply.failed and answered["long"].reply.text == FAILED
    said = folders.conditions(read, "text")
    assert (said["checkpoint"], said["step"], said["split"], said["temperature"]) == ("c", 3, "test", 0.25)
    assert said["instruction"] == "suffix" and said["max_new_tokens"] == 8 and said["template"] and said["max_pixels"]
    (pair,) = comparison.compare(read, read, "official")
    assert pair.right.rows == 10 and pair.right.difference == 0


def test_a_reward_on_a_scale_of_its_own_gives_no_verdict(tmp_path, builder):
    kept(tmp_path, builder, [Problem(f"p{n}", f"What is {n} + 3?", "1") for n in range(3)], accuracy=math.nan)
    read = folders.read(tmp_path / "base")
    assert read.scores["benchmarks"]["text"]["official"] == {"score": None}
    assert [one.verdicts for one in read.answered["text"].values()] == [{}] * 3


def test_process_0_writes_what_all_of_them_asked(tmp_path, builder, monkeypatch):
    problems = [Problem(f"p{n}", f"What is {n} + 3?", "1") for n in range(4)]
    parts = []
    for process in (1, 0):
        made = Keeper(lambda label: tmp_path / label, dict)
        told = made.begin("text", problems, builder)
        for place in range(process, 4, 2):
            sample = Sample.whole(np.arange(2), np.zeros(2, np.float32), "stop", 0)
            told(place, f"reply {place}", sample, Score(0.0, float(place % 2), 0.0, "x"))
        monkeypatch.setattr(keeper.distributed, "is_owner", lambda process=process: process == 0)
        monkeypatch.setattr(keeper.distributed, "gather", lambda payload: parts.append(payload) or parts[::-1])
        made.write("base", {}, Sampling(8), builder)
        assert (tmp_path / "base").exists() == (process == 0)
    answered = folders.read(tmp_path / "base").answered["text"]
    assert [one.reply.text for one in answered.values()] == [f"reply {place}" for place in range(4)]


def test_without_a_keeper_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = presets.get("laptop")
    sets = type("Sets", (), {"drawn": lambda *_: [Problem("0", "p0?", "1")]})()
    plain = type("Builder", (), {"placing": lambda self, _: self, "try_build": lambda self, p: p.problem})()
    plain.processor = type("P", (), {"response": staticmethod(lambda tokens: "1")})
    progress = lambda *_: contextlib.nullcontext(lambda count: None)  # noqa: E731
    house = heldout.Heldout(config, sets, Engine(), plain, reward, progress, lambda: None)
    assert json.dumps(house.evaluate("base")) and not list(tmp_path.iterdir())


@pytest.mark.parametrize("accuracies, keep, complete, left", [
    ((0.1, 0.2, 0.3, 0.4), 2, math.inf, (3, 4)),
    ((0.1, 0.4, 0.3, 0.4), 1, math.inf, (2, 4)),  # of equal ones the first is the best
    ((0.5, 0.4, 0.3, 0.2), 1, 4, (1, 3, 4)),  # a run killed now goes on after step 3
    ((0.5, 0.4, 0.3, 0.9), 1, 4, (1, 3, 4)),  # and its best would be step 1 again
    ((math.nan, 0.1, None, math.nan), 1, math.inf, (2, 4)),
    ((math.nan, None), 1, math.inf, (2,)),
    ((), 2, math.inf, ()),
])  # fmt: skip
def test_validations_stay_as_long_as_their_checkpoints(tmp_path, accuracies, keep, complete, left):
    others = ["base", "validation-5-notes", "final"]
    for name in (*others, *(f"validation-{step}" for step in range(1, 7))):  # steps 5 and 6 are not in the records
        (tmp_path / name / "predictions").mkdir(parents=True)
    records = [{"step": step, "accuracy": accuracy} for step, accuracy in enumerate(accuracies, 1)]
    drop_validations(tmp_path, records, keep, complete)
    assert {path.name for path in tmp_path.iterdir()} == {*others, *(f"validation-{step}" for step in left)}
