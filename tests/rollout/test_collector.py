"""Rollouts drawn in turns and ahead of time, from engines that a script stands for."""

import dataclasses
import threading
import types
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from capcur_jax import checks, presets
from capcur_jax.errors import InputError, RolloutError
from capcur_jax.learner.trainer import Trainer
from capcur_jax.records import metrics
from capcur_jax.rollout.collector import Drawer
from capcur_jax.rollout.engine import Health, Sample, Span
from capcur_jax.rollout.groups import Group, Rollout
from capcur_jax.run import Run

WAIT = 10


class Example(NamedTuple):
    number: int
    prompt: str


class Engine:
    """Answers with the version that it has when a prompt is asked; `gate` holds the answers back."""

    def __init__(self):
        self.version, self.calls, self.gate = 0, [], threading.Event()
        self.gate.set()
        self.began = threading.Event()

    def health(self):
        return Health(self.version, tokens_per_second=10.0 * len(self.calls))

    def generate(self, prompts, sampling, n, seed, images):
        version = self.version
        self.calls.append((list(prompts), n, seed))
        self.began.set()
        assert self.gate.wait(WAIT)
        return [
            [Sample.whole(np.arange(2), np.zeros(2, np.float32), "stop", version) for _ in range(n)] for _ in prompts
        ]


class Scripted:
    """What of a Run a Drawer touches."""

    def __init__(self, async_steps):
        rollout = types.SimpleNamespace(async_steps=async_steps, group=3, dynamic_retries=0)
        self.config = types.SimpleNamespace(rollout=rollout)
        self.engine, self.sampling, self.version, self.step, self.consumed = Engine(), None, 0, 0, 0

    def rollout_seed(self, attempt=0, ahead=0):
        return 100 * (self.step + ahead) + attempt

    def consumed_batch(self):
        self.consumed += 1

    def grade(self, examples, drawn):
        return [Group(e, s, [], [], np.zeros(len(s))) for e, s in zip(examples, drawn, strict=True)]

    def update(self):
        """The trainer's: new weights in the engine."""
        self.step, self.version = self.step + 1, self.version + 2
        self.engine.version = self.version


def batches():
    number = iter(range(10**6))
    while True:
        yield [Example(i, f"p{i}") for i in (next(number), next(number))]


def ages(rollout: Rollout) -> set[int]:
    return {rollout.version - sample.version for sample in rollout.samples}


def test_in_turns_every_batch_comes_from_the_weights_that_it_trains():
    run, timer = Scripted(async_steps=0), metrics.PhaseTimer()
    with Drawer(run, batches(), 2, images=False, updates=2) as drawer:
        for step in range(3):
            rollout = drawer.step(timer, ())
            drawer.ahead(timer)  # nothing is drawn ahead
            assert [group.example.number for group in rollout.groups] == [2 * step, 2 * step + 1]
            assert ages(rollout) == {0} and rollout.renewed == 0 and run.consumed == step + 1
            run.update()
    assert run.engine.calls == [([f"p{2 * s}", f"p{2 * s + 1}"], 3, 100 * s) for s in range(3)]


def test_ahead_the_next_batch_is_sampled_while_the_trainer_works():
    run, timer = Scripted(async_steps=1), metrics.PhaseTimer()
    with Drawer(run, batches(), 2, images=False, updates=2) as drawer:
        assert ages(drawer.step(timer, ())) == {0}
        for step in range(1, 4):
            run.engine.began.clear()
            run.engine.gate.clear()
            drawer.ahead(timer)
            assert run.engine.began.wait(WAIT)  # it is being sampled, and this thread goes on
            assert run.consumed == step  # what a checkpoint of now goes on from draws it again
            run.update()
            run.engine.gate.set()
            rollout = drawer.step(timer, ())
            assert [group.example.number for group in rollout.groups] == [2 * step, 2 * step + 1]
            assert ages(rollout) == {2} and rollout.renewed == 0 and run.consumed == step + 1
    assert [seed for _, _, seed in run.engine.calls] == [0, 100, 200, 300]  # of the steps that train on them


@pytest.mark.parametrize("async_steps", [0, 1])
def test_samples_that_are_too_old_are_drawn_again(async_steps):
    """An engine that stayed at old weights, until it is asked once more."""
    run, timer = Scripted(async_steps), metrics.PhaseTimer()
    generate, stuck = run.engine.generate, []

    def late(prompts, *rest):
        groups = generate(prompts, *rest)
        if len(prompts) == 2:  # the whole batch, not the one group of it that is asked again
            spans = Span(run.version - 4, 0, 1), Span(run.version, 1, 2)
            groups[1][2] = dataclasses.replace(groups[1][2], spans=spans)
            stuck.append(groups[1][2])
        return groups

    run.engine.generate = late
    for _ in range(3):
        run.update()
    with Drawer(run, batches(), 2, images=False, updates=2) as drawer:
        rollout = drawer.step(timer, ())
    assert rollout.renewed == 1 and ages(rollout) == {0} and all(sample is not stuck[0] for sample in rollout.samples)
    assert run.engine.calls[1] == (["p1"], 3, 300 + 1000) and run.consumed == 1


