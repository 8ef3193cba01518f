"""The main job with SGLang as its engine: every stage, a few steps, a real server."""

import json
import subprocess
import sys
import time

from tests import tiny
from tests.rollout.sglang.conftest import ROOT

FLAGS = {
    **{f"config.{key}": value for key, value in tiny.SETTINGS.items()},
    "config.reward.function": "tests.own_rewards:by_length",  # a random model's groups differ in nothing else
    "config.rollout.engine": "sglang",
    "config.rollout.sglang.device": "cpu",
    "config.rollout.sglang.dtype": "float32",
    "config.rollout.sglang.arguments": "('--context-length=512','--max-total-tokens=8192','--max-running-requests=16')",
    "config.evaluation.questions": "4",
    "config.evaluation.blind": "False",
    "config.log.tensorboard": "False",
    **{f"config.stages.{stage}.{key}": value for stage in ("perception", "text", "visual")
       for key, value in (("prompts", "4"), ("steps", "2"))},
}  # fmt: skip


def run(workdir, stop_after=0, **changes):
    """Records of the steps of a run that ended well; `stop_after` so many of them SIGTERM ends it, for now."""
    flags = {**FLAGS, **changes}
    command = [sys.executable, "-m", "capcur_jax.main", "--config=configs/staged.py", f"--workdir={workdir}"]
    with open(workdir.with_suffix(".log"), "a+") as log:
        process = subprocess.Popen(
            [*command, *(f"--{key}={value}" for key, value in flags.items())],
            cwd=ROOT, stdout=log, stderr=log,
        )  # fmt: skip
        while stop_after and process.poll() is None and len(steps_of(workdir)) < stop_after:
            time.sleep(0.05)
        if stop_after:
            process.terminate()
        code = process.wait(900)
        log.seek(0)
        assert code == (130 if stop_after else 0), log.read()[-5000:]
    return steps_of(workdir)


def steps_of(workdir):
    file = workdir / "metrics.jsonl"
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    records = [json.loads(line) for line in lines if line.endswith("\n")]
    return [record for record in records if record["type"] == "step"]


def test_a_staged_run_samples_what_the_trainer_would(tmp_path, sglang_python, files):
    steps = run(tmp_path / "run", **files, **{"config.rollout.sglang.python": sglang_python})
    assert [step["stage"] for step in steps] == ["perception"] * 2 + ["text"] * 2 + ["visual"] * 2
    for number, step in enumerate(steps, 1):
        # The new weights of every stage reach the server, the vision tower's among them, or leave it alone (frozen).
        assert step["logprob_difference_max"] < 1e-3
        assert step["staleness_max"] == 0 and step["renewed_groups"] == 0 and step["weight_version"] == number
        assert {"seconds_sync_gather", "seconds_sync_write", "seconds_sync_load"} <= set(step)
        assert step["rollout_tokens_per_second"] > 0 and step["rollout_restarts"] == 0
    log = (tmp_path / "run" / "sglang" / "server-0.log").read_text()
    assert "launch_server" in log or "Uvicorn" in log


def test_ahead_of_the_trainer_by_one_batch(tmp_path, lent, files):
    """Samples come from the weights before, are corrected for it, and say so. Stopped with a batch on its way, the run
    ends at once, and goes on with that batch."""
    changes = {
        **files,
        "config.rollout.sglang.addresses": str(lent.addresses),
        "config.checkpoint": lent.source,
        "config.order": "('perception',)",
        "config.stages.perception.steps": "5",
        "config.stages.perception.learning_rate": "1e-3",
        "config.rollout.async_steps": "1",
        "config.objective.sampler_correction": "truncate",
    }
    before = run(tmp_path / "run", stop_after=2, **changes)
    steps = run(tmp_path / "run", **changes)
    assert len(before) < 5 and steps[: len(before)] == before
    assert [step["step"] for step in steps] == [1, 2, 3, 4, 5]
    # The first step of each start waits for its own samples; later ones have those of the weights before, unless a busy
    # machine's server had not begun when the update reached it. Either way they say by which weights they were made.
    assert {steps[0]["staleness_max"], steps[len(before)]["staleness_max"]} == {0}
    for step in steps:
        assert step["staleness_max"] in (0, 1)
        assert step["staleness_max"] == 1 or step["logprob_difference_max"] < 1e-3
