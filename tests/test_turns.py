"""A run whose trainer and engine take turns on the same devices: two stages, real updates, checkpoints and exports.

The engine is the local one, which stands for servers that give their memory away."""

import json
import sys

import jax
import pytest

from capcur_jax import policy, presets
from capcur_jax.devices import sharding
from capcur_jax.errors import InputError, RolloutError
from capcur_jax.rollout.local.engine import LocalEngine
from capcur_jax.train import train

pytestmark = pytest.mark.e2e


def small(steps):
    config = presets.get("laptop", ("perception", "text"))
    with config.unlocked():
        config.rollout.update({"max_new_tokens": 8, "group": 2, "slots": 4, "prefill": 2})
        config.prompt.update({"token_buckets": (96,)})
        config.packing.update({"shapes": ((320, 4, 64),), "groups": 4})
        config.evaluation.update({"questions": 2, "blind": False})
        config.log.tensorboard = False
        config.checkpointing.every = 1
        for stage in ("perception", "text"):
            config.stages[stage].update({"prompts": 2, "steps": steps})
    return config


def step_records(workdir):
    records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [record for record in records if record["type"] == "step"]


def open_with(engine):
    """What stands for `policy.open_engine`."""
    return lambda config, model, opened, workdir: engine(
        model, opened.processor, slots=4, prefill=2, buckets=opened.buckets
    )


def test_turns_change_where_arrays_lie_and_no_result(tmp_path, monkeypatch):
    together = small(1)
    train(together, tmp_path / "together", quiet=True)
    turns = small(1)
    with turns.unlocked():
        turns.rollout.engine = "sglang"
        turns.rollout.sglang.update({"colocate": True, "python": sys.executable})
    calls, seen = [], []

    class Engine(LocalEngine):
        def release(self):
            calls.append("release")

        def resume(self):
            calls.append("resume")

        def update_weights(self, parameters, version):
            seen.append({leaf.sharding.memory_kind for leaf in jax.tree.leaves(parameters)})
            return super().update_weights(sharding.on_devices(parameters), version)

    monkeypatch.setattr(policy, "open_engine", open_with(Engine))
    train(turns, tmp_path / "turns", quiet=True)
    # A stage's state is made, and its programs are compiled, with the servers' memory given away, as each update is.
    assert calls == ["release", "resume"] * 4
    assert all(kinds == {"pinned_host"} for kinds in seen[2:])  # the trainer is away when the engine samples
    fields = ("loss", "grad_norm", "reward", "response_length", "kl")
    before, after = (
        [[record[field] for field in fields] for record in step_records(tmp_path / name)]
        for name in ("together", "turns")
    )
    assert before == after and len(before) == 2
    for name in ("1-perception", "final"):
        files = [tmp_path / run / "checkpoints" / name / "model.safetensors" for run in ("together", "turns")]
        assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize("fault", ["packing", "weights"])
def test_a_run_that_does_not_start_leaves_no_engine_open(tmp_path, monkeypatch, fault):
    """Else its servers and its weights in memory stay. What the config alone can tell comes before it is opened."""
    config, calls = small(1), []

    class Engine(LocalEngine):
        def __init__(self, *args, **kinds):
            calls.append("open")
            super().__init__(*args, **kinds)

        def update_weights(self, parameters, version):
            if "update" in calls:
                raise RolloutError("no server is left")
            calls.append("update")  # the first one is the engine's own
            return super().update_weights(parameters, version)

        def close(self):
            calls.append("close")
            super().close()

    monkeypatch.setattr(policy, "open_engine", open_with(Engine))
    if fault == "packing":
        with config.unlocked():
            config.packing.shapes = ((40, 4, 64),)
    with pytest.raises(InputError if fault == "packing" else RolloutError):
        train(config, tmp_path / "run", quiet=True)
    assert calls == ([] if fault == "packing" else ["open", "update", "close"])
