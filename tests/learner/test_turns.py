"""Trainer and engine on the same devices: in which order they have them, and that nothing is lost on the way."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from capcur_jax.errors import InputError
from capcur_jax.learner.residence import Residence
from capcur_jax.learner.trainer import Trainer
from capcur_jax.learner.turns import Turns


def noting(calls, *names):
    return types.SimpleNamespace(**{name: (lambda *a, n=name: calls.append(n) or {}) for name in names})


def test_trainer_and_servers_take_turns_in_this_order():
    calls = []
    engine, trainer = noting(calls, "release", "resume"), noting(calls, "enter", "leave", "parameters")
    engine.update_weights = lambda parameters, version: calls.append(f"weights {version}") or {"write": 1.0}
    trainer.away, turns = True, Turns(trainer, engine, shared=True)
    turns.begin_stage()
    calls.append("the stage's state and programs")
    assert turns.hand_over(4) == {"write": 1.0}  # sampling comes first
    assert calls == ["release", "the stage's state and programs", "leave", "resume", "parameters", "weights 4"]
    calls.clear()
    turns.begin_update()
    calls.append("the update")
    turns.hand_over(6)
    assert calls == ["release", "enter", "the update", "leave", "resume", "parameters", "weights 6"]
    # An imitation step samples nothing: the trainer keeps the devices, and the engine its weights.
    calls.clear()
    turns.begin_update()
    trainer.away = False
    turns.begin_update()
    assert calls == ["release", "enter"]


def test_side_by_side_weights_alone_are_handed_over():
    calls = []
    turns = Turns(noting(calls, "parameters"), noting(calls, "update_weights"), shared=False)
    turns.begin_stage()
    turns.begin_update()
    turns.hand_over(1)
    assert calls == ["parameters", "update_weights"]


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


def test_a_home_on_the_host_and_one_that_does_not_exist():
    tree, own = {"a": jnp.arange(3.0)}, jnp.zeros(1).sharding.memory_kind
    home = Residence("pinned_host", tree, "config.optimizer.memory")
    resting = home.rest(tree)
    assert resting["a"].sharding.memory_kind == "pinned_host"
    back = home.work(resting)
    assert back["a"].sharding.memory_kind == own
    np.testing.assert_array_equal(back["a"], tree["a"])
    assert Residence("device", tree, "").rest(tree) is tree and Residence("pinned_host", None, "").rest(None) is None
    with pytest.raises(InputError, match=r"config\.optimizer\.memory = 'disk'; choose one of device, pinned_host"):
        Residence("disk", tree, "config.optimizer.memory")
