"""A run whose trainer and engine take turns on the same devices: two stages, real updates, checkpoints and exports.

The engine is the local one, which stands for servers that give their memory away."""

import json

import jax
import pytest

from capcur_jax import presets, sharding
from capcur_jax.rollout import choose
from capcur_jax.rollout.local import LocalEngine
from capcur_jax.train import train

pytestmark = pytest.mark.usefixtures("quick_compilation")


def small(steps):
    config = presets.get("laptop", ("perception", "text"))
    with config.unlocked():
        config.rollout.update({"max_new_tokens": 8, "group": 2, "slots": 4, "prefill": 2})
        config.prompt.update({"token_buckets": (96,)})
        config.packing.update({"buckets": ((8,),), "micro_prompts": 0})
        config.evaluation.update({"questions": 2, "blind": False})
        config.log.tensorboard = False
        config.checkpointing.every = 1
        for stage in ("perception", "text"):
            config.stages[stage].update({"prompts": 2, "steps": steps})
    return config


def step_records(workdir):
    records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [record for record in records if record["type"] == "step"]


def test_turns_change_where_arrays_lie_and_no_result(tmp_path, monkeypatch):
    together = small(1)
    train(together, tmp_path / "together", quiet=True)
    turns = small(1)
    with turns.unlocked():
        turns.rollout.engine = "sglang"
        turns.rollout.sglang.update({"colocate": True, "python": "python"})
    calls, seen = [], []

    class Engine(LocalEngine):
        def release(self):
            calls.append("release")

        def resume(self):
            calls.append("resume")

        def update_weights(self, parameters, version):
            seen.append({leaf.sharding.memory_kind for leaf in jax.tree.leaves(parameters)})
            return super().update_weights(sharding.on_devices(parameters), version)

    def open_engine(config, model, processor, *, buckets, mesh, **_):
        return Engine(model, processor, slots=4, prefill=2, buckets=buckets, mesh=mesh)

    monkeypatch.setattr(choose, "open_engine", open_engine)
    train(turns, tmp_path / "turns", quiet=True)
    assert calls == ["release", "resume"] * 2
    assert seen[-1] == {"pinned_host"}  # what the trainer keeps is away when the engine samples
    fields = ("loss", "grad_norm", "reward", "response_length", "kl")
    before, after = (
        [[record[field] for field in fields] for record in step_records(tmp_path / name)]
        for name in ("together", "turns")
    )
    assert before == after and len(before) == 2
    for name in ("1-perception", "final"):
        files = [tmp_path / run / "checkpoints" / name / "model.safetensors" for run in ("together", "turns")]
        assert files[0].read_bytes() == files[1].read_bytes()
