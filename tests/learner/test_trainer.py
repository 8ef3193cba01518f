"""A trainer that learns nothing says why, and ends."""

import jax
import numpy as np
import pytest
from flax import nnx

from capcur_jax.devices import sharding
from capcur_jax.errors import InputError
from capcur_jax.learner.trainer import IDLE_STEPS, Trainer
from tests.learner.conftest import ADVANTAGES, fresh_state, replaced


@pytest.fixture
def trainer(learner, parts, batch):
    trainer = Trainer(learner, sharding.single(), fresh_state(learner, parts), learner.split(parts[1])[1])
    trainer.sums = learner.zeros(trainer.state.trained, trainer.frozen, batch)
    return trainer


def test_a_gradient_that_is_never_finite_ends_the_stage_with_its_tensors(trainer, batch):
    advantages = np.where(np.arange(6) == 2, np.nan, ADVANTAGES).astype(np.float32)
    broken = [[replaced(batch, advantages=advantages)]]
    trainer.step(broken, False, [1e-3])
    for idle, last in ((0, True), (IDLE_STEPS - 1, False)):  # an accident: nothing is looked for
        trainer.check(idle, last, broken, False)
    for idle, last in ((1, True), (IDLE_STEPS, False)):
        with pytest.raises(InputError, match=rf"last {idle} steps was left out.*\n?.*Gradients that are .*: text\."):
            trainer.check(idle, last, broken, False)
        trainer.sums = jax.tree.map(lambda leaf: leaf * 0, trainer.sums)


def test_a_parameter_that_is_not_finite_is_named(trainer, batch):
    flat = dict(nnx.to_flat_state(trainer.state.trained))
    path = next(path for path in flat if path[0] == "text" and path[-2:] == ("down", "kernel"))
    flat[path] = flat[path].replace(flat[path][...].at[0].set(np.nan))
    trainer.state = trainer.state._replace(trained=nnx.from_flat_state(list(flat.items())))
    with pytest.raises(InputError, match=rf"Parameters that are NaN or infinite: {'.'.join(map(str, path))}\. "):
        trainer.check(IDLE_STEPS, False, [[batch]], False)
