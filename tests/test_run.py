"""What process 0 decides is decided for all; what a reward lacks shows before the model is opened."""

import types
from pathlib import Path
from unittest import mock

import pytest

from capcur_jax import run
from capcur_jax.errors import InputError


def by_owner(monkeypatch, act, owner, refused):
    """Run._by_owner in a process of several; `refused`: whether process 0 met an InputError."""
    told = []
    monkeypatch.setattr(run.distributed, "agree", lambda flag: told.append(flag) or refused)
    monkeypatch.setattr(run.distributed, "is_owner", lambda: owner)
    stand_in = types.SimpleNamespace(workdir=Path("runs/here"))
    try:
        return run.Run._by_owner(stand_in, act), told
    except InputError as error:
        return str(error), told


def refuse():
    raise InputError("another run's")


@pytest.mark.parametrize(
    ("owner", "act", "refused", "given"),
    [
        (True, lambda: "lock", False, ("lock", [False])),
        (False, refuse, False, (None, [False])),  # it is not asked
        (True, refuse, True, ("another run's", [True])),
        (False, refuse, True, ("process 0 refuses runs/here, and says why", [False])),
    ],
)
def test_a_refusal_of_process_0_ends_all_of_them(monkeypatch, owner, act, refused, given):
    assert by_owner(monkeypatch, act, owner, refused) == given


def test_the_reward_opens_before_the_model(monkeypatch):
    for name in ("check_devices", "sharding", "Checkpoints", "start_anew", "make_reward"):
        monkeypatch.setattr(run, name, mock.MagicMock())
    monkeypatch.setattr(run, "goes_on_from", lambda *_: None)
    run.start_anew.return_value.seconds = 0.0
    run.make_reward.side_effect = ValueError("config.reward.function can't start")
    stand_in = mock.MagicMock(_started=0.0)
    stand_in._open_reward = lambda: run.Run._open_reward(stand_in)
    with pytest.raises(InputError, match="can't start"):
        run.Run._open(stand_in)
    stand_in._open_data.assert_called_once()
    stand_in._open_model.assert_not_called()
