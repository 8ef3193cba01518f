"""The main job in two processes: one run, one set of records, exported by one of them."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from capcur_jax.models import huggingface
from capcur_jax.records.jsonl import read_jsonl
from tests import environment, tiny
from tests.test_main import ROOT

pytestmark = pytest.mark.e2e


def together(processes: int, devices: int, workdir: Path, settings: dict) -> list[str]:
    """Runs the main job in so many processes, each with so many devices; what each of them printed."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    joined = [f"--coordinator=localhost:{port}", f"--process_count={processes}"] if processes > 1 else []
    started = [
        subprocess.Popen(
            [
                sys.executable, "-m", "capcur_jax.main", "--config=configs/staged.py", f"--workdir={workdir}",
                *joined, *([f"--process_id={i}"] if joined else []), *tiny.arguments(settings),
            ],
            cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env={**os.environ, "JAX_NUM_CPU_DEVICES": str(devices), **(environment.TOGETHER if joined else {})},
        )
        for i in range(processes)
    ]  # fmt: skip
    outputs = [process.communicate(timeout=400)[0] for process in started]
    codes = [process.returncode for process in started]
    assert codes == [0] * processes, "\n".join(output[-2000:] for output in outputs)
    return outputs


# (processes, devices of each) and a mesh. docs/training.md names more: devices/test_sharding.py holds one process with
# data or fsdp over two devices, the test below data 2 x fsdp 2 over 2 x 2.
LAYOUTS = [
    (1, 2, {"tensor": 2}),
    (2, 1, {"data": 2, "fsdp": 1}),
    (2, 1, {"fsdp": 2}),
    (2, 2, {"data": 2, "tensor": 2}),
]


@pytest.mark.parametrize(("processes", "devices", "mesh"), LAYOUTS)
def test_every_layout_trains_saves_resumes_and_exports(processes, devices, mesh, checkpoint, sets, tmp_path):
    settings = {
        **tiny.SETTINGS, **sets, "checkpoint": str(checkpoint), "order": ("text",), "evaluation.sets": ("text",),
        "evaluation.questions": 4, "evaluation.blind": False, "reward.workers": 1, "checkpointing.every": 1,
        "reward.function": "tests.own_rewards:by_length", "stages.text.steps": 2, "stages.text.prompts": 4,
        "log.tensorboard": False, **{f"mesh.{axis}": size for axis, size in mesh.items()},
    }  # fmt: skip
    together(processes, devices, tmp_path, settings)
    whole = [record for record in read_jsonl(tmp_path / "metrics.jsonl") if record["type"] == "step"]
    exported = (tmp_path / "checkpoints" / "final" / "model.safetensors").read_bytes()
    # As if the run had been killed after its first step.
    shutil.rmtree(tmp_path / "state" / "2")
    (tmp_path / "summary.json").unlink()
    shutil.rmtree(tmp_path / "checkpoints")
    outputs = together(processes, devices, tmp_path, settings)
    assert "going on after step 1" in outputs[0]
    again = [record for record in read_jsonl(tmp_path / "metrics.jsonl") if record["type"] == "step"]
    assert [(step["step"], step["loss"], step["grad_norm"]) for step in again] == [
        (step["step"], step["loss"], step["grad_norm"]) for step in whole
    ]
    assert (tmp_path / "checkpoints" / "final" / "model.safetensors").read_bytes() == exported
    assert json.loads((tmp_path / "summary.json").read_text())["status"] == "finished"


def test_two_processes_are_one_run(checkpoint, sets, tmp_path):
    settings = {
        **tiny.SETTINGS, **sets, "checkpoint": str(checkpoint), "order": ("perception", "text"), "mesh.data": 2,
        "evaluation.questions": 7, "validation.every": 2, "validation.questions": 5, "rollout.dynamic_retries": 1,
        "reward.workers": 1, "reward.function": "tests.own_rewards:by_length", "evaluation.blind": False,
        **{f"stages.{name}.steps": 2 for name in ("perception", "text")},
        **{f"stages.{name}.prompts": 8 for name in ("perception", "text")},
    }  # fmt: skip
    outputs = together(2, 2, tmp_path / "run", settings)
    assert "owner of records and servers" in outputs[0] and "Where parameters lie" in outputs[0]
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
