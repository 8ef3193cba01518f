"""A trainer says what is not finite."""

from types import SimpleNamespace

import numpy as np
import pytest
from flax import nnx

from capcur_jax.devices import sharding
from capcur_jax.learner.trainer import Trainer
from tests.learner.conftest import ADVANTAGES, fresh_state, replaced


def micro(batch):
    """One whose arrays are made."""
    return SimpleNamespace(batch=lambda: batch)


@pytest.fixture
def trainer(learner, parts, batch):
    trainer = Trainer(learner, sharding.single(), fresh_state(learner, parts), learner.split(parts[1])[1])
    trainer.sums = learner.zeros(trainer.state.trained, trainer.frozen, batch)
    return trainer


def test_a_gradient_that_is_not_finite_is_named(trainer, batch):
    advantages = np.where(np.arange(6) == 2, np.nan, ADVANTAGES).astype(np.float32)
    broken = [[micro(replaced(batch, advantages=advantages))]]
    trainer.step(broken, False, [1e-3])
    said = trainer.not_finite(broken, False)
    assert said.startswith("gradients that are NaN or infinite: text.") and " more" in said
    assert trainer.state.skipped == 1


def test_a_parameter_that_is_not_finite_is_named(trainer, batch):
    flat = dict(nnx.to_flat_state(trainer.state.trained))
    path = next(path for path in flat if path[0] == "text" and path[-2:] == ("down", "kernel"))
    flat[path] = flat[path].replace(flat[path][...].at[0].set(np.nan))
    trainer.state = trainer.state._replace(trained=nnx.from_flat_state(list(flat.items())))
    said = trainer.not_finite([[micro(batch)]], False)
    assert said == f"parameters that are NaN or infinite: {'.'.join(map(str, path))}"
