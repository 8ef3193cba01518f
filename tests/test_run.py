"""What process 0 decides is decided for all; what a reward lacks shows before the model is opened."""

import types
from pathlib import Path
from unittest import mock

import pytest

from capcur_jax import presets, run, schedule
from capcur_jax.data.problem import Problem
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


def test_images_of_a_problem_are_counted_in_all_that_the_run_reads():
    config = presets.get("laptop", order=("perception",))
    counts = {"train": [1, 2], "validation": [3], "test": [1]}
    rows = lambda name, split: [Problem("0", "?", "7", ("a.png",) * n) for n in counts[split]]  # noqa: E731
    sets = types.SimpleNamespace(problems=rows)
    config.validation.every = 5
    stand_in = types.SimpleNamespace(config=config, sets=sets, stages=schedule.stages(config))
    assert run.Run._most_images(stand_in) == 3
    config.validation.every = 0
    assert run.Run._most_images(stand_in) == 2


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
