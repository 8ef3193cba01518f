"""Rollouts drawn in turns and ahead of time, from engines that a script stands for."""

import dataclasses
import threading
import types
from typing import NamedTuple

import numpy as np
import pytest

from capcur_jax.errors import RolloutError
from capcur_jax.records import metrics
from capcur_jax.rewards.reward import Score
from capcur_jax.rollout.collector import Collector
from capcur_jax.rollout.engine import Health, Sample, Span
from capcur_jax.rollout.groups import Grading, Group, Rollout

WAIT, SEED = 10, 3


class Example(NamedTuple):
    number: int
    prompt: str

    @property
    def problem(self):
        return types.SimpleNamespace(id=f"problem {self.number}")


class Engine:
    """Answers with the version that it has when a prompt is asked; `gate` holds the answers back."""

    def __init__(self, images=False):
        self.version, self.calls, self.gate, self.images = 0, [], threading.Event(), images
        self.gate.set()
        self.began = threading.Event()

    def health(self):
        return Health(self.version, tokens_per_second=10.0 * len(self.calls))

    def generate(self, prompts, sampling, n, seed, images, done):
        version = self.version
        assert images == self.images
        self.calls.append((list(prompts), n, seed))
        self.began.set()
        assert self.gate.wait(WAIT)
        groups = [
            [Sample.whole(np.arange(2), np.zeros(2, np.float32), "stop", version) for _ in range(n)] for _ in prompts
        ]
        for number, samples in enumerate(groups):
            done(number, samples)
        return groups


class Grades:
    """Begun grades name the example; `scores` makes a group's."""

    def __init__(self, scores=lambda example: []):
        self.scores, self.begun = scores, []

    def begin(self, example, samples):
        self.begun.append(example.number)
        return example.number, samples

    def __call__(self, examples, drawn, begun):
        for example, samples, grade in zip(examples, drawn, begun, strict=True):
            assert grade is None or (grade[0] == example.number and len(grade[1]) == len(samples))
        return [Group(e, s, [], self.scores(e), np.zeros(len(s))) for e, s in zip(examples, drawn, strict=True)]


class Loop:
    """A training loop of nothing but numbers around a Collector: two updates a step, seed 3."""

    def __init__(self, async_steps, updates=2, retries=0, images=False, grading=None):
        self.engine, self.step, self.version, self.timer = Engine(images), 0, 0, metrics.PhaseTimer()
        settings = types.SimpleNamespace(async_steps=async_steps, group=3, dynamic_retries=retries)
        sizes = {"local": 2, "images": images, "updates": updates, "capabilities": ("a", "b")}
        self.collector = Collector(
            self.engine, None, grading or Grades(), batches(), **sizes, settings=settings, seed=SEED
        )

    def collect(self):
        return self.collector.step(self.timer, self.step, self.version)

    def ahead(self):
        self.collector.ahead(self.timer, self.step + 1)

    def update(self):
        """The trainer's: new weights in the engine."""
        self.step, self.version = self.step + 1, self.version + 2
        self.engine.version = self.version


def seed_of(step, attempt=0):
    return (1_000_003 * SEED + 104_729 * step + 15_485_863 * attempt + 1) % 2**32


def batches():
    number = iter(range(10**6))
    while True:
        yield [Example(i, f"p{i}") for i in (next(number), next(number))]


def ages(rollout: Rollout) -> set[int]:
    return {rollout.version - sample.version for sample in rollout.samples}


def test_in_turns_every_batch_comes_from_the_weights_that_it_trains():
    loop = Loop(async_steps=0)
    with loop.collector:
        for step in range(3):
            rollout = loop.collect()
            loop.ahead()  # nothing is drawn ahead
            assert [group.example.number for group in rollout.groups] == [2 * step, 2 * step + 1]
            assert ages(rollout) == {0} and rollout.renewed == 0 and rollout.batches == 1
            assert rollout.tokens_per_second == 10.0 * (step + 1) and rollout.capabilities == ("a", "b")
            assert set(loop.timer.seconds) == {"data", "rollout", "reward"}
            loop.update()
    assert loop.engine.calls == [([f"p{2 * s}", f"p{2 * s + 1}"], 3, seed_of(s)) for s in range(3)]


