"""What is due between two steps."""

import math
import types
from unittest import mock

import pytest

from capcur_jax import train
from capcur_jax.schedule import Switch


@pytest.mark.parametrize(("accuracy", "best", "exported"), [
    (0.5, None, True), (0.5, 0.4, True), (0.5, 0.5, False), (math.nan, None, False), (math.nan, 0.4, False),
])  # fmt: skip
def test_an_accuracy_that_is_not_known_is_never_the_best(monkeypatch, accuracy, best, exported):
    monkeypatch.setattr(train.results, "validate", lambda *_: accuracy)
    monkeypatch.setattr(train.dataclasses, "replace", lambda progress, **_: progress)
    monkeypatch.setattr(train, "save", save := mock.MagicMock())
    run = mock.MagicMock()
    run.config.validation.every, run.config.checkpointing.every, run.progress.best = 1, 1, best
    assert train.end_of_step(run, types.SimpleNamespace(name="text", switch=Switch()), 0, False) is False
    assert run.export.called == exported
    save.assert_called_once_with(run, None if math.isnan(accuracy) else accuracy)
