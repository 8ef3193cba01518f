"""Held-out accuracy: which questions are asked, how, and what is counted, with an engine that a script stands for."""

import contextlib
import dataclasses
import math
import types

import numpy as np
import pytest

from capcur_jax import presets
from capcur_jax.data.problem import Problem
from capcur_jax.errors import InputError
from capcur_jax.evaluation import heldout
from capcur_jax.evaluation.heldout import Heldout
from capcur_jax.interruption import Interrupted
from capcur_jax.models.batching import PromptSize
from capcur_jax.models.inputs import BadInput
from capcur_jax.rewards.reward import Score
from capcur_jax.rollout.engine import Sample, Sampling

SLOTS = 2  # batches of 8


def problems(name, count, images=()):
    """Answers are the lengths that the engine is going to give, but for each fourth one's."""
    wrong = {i for i in range(count) if i % 4 == 3}
    return [
        Problem(f"{name}{i}", f"{name} {i}?", "x" if i in wrong else str(i % 5 + 1), images, kind=f"kind {i % 3}")
        for i in range(count)
    ]


class Engine:
    """The answer to question number i is i % 5 + 1 tokens long."""

    def __init__(self):
        self.calls, self.warmed = [], []

    def generate(self, prompts, sampling, n, seed, images):
        self.calls.append(types.SimpleNamespace(prompts=prompts, sampling=sampling, n=n, seed=seed, images=images))
        lengths = [int("".join(filter(str.isdigit, prompt))) % 5 + 1 for prompt in prompts]
        return [[Sample.whole(np.arange(k), np.zeros(k, np.float32), "stop", 0)] for k in lengths]

    def warm_up(self, sizes, sampling, group, images):
        self.warmed.append((sizes, sampling, group, images))


class Builder:
    """A prompt is its question; those of `bad` do not fit."""

    processor = types.SimpleNamespace(response=lambda tokens: str(len(tokens)))

    def __init__(self, bad=(), placement="suffix"):
        self.bad, self.placement = set(bad), placement

    def placing(self, placement):
        return self if placement == self.placement else Builder(self.bad, placement)

    def try_build(self, problem):
        mark = "" if self.placement == "suffix" else f"({self.placement}) "
        return None if problem.id in self.bad else mark + problem.problem

    def measure(self, problem):
        if problem.id in self.bad:
            raise BadInput("too long")
        return PromptSize(int("".join(filter(str.isdigit, problem.id))))

    def reasons(self):
        return "too long"


def reward(asked, responses):
    """One token is no well-formed answer."""
    return [
        Score(0.0, float(problem.answer == response), float(response != "1"), response)
        for problem, response in zip(asked, responses, strict=True)
    ]


class House:
    """A Heldout over two sets, and what it did: bars opened, counts told, questions to stop asked."""

    def __init__(self, bad=(), stop=lambda: None, **changes):
        self.config = presets.laptop()
        self.config.update_from_flattened_dict(
            {
                "seed": 7, "rollout.slots": SLOTS, "rollout.max_new_tokens": 8,
                "evaluation.sets": ("perception", "text"), "evaluation.questions": 10, "validation.questions": 4,
                "evaluation.temperature": 0.25, "validation.temperature": 0.5, **changes,
            }
        )  # fmt: skip
        self.splits = {
            (name, split): problems(f"{name}-{split}", count, images)
            for name, images in (("perception", ("a.png",)), ("text", ()))
            for split, count in (("test", 13), ("validation", 6))
        }
        sets = types.SimpleNamespace(problems=lambda name, split: self.splits[name, split], drawn=self.drawn)
        self.engine, self.bars = Engine(), []
        self.heldout = Heldout(self.config, sets, self.engine, Builder(bad), reward, self._progress, stop)

    @contextlib.contextmanager
    def _progress(self, title, total):
        told = []
        self.bars.append((title, total, told))
        yield told.append

    def asked(self):
        return [prompt for call in self.engine.calls for prompt in call.prompts]

    def drawn(self, name, split, count):
        """Not the first ones; see tests/data/test_draw.py."""
        return self.splits[name, split][-count:]

    def questions(self, split, count):
        return [problem.problem for name in ("perception", "text") for problem in self.drawn(name, split, count)]


