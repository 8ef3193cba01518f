"""The main job with SGLang as its engine: every stage, a few steps, a real server."""

import json
import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.sglang
FLAGS = {
    "config.rollout.engine": "sglang",
    "config.rollout.sglang.device": "cpu",
    "config.rollout.sglang.dtype": "float32",
    "config.rollout.sglang.arguments": "('--context-length=512','--max-total-tokens=8192','--max-running-requests=16')",
    "config.rollout.max_new_tokens": "16",
    "config.packing.buckets": "((16,),)",
    "config.packing.micro_prompts": "0",
    "config.prompt.token_buckets": "(96,)",
    "config.evaluation.questions": "4",
    "config.evaluation.blind": "False",
    "config.log.tensorboard": "False",
    **{f"config.stages.{stage}.{key}": value for stage in ("perception", "text", "visual")
       for key, value in (("prompts", "4"), ("steps", "2"))},
}  # fmt: skip


def run(workdir, python, **changes):
    """Records of the steps of a run that ended well."""
    flags = {**FLAGS, "config.rollout.sglang.python": str(python), **changes}
    command = [sys.executable, "-m", "capcur_jax.main", "--config=configs/staged.py", f"--workdir={workdir}"]
    done = subprocess.run(
        [*command, *(f"--{key}={value}" for key, value in flags.items())],
        env={**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}, capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [record for record in records if record["type"] == "step"]


def test_a_staged_run_samples_what_the_trainer_would(tmp_path, sglang_python):
    steps = run(tmp_path / "run", sglang_python)
    assert [step["stage"] for step in steps] == ["perception"] * 2 + ["text"] * 2 + ["visual"] * 2
    for number, step in enumerate(steps, 1):
        # The new weights of every stage reach the server, the vision tower's among them, or leave it alone (frozen).
        assert step["logprob_difference_max"] < 1e-3
        assert step["staleness_max"] == 0 and step["renewed_groups"] == 0 and step["weight_version"] == number
        assert {"seconds_sync_gather", "seconds_sync_write", "seconds_sync_load"} <= set(step)
        assert step["rollout_tokens_per_second"] > 0 and step["rollout_restarts"] == 0
    log = (tmp_path / "run" / "sglang" / "server-0.log").read_text()
    assert "launch_server" in log or "Uvicorn" in log


def test_ahead_of_the_trainer_by_one_batch(tmp_path, sglang_python):
    """Samples come from the weights before, are corrected for it, and say so."""
    steps = run(
        tmp_path / "run",
        sglang_python,
        **{
            "config.order": "('perception',)",
            "config.stages.perception.steps": "4",
            "config.stages.perception.learning_rate": "1e-3",
            "config.rollout.async_steps": "1",
            "config.objective.sampler_correction": "truncate",
        },
    )
    assert [step["staleness_max"] for step in steps] == [0, 1, 1, 1]
    assert steps[0]["logprob_difference_max"] < 1e-3
    assert all(step["logprob_difference_max"] > 1e-3 for step in steps[1:] if step["staleness"] == 1)