def test_ahead_the_next_batch_is_sampled_while_the_trainer_works():
    loop = Loop(async_steps=1)
    with loop.collector:
        assert ages(loop.collect()) == {0}
        for step in range(1, 4):
            loop.engine.began.clear()
            loop.engine.gate.clear()
            loop.timer.reset()
            loop.ahead()
            assert set(loop.timer.seconds) == {"data"}
            assert loop.engine.began.wait(WAIT)  # it is being sampled, and this thread goes on
            loop.update()
            loop.engine.gate.set()
            rollout = loop.collect()  # counts it: what a checkpoint of before goes on from draws it again
            assert [group.example.number for group in rollout.groups] == [2 * step, 2 * step + 1]
            assert ages(rollout) == {2} and rollout.renewed == 0 and rollout.batches == 1
    assert [seed for _, _, seed in loop.engine.calls] == [
        seed_of(s) for s in range(4)
    ]  # of the steps that train on them


@pytest.mark.parametrize("async_steps", [0, 1])
def test_samples_that_are_too_old_are_drawn_again(async_steps):
    """An engine that stayed at old weights, until it is asked once more."""
    loop = Loop(async_steps)
    generate, stuck = loop.engine.generate, []

    def late(prompts, *rest):
        groups = generate(prompts, *rest)
        if len(prompts) == 2:  # the whole batch, not the one group of it that is asked again
            spans = Span(loop.version - 4, 0, 1), Span(loop.version, 1, 2)
            groups[1][2] = dataclasses.replace(groups[1][2], spans=spans)
            stuck.append(groups[1][2])
        return groups

    loop.engine.generate = late
    for _ in range(3):
        loop.update()
    with loop.collector:
        rollout = loop.collect()
    assert rollout.renewed == 1 and ages(rollout) == {0} and all(sample is not stuck[0] for sample in rollout.samples)
    assert loop.engine.calls[1] == (["p1"], 3, seed_of(3, 1000)) and rollout.batches == 1
    assert rollout.tokens_per_second == 10.0  # of the whole batch's call, not of the one group's


def refusing(loop, *prompts):
    """The loop's engine refuses these."""
    generate = loop.engine.generate
    loop.engine.generate = lambda asked, *rest: [
        [] if prompt in prompts else group for prompt, group in zip(asked, generate(asked, *rest), strict=True)
    ]
    loop.engine.health = lambda: Health(0, refusal="HTTP 400: not to my taste")


@pytest.mark.parametrize("async_steps", [0, 1])
def test_the_next_problem_takes_the_place_of_one_that_is_refused(async_steps):
    loop = Loop(async_steps)
    refusing(loop, "p0")
    with loop.collector:
        rollout = loop.collect()
        assert [group.example.number for group in rollout.groups] == [2, 1] and rollout.refused == ["problem 0"]
        assert rollout.batches == 1  # a run that goes on from here begins at the next batch, and asks p0 never again
        loop.ahead()
        loop.update()
        rollout = loop.collect()
        assert [group.example.number for group in rollout.groups] == [2, 3] and rollout.refused == []


def test_a_share_of_refused_prompts_ends_the_run():
    loop = Loop(0)
    refusing(loop, "p0", "p1")
    with loop.collector, pytest.raises(RolloutError, match=r"refused 2 of 2 prompts.*HTTP 400: not to my taste"):
        loop.collect()


def test_an_engine_that_stays_at_old_weights_trains_nothing():
    loop = Loop(async_steps=1)
    for _ in range(2):
        loop.update()
    loop.engine.version, generate = 1, loop.engine.generate

    def one_is_newer(*given):
        return [[*group[:-1], dataclasses.replace(group[-1], spans=(Span(4, 0, 2),))] for group in generate(*given)]

    loop.engine.generate = one_is_newer
    with loop.collector, pytest.raises(RolloutError, match=r"version 1, .* trainer is at 4 and may be 2 ahead"):
        loop.collect()


def test_an_error_of_the_engine_reaches_the_step_that_needs_the_samples():
    loop = Loop(async_steps=1, updates=1)
    with loop.collector:
        loop.collect()
        loop.engine.generate = lambda *_: 1 / 0
        loop.ahead()
        with pytest.raises(ZeroDivisionError):
            loop.collect()