def test_the_test_questions_that_are_drawn_of_each_set_are_asked_and_counted():
    house = House()
    first, second = house.heldout.evaluate("base")
    assert house.asked() == house.questions("test", 10)
    assert [len(call.prompts) for call in house.engine.calls] == [8, 2, 8, 2]
    assert {(call.n, call.sampling) for call in house.engine.calls} == {(1, Sampling(8, 0.25))}
    assert [call.images for call in house.engine.calls] == [True, True, False, False]
    seeds = [call.seed for call in house.engine.calls]
    assert seeds[0] == 7 and seeds[0] != seeds[1] and seeds[:2] == seeds[2:]  # batches of a set share no noise
    assert house.bars == [("evaluating (base)", 20, [8, 2, 8, 2])]
    assert (first["capability"], second["capability"]) == ("perception", "text")
    # Of ten, numbers 3 to 12, 3, 7 and 11 are answered wrongly, 5 and 10 with one token; lengths are 1 to 5, twice.
    assert (first["accuracy"], first["format"], first["response_length"], first["questions"]) == (0.7, 0.8, 3.0, 10)
    assert (first["accuracy_answered"], first["left_out"], first["timed_out"]) == (0.7, 0, 0)
    # Kinds by number modulo 3: 3 6 9 12, 4 7 10, 5 8 11.
    assert first["by_kind"] == {"kind 0": 3 / 4, "kind 1": 2 / 3, "kind 2": 2 / 3}
    assert [p.problem for p in house.heldout.questions("text")] == house.questions("test", 10)[10:]


def test_validation_asks_other_questions_in_its_own_way():
    house = House()
    results = house.heldout.validate("text")
    assert house.asked() == house.questions("validation", 4)
    assert {(call.n, call.sampling) for call in house.engine.calls} == {(1, Sampling(8, 0.5))}
    assert house.bars == [("validating (text)", 8, [4, 4])]
    assert [(r["capability"], r["accuracy"], r["questions"]) for r in results] == [
        ("perception", 0.75, 4),
        ("text", 0.75, 4),
    ]


def test_the_base_trained_models_and_validation_are_asked_in_their_own_ways():
    house = House(**{"evaluation.instruction": "system", "evaluation.base_instruction": "none"})
    asked = []
    for ask, label in (
        (house.heldout.evaluate, "base"),
        (house.heldout.evaluate, "text"),
        (house.heldout.validate, ""),
    ):
        ask(label)
        asked.append(house.asked())
        house.engine.calls.clear()
    plain = house.questions("test", 10)
    assert asked == [
        [f"(none) {question}" for question in plain],
        [f"(system) {question}" for question in plain],
        house.questions("validation", 4),
    ]
    assert {name: builder.placement for name, builder in house.heldout.builders.items()} == {
        "training": "suffix", "evaluation": "system", "base": "none",
    }  # fmt: skip


def test_no_limit_asks_all_and_the_split_is_the_config_s():
    changes = {"evaluation.questions": 0, "evaluation.split": "validation", "validation.questions": 0}
    house = House(**changes)
    assert [result["questions"] for result in house.heldout.evaluate("base")] == [6, 6]
    assert house.asked() == house.questions("validation", 6)
    assert [result["questions"] for result in house.heldout.validate("text")] == [6, 6]


def test_a_signal_ends_an_evaluation_between_batches_and_no_validation():
    calls = []

    def stop():
        calls.append(len(house.engine.calls))
        if len(calls) == 2:
            raise Interrupted("SIGTERM")

    house = House(stop=stop)
    house.heldout.validate("text")
    assert not calls  # the checkpoint of that step is to have the figure
    house.engine.calls.clear()
    with pytest.raises(Interrupted):
        house.heldout.evaluate("base")
    assert calls == [1, 2]


def test_what_is_left_out_counts_as_wrong_beside_the_accuracy_of_the_answered():
    house = House(bad=[f"perception-test{i}" for i in (3, 5, 8, 11, 12)])
    first, second = house.heldout.evaluate("base")
    # 4, 6, 9 and 10 are right, 7 is wrong.
    assert (first["questions"], first["left_out"]) == (5, 5)
    assert (first["accuracy"], first["accuracy_answered"]) == (0.4, 0.8)
    assert first["response_length"] == 3.2 and first["format"] == 0.8  # of what was said
    assert first["by_kind"] == {"kind 0": 2 / 4, "kind 1": 2 / 3, "kind 2": 0.0}  # none of kind 2 was answered
    assert (second["questions"], second["left_out"], second["accuracy"]) == (10, 0, second["accuracy_answered"])
    assert house.heldout.validate("text")[0]["left_out"] == 0
    house = House(bad=[f"text-validation{i}" for i in range(6)])
    with pytest.raises(InputError, match="no validation question of 'text' can be used: too long"):
        house.heldout.validate("text")


def test_one_image_among_the_questions_of_a_set_is_enough():
    mixed = problems("mixed", 12)
    mixed[9:] = problems("mixed", 12, ("a.png",))[9:]
    engine = Engine()
    heldout.evaluate(mixed, engine=engine, builder=Builder(), reward=reward, sampling=Sampling(8), batch=4)
    assert [call.images for call in engine.calls] == [True] * 3  # one program for all of its batches
    house = House()
    house.splits["text", "validation"] = mixed[8:]
    house.heldout.warm_up()
    assert [images for *_, images in house.engine.warmed] == [True, True]


