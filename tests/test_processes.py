"""The main job in two processes: one run, one set of records, exported by one of them."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys

import pytest

from capcur_jax.models import huggingface
from capcur_jax.records.jsonl import read_jsonl
from tests import environment, tiny
from tests.test_main import ROOT

pytestmark = pytest.mark.e2e


def test_two_processes_are_one_run(checkpoint, sets, tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    settings = {
        **tiny.SETTINGS, **sets, "checkpoint": str(checkpoint), "order": ("perception", "text"), "mesh.data": 2,
        "evaluation.questions": 7, "validation.every": 2, "validation.questions": 5, "rollout.dynamic_retries": 1,
        "reward.workers": 1, "reward.function": "tests.own_rewards:by_length", "evaluation.blind": False,
        **{f"stages.{name}.steps": 2 for name in ("perception", "text")},
        **{f"stages.{name}.prompts": 8 for name in ("perception", "text")},
    }  # fmt: skip
    started = [
        subprocess.Popen(
            [
                sys.executable, "-m", "capcur_jax.main", "--config=configs/staged.py", f"--workdir={tmp_path / 'run'}",
                f"--coordinator=localhost:{port}", f"--process_id={i}", "--process_count=2",
                *tiny.arguments(settings),
            ],
            cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env={**os.environ, "JAX_NUM_CPU_DEVICES": "2", **environment.TOGETHER},
        )
        for i in range(2)
    ]  # fmt: skip
    outputs = [process.communicate(timeout=400)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0], "\n".join(output[-2000:] for output in outputs)
    assert "owner of servers" in outputs[0] and "Where parameters lie" in outputs[0]
    assert "Stage" not in outputs[1]  # the owner alone speaks

    records = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    steps = [record for record in records if record["type"] == "step"]
    assert [step["step"] for step in steps] == [1, 2, 3, 4]
    assert all(step["compilations"] == 0 and step["grad_norm"] > 0 for step in steps)
    assert all(0 < step["logprob_difference_max"] < 1e-4 for step in steps)
    asked = {record["capability"]: record["questions"] for record in records if record["type"] == "evaluation"}
    assert set(asked.values()) == {7} and len(asked) == 3
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["status"] == "finished" and summary["best_validation"] is not None
    huggingface.load(summary["checkpoint"])