def test_an_engine_that_stays_at_old_weights_trains_nothing():
    run, timer = Scripted(async_steps=1), metrics.PhaseTimer()
    for _ in range(2):
        run.update()
    run.engine.version = 1
    with (
        Drawer(run, batches(), 2, images=False, updates=2) as drawer,
        pytest.raises(RolloutError, match=r"version 1, .* trainer is at 4 and may be 2 ahead"),
    ):
        drawer.step(timer, ())


def test_an_error_of_the_engine_reaches_the_step_that_needs_the_samples():
    run, timer = Scripted(async_steps=1), metrics.PhaseTimer()
    with Drawer(run, batches(), 2, images=False, updates=1) as drawer:
        drawer.step(timer, ())
        run.engine.generate = lambda *_: 1 / 0
        drawer.ahead(timer)
        with pytest.raises(ZeroDivisionError):
            drawer.step(timer, ())


# ---------------------------------------------------------------------- turns on the same devices


def test_trainer_and_servers_take_turns_in_this_order():
    calls = []

    def noting(*names):
        return types.SimpleNamespace(**{name: (lambda *a, n=name: calls.append(n) or {}) for name in names})

    run = types.SimpleNamespace(turns=True, engine=noting("release", "resume", "update_weights"), version=4)
    run.hand_over = lambda trainer: Run.hand_over(run, trainer)
    trainer = noting("enter", "leave", "parameters")
    trainer.away = True
    Run.begin_stage(run)
    calls.append("the stage's state and programs")
    Run.hand_over(run, trainer)  # sampling comes first
    calls = [call for call in calls if call != "parameters"]
    assert calls == ["release", "the stage's state and programs", "leave", "resume", "update_weights"]
    calls.clear()
    Run.begin_update(run, trainer)
    calls.append("the update")
    Run.publish(run, trainer, 2)
    calls = [call for call in calls if call != "parameters"]
    assert calls == ["release", "enter", "the update", "leave", "resume", "update_weights"] and run.version == 6
    # An imitation step samples nothing: the trainer keeps the devices, and the engine its weights.
    calls.clear()
    Run.begin_update(run, trainer)
    Run.publish(run, trainer, 1, sampled=False)
    trainer.away = False
    Run.begin_update(run, trainer)
    assert [call for call in calls if call != "parameters"] == ["release", "enter"] and run.version == 7


def test_what_left_the_devices_comes_back_bit_for_bit():
    arrays = {"a": jnp.arange(6.0).reshape(2, 3), "b": jnp.array([1, 2], jnp.int32)}
    trainer = Trainer(None, None, state=dict(arrays), frozen={"f": jnp.ones(3)}, sums=(jnp.zeros(2),), reference=None)
    own = jnp.zeros(1).sharding.memory_kind

    def kinds():
        whole = trainer.state, trainer.frozen, trainer.sums, trainer.reference
        return {leaf.sharding.memory_kind for leaf in jax.tree.leaves(whole)}

    trainer.enter()  # it is there
    assert kinds() == {own}
    trainer.leave()
    assert kinds() == {"pinned_host"}
    trainer.enter()
    assert kinds() == {own}
    for name, array in arrays.items():
        np.testing.assert_array_equal(trainer.state[name], array)


# ---------------------------------------------------------------------- settings that don't go together


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rollout.async_steps": 2}, "async_steps = 2; choose 0"),
        ({"rollout.async_steps": 1}, "needs config.rollout.engine = 'sglang'"),
        ({"rollout.engine": "sglang"}, "config.rollout.sglang.python"),
        ({"rollout.engine": "sglang", "rollout.sglang.python": "p"}, "the trainer would take GPUs"),
        (
            {
                "rollout.engine": "sglang", "rollout.sglang.python": "p", "mesh.gpus": (0, 1),
                "rollout.sglang.gpus": (1,),
            },
            "servers have .1, config",
        ),
        (
            {
                "rollout.engine": "sglang", "rollout.sglang.python": "p", "rollout.sglang.device": "cpu",
                "rollout.async_steps": 1,
            },
            "sampler_correction",
        ),
        (
            {
                "rollout.engine": "sglang", "rollout.sglang.python": "p", "rollout.async_steps": 1,
                "objective.sampler_correction": "truncate", "rollout.sglang.colocate": True,
            },
            "take turns; choose one",
        ),
    ],
)  # fmt: skip
def test_settings_that_do_not_go_together_are_refused(changes, message):
    config = presets.laptop()
    config.update_from_flattened_dict(changes)
    with pytest.raises(InputError, match=message):
        checks._check_rollout(config)


def test_the_presets_of_a_host_with_eight_gpus_differ_in_who_has_which():
    for name in ("qwen3_vl_8b", "qwen2_5_vl_7b"):
        split, turns = presets.get(f"{name}_split"), presets.get(f"{name}_turns")
        for config in (split, turns):
            with config.unlocked():
                config.rollout.sglang.python = "python"
            checks._check_rollout(config)
        assert not set(split.mesh.gpus) & set(split.rollout.sglang.gpus) and len(split.mesh.gpus) == 4
        assert turns.mesh.gpus == () and turns.rollout.sglang.servers == 8 and turns.rollout.sglang.colocate