def test_problems_without_a_kind_count_in_the_mean_alone():
    plain = [Problem("0", "0?", "1"), Problem("1", "1?", "2", kind="k"), Problem("2", "2?", "x")]
    result = heldout.evaluate(plain, engine=Engine(), builder=Builder(), reward=reward, sampling=Sampling(8))
    assert result["accuracy"] == 2 / 3 and result["by_kind"] == {"k": 1.0} and result["questions"] == 3
    none = heldout.evaluate([], engine=Engine(), builder=Builder(), reward=reward, sampling=Sampling(8))
    assert math.isnan(none["accuracy"]) and none["questions"] == 0 and none["by_kind"] == {}


def test_warm_up_measures_what_validation_asks():
    house = House(bad=["perception-validation3"])
    house.heldout.warm_up()
    sampling = Sampling(8, 0.5)
    assert house.engine.warmed == [
        ([PromptSize(2), PromptSize(4), PromptSize(5)], sampling, 1, True),
        ([PromptSize(i) for i in range(2, 6)], sampling, 1, False),
    ]
    house = House(bad=[f"text-validation{i}" for i in range(6)])
    house.heldout.warm_up()  # `validate` says that none fits
    assert len(house.engine.warmed) == 1


def test_processes_share_the_questions_and_report_the_same(monkeypatch):
    alone = House()
    expected = alone.heldout.evaluate("base")
    sums, houses, exchange = [], [], heldout.distributed.exchange
    for process in range(3):
        monkeypatch.setattr("jax.process_count", lambda: 3)
        monkeypatch.setattr("jax.process_index", lambda process=process: process)
        seen = []
        monkeypatch.setattr(heldout.distributed, "exchange", lambda v, seen=seen: seen.append(v) or np.stack([v]))
        houses.append(House())
        houses[-1].heldout.evaluate("base")
        sums.append(seen)
    monkeypatch.undo()
    assert heldout.distributed.exchange is exchange
    assert sorted(prompt for house in houses for prompt in house.asked()) == sorted(alone.asked())
    assert all(house.bars == alone.bars for house in houses)  # of all processes' questions
    # What each of them gets when the sums of all are exchanged.
    for process in range(3):
        monkeypatch.setattr("jax.process_count", lambda: 3)
        monkeypatch.setattr("jax.process_index", lambda process=process: process)
        rounds = iter(zip(*sums, strict=True))
        monkeypatch.setattr(heldout.distributed, "exchange", lambda _, rounds=rounds: np.stack(next(rounds)))
        assert House().heldout.evaluate("base") == expected


def test_answers_without_a_verdict_in_time_are_counted():
    def late(asked, responses):
        return [
            score if i else dataclasses.replace(score, timed_out=True)
            for i, score in enumerate(reward(asked, responses))
        ]

    result = heldout.evaluate(
        problems("p", 12), engine=Engine(), builder=Builder(), reward=late, sampling=Sampling(8), batch=4
    )
    assert result["timed_out"] == 3 and result["left_out"] == 0


def test_what_is_asked_is_described_for_evaluation_and_validation():
    found = House().heldout.composition()
    assert list(found) == ["evaluation"] and found["evaluation"]["split"] == "test"
    found = House(**{"validation.every": 1}).heldout.composition()
    text = found["validation"]["sets"]["text"]
    assert text == {
        "questions": 4, "of": 6, "kinds": {"kind 2": 0.5, "kind 0": 0.25, "kind 1": 0.25}, "sources": {},
        "ids": ["text-validation2", "text-validation3", "text-validation4", "text-validation5"],
    }  # fmt: skip
    assert found["evaluation"]["sets"]["perception"]["of"] == 13


def test_the_standard_error_counts_questions_about_one_image_as_one():
    def error(images):
        # The engine's answers go 1, 2, 3, 4, 5, 1, ...; the right ones are those of whole tens of questions.
        asked = [
            Problem(str(i), f"{i}?", str(i % 5 + 1) if i // 10 % 2 else "x", images(i), kind="k") for i in range(100)
        ]
        found = heldout.evaluate(asked, engine=Engine(), builder=Builder(), reward=reward, sampling=Sampling(8))
        assert found["accuracy"] == 0.5
        return found["standard_error"]

    assert error(lambda i: ()) == error(lambda i: (f"{i}.png",)) == pytest.approx(0.5 / math.sqrt(99))
    assert error(lambda i: (f"{i // 10}.png",)) == pytest.approx(0.5 / math.sqrt(9))
    assert math.isnan(error(lambda i: ("a.png",)))