@pytest.mark.parametrize("async_steps", [0, 1])
def test_a_step_that_draws_again_takes_new_problems_and_another_stream_of_samples(async_steps):
    """All rewards of the first batch are equal, and in either batch a group is too old at first."""

    def second_differs(example):
        scores = [types.SimpleNamespace(reward=float(i)) for i in range(3)]
        return scores if example.number >= 2 else scores[:1] * 3

    loop = Loop(async_steps, retries=2, images=True, grading=Grades(second_differs))
    loop.engine.version = loop.version = 8
    generate = loop.engine.generate

    def late(prompts, *rest):
        groups = generate(prompts, *rest)
        if len(prompts) == 2:
            groups[0][0] = dataclasses.replace(groups[0][0], spans=(Span(4, 0, 2),))
        return groups

    loop.engine.generate = late
    with loop.collector:
        loop.collector.ahead(loop.timer, loop.step)  # of this very step
        rollout = loop.collect()
    assert [group.example.number for group in rollout.groups] == [2, 3]
    assert (rollout.batches, rollout.renewed, rollout.drawn, rollout.dropped_equal) == (2, 2, 4, 2)
    assert loop.engine.calls == [
        (["p0", "p1"], 3, seed_of(0)), (["p0"], 3, seed_of(0, 1000)),
        (["p2", "p3"], 3, seed_of(0, 1)), (["p2"], 3, seed_of(0, 1001)),
    ]  # fmt: skip


# ---------------------------------------------------------------------- grading meanwhile


class SlowReward:
    """Grades two groups at a time. The samples' first token is their group's number; that of `hangs` is graded once all
    others have been."""

    parallel = 2

    def __init__(self, others, hangs=None):
        self.graded, self._others, self._hangs = threading.Semaphore(0), others, hangs

    def score(self, problems, responses):
        number = int(responses[0])
        if number == self._hangs:
            for _ in range(self._others):
                assert self.graded.acquire(timeout=WAIT)
        else:
            self.graded.release()
        return [Score(float(number), 1.0, 1.0, response) for response in responses]

    def check(self, scores):
        assert len(scores) == 3 * (self._others + 1)


def graded_loop(reward, numbers, async_steps=0, between=lambda number: None):
    """A loop whose engine samples these groups one after the other; `between` is told of each that was."""
    grading = Grading(reward, lambda tokens: str(tokens[0]), lambda rewards: rewards - 1)
    loop = Loop(async_steps, grading=grading)
    loop.collector._local = len(numbers)
    loop.collector._batches = iter([[Example(i, f"p{i}") for i in numbers]])

    def generate(prompts, sampling, n, seed, images, done):
        groups = []
        for i, prompt in enumerate(prompts):
            number = np.full(2, int(prompt[1:]))
            groups.append([Sample.whole(number, np.zeros(2, np.float32), "stop", 0) for _ in range(n)])
            done(i, groups[-1])
            between(i)
        return groups

    loop.engine.generate = generate
    return loop


@pytest.mark.parametrize("async_steps", [0, 1])
def test_a_group_is_graded_while_others_are_sampled(async_steps):
    reward = SlowReward(others=2)

    def wait(number):
        assert reward.graded.acquire(timeout=WAIT)  # sampling goes on when the group is graded

    loop = graded_loop(reward, [4, 5, 6], async_steps, wait)
    with loop.collector:
        if async_steps:
            loop.collector.ahead(loop.timer, loop.step)
        groups = loop.collect().groups
    assert [group.rewards.tolist() for group in groups] == [[4.0] * 3, [5.0] * 3, [6.0] * 3]
    assert [group.advantages.tolist() for group in groups] == [[3.0] * 3, [4.0] * 3, [5.0] * 3]
    assert [group.responses for group in groups] == [["4"] * 3, ["5"] * 3, ["6"] * 3]


def test_a_grade_that_hangs_holds_up_no_other():
    """It is the first one, and ends when all others have been graded."""
    loop = graded_loop(SlowReward(others=5, hangs=7), [7, 1, 2, 3, 4, 5])
    with loop.collector:
        assert [group.rewards[0] for group in loop.collect().groups] == [7, 1, 2, 3, 4, 5]


def test_a_reward_that_wants_the_whole_batch_gets_it_when_all_are_sampled():
    asked = []

    def reward(problems, responses):
        asked.append([problem.id for problem in problems])
        return [Score(float(response), 1.0, 1.0, response) for response in responses]

    reward.parallel = 0
    loop = graded_loop(reward, [8, 9], between=lambda number: asked.append(number))
    with loop.collector:
        assert [group.rewards.tolist() for group in loop.collect().groups] == [[8.0] * 3, [9.0] * 3]
    assert asked == [0, 1, ["problem 8"] * 3 + ["problem 9"] * 3]


def test_closing_waits_for_no_samples():
    loop = Loop(async_steps=1)
    with loop.collector:
        loop.engine.gate.clear()
        loop.ahead()
        drawn = loop.collector._ahead.drawn
        assert loop.engine.began.wait(WAIT)
    assert not drawn.done()
    loop.engine.gate.set()
    drawn.result(WAIT)
