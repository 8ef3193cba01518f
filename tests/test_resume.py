"""A run that is killed goes on, and ends bit for bit where an unbroken one does."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from capcur_jax import presets
from capcur_jax.records.jsonl import read_jsonl
from tests import tiny
from tests.test_main import ROOT

pytestmark = pytest.mark.e2e

STAGES = {"perception": 8, "text": 6}
SETTINGS = {
    **tiny.SETTINGS,
    **{f"stages.{name}.steps": steps for name, steps in STAGES.items()},
    **{f"stages.{name}.prompts": 4 for name in STAGES},
    "order": tuple(STAGES),
    "checkpointing.every": 2,
    "validation.every": 4,
    "validation.questions": 4,
    "evaluation.questions": 4,
    "reward.function": "tests.own_rewards:by_length",  # a random model's groups differ in nothing else
    "objective.updates_per_batch": 2,
    "rollout.dynamic_retries": 1,
}


@pytest.fixture(scope="module")
def command(checkpoint, sets):
    """command(workdir, *arguments): a run in a process of its own."""
    settings = {**SETTINGS, **sets, "checkpoint": str(checkpoint)}

    def start(workdir: Path, *arguments: str, devices: int = 1) -> subprocess.Popen:
        return subprocess.Popen(
            [
                sys.executable, "-m", "capcur_jax.main", "--config=configs/staged.py", f"--workdir={workdir}",
                *tiny.arguments(settings), *arguments,
            ],
            cwd=ROOT, env={**os.environ, "JAX_NUM_CPU_DEVICES": str(devices)}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    return start


def finish(process: subprocess.Popen) -> str:
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 0, output[-3000:]
    return output


@pytest.fixture(scope="module")
def unbroken(command, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("unbroken") / "run"
    finish(command(workdir, "--config.checkpointing.keep=99"))
    return workdir


def records(workdir: Path) -> list[dict]:
    """metrics.jsonl without what depends on the clock and the machine."""
    timed = ("seconds", "tokens_per_second", "rollout_tokens_per_second", "host_", "compilations")
    lines = read_jsonl(workdir / "metrics.jsonl")
    return [{key: value for key, value in line.items() if not key.startswith(timed)} for line in lines]


def progress(path: Path) -> int:
    """Lines of a file, or the number of the last checkpoint."""
    if path.is_dir():
        return max((int(entry.name) for entry in path.iterdir() if entry.name.isdecimal()), default=-1)
    return path.read_bytes().count(b"\n") if path.exists() else 0


WRITTEN = ("metrics.jsonl", "rollouts.jsonl", "state")


def killed_somewhere(
    process: subprocess.Popen, workdir: Path, choice: random.Random, written: Sequence[str] = WRITTEN
) -> bool:
    """Kills the run a little after it has written one of these; False: it was done before."""
    watched = choice.choice(written)
    grown, start, limit = choice.randint(1, 3), None, time.monotonic() + 120
    while process.poll() is None and time.monotonic() < limit:
        seen = progress(workdir / watched)
        start = seen if start is None else min(seen, start)  # records are cut when the run goes on
        if seen >= start + grown:
            time.sleep(choice.uniform(0.0, 0.1))
            break
        time.sleep(0.005)
    process.kill()
    process.communicate()
    return process.returncode == -signal.SIGKILL


@pytest.mark.parametrize("seed", [0])
def test_a_run_killed_again_and_again_ends_as_the_unbroken_one(command, unbroken, tmp_path, seed):
    """Killed while it writes records, samples and checkpoints, each once, in some order."""
    choice, workdir = random.Random(seed), tmp_path / "run"
    for name in choice.sample(WRITTEN, len(WRITTEN)):
        assert killed_somewhere(command(workdir), workdir, choice, [name])  # or the run is too short for this test
    finish(command(workdir))
    for name in ("1-perception", "final"):
        ours, theirs = (load_file(d / "checkpoints" / name / "model.safetensors") for d in (workdir, unbroken))
        assert all((ours[key] == theirs[key]).all() for key in theirs) and set(ours) == set(theirs)
    assert records(workdir) == records(unbroken)
    assert read_jsonl(workdir / "rollouts.jsonl") == read_jsonl(unbroken / "rollouts.jsonl")
    ours, theirs = (json.loads((d / "summary.json").read_text()) for d in (workdir, unbroken))
    for key in ("accuracy", "steps", "best_validation", "status", "skipped"):
        assert ours[key] == theirs[key], key
    assert ours["compilations_after_warmup"] == 0


def test_sigterm_saves_and_exits_cleanly_and_the_run_goes_on(command, unbroken, tmp_path):
    workdir = tmp_path / "run"
    process = command(workdir, "--config.checkpointing.every=100")
    limit = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < limit:
        path = workdir / "metrics.jsonl"
        if path.exists() and b'"stage_step":' in path.read_bytes():
            break
        time.sleep(0.02)
    process.terminate()
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 130, output[-2000:]
    summary = json.loads((workdir / "summary.json").read_text())
    assert summary["status"] == "interrupted" and 1 <= summary["steps"] < sum(STAGES.values())
    output = finish(command(workdir))  # a setting of checkpointing may change
    assert f"going on after step {summary['steps']}" in output
    assert records(workdir) == records(unbroken)


def test_a_finished_run_says_so_and_another_config_is_refused(command, unbroken):
    before = (unbroken / "summary.json").read_bytes()
    assert "holds a finished run" in finish(command(unbroken))
    assert (unbroken / "summary.json").read_bytes() == before
    process = command(unbroken, "--config.seed=3", "--config.stages.text.learning_rate=0.5")
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 1 and "Traceback" not in output
    assert "seed: 0 -> 3" in output and f"stages.text.learning_rate: {presets.LAPTOP_LEARNING_RATE} -> 0.5" in output


def test_a_run_goes_on_on_another_mesh(command, unbroken, tmp_path):
    """Four virtual devices take up what one has left; the figures agree within float32's accuracy."""
    workdir, last = tmp_path / "run", STAGES["perception"] - 2
    shutil.copytree(unbroken, workdir)  # as if it had been killed after step `last`
    for state in (workdir / "state").iterdir():
        if state.name.isdecimal() and int(state.name) > last:
            shutil.rmtree(state)
    assert (workdir / "state" / str(last)).is_dir()
    shutil.rmtree(workdir / "checkpoints")
    (workdir / "summary.json").unlink()
    more = "--config.mesh.fsdp=2", "--config.mesh.tensor=2"
    assert f"going on after step {last}" in finish(command(workdir, *more, devices=4))
    ours, theirs = records(workdir), records(unbroken)
    assert [r["type"] for r in ours] == [r["type"] for r in theirs]
    for mine, other in zip(ours, theirs, strict=True):
        if mine["type"] == "step":
            assert mine["loss"] == pytest.approx(other["loss"], abs=1e-4)
            assert mine["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-2) and mine["grad_norm"] > 1e-3
