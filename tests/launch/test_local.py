"""launch/local.sh: several processes of this machine as one run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from capcur_jax.records.jsonl import read_jsonl
from tests import environment, tiny
from tests.grid.test_executors import until
from tests.test_main import ROOT

SCRIPT = ROOT / "launch" / "local.sh"
# Says what it was given, and saves when it hears SIGTERM.
STAND_IN = """#!/bin/bash
[ "$1" = -c ] && { echo 7777; exit; }
trap 'echo saved; exit 130' TERM
echo "$CUDA_VISIBLE_DEVICES: $*"
case "$*" in
  *fail*--process_id=1*) exit 3 ;;
  *stay*|*fail*) for _ in $(seq 300); do sleep 0.1; done ;;
esac
"""


@pytest.fixture
def start(tmp_path):
    (tmp_path / "python").write_text(STAND_IN)
    (tmp_path / "python").chmod(0o755)

    def run(*arguments: str, **variables: str) -> subprocess.Popen:
        environment = {**os.environ, "PYTHON": str(tmp_path / "python"), "CUDA_VISIBLE_DEVICES": "", **variables}
        return subprocess.Popen(["bash", SCRIPT, *arguments], env=environment, text=True, start_new_session=True,
                                stdout=subprocess.PIPE, stderr=subprocess.STDOUT)  # fmt: skip

    return run


def test_each_process_has_its_number_and_its_gpus(start, tmp_path):
    process = start("2", "--config=x", f"--workdir={tmp_path}", CUDA_VISIBLE_DEVICES="3,5,6,7")
    said, given = process.communicate(timeout=60)[0], f"-m capcur_jax.main --config=x --workdir={tmp_path}"
    joined = "--coordinator=localhost:7777 --process_id={} --process_count=2"
    assert process.returncode == 0 and said == f"3,5: {given} {joined.format(0)}\n"
    assert (tmp_path / "process-1.log").read_text() == f"6,7: {given} {joined.format(1)}\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "launch/local.sh 2 --config"),
        (("two", "--workdir=x"), "launch/local.sh 2 --config"),
        (("2", "--config=x"), "error: --workdir=DIR is missing"),
        (("3", "--workdir=x"), "error: 4 GPUs can't be shared out evenly to 3 processes"),
    ],
)
def test_mistakes_are_said(start, arguments, words):
    process = start(*arguments, CUDA_VISIBLE_DEVICES="0,1,2,3")
    assert words in process.communicate(timeout=60)[0] and process.returncode == 2


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_reaches_each_of_them_once(start, tmp_path, number):
    process = start("2", "--stay", f"--workdir={tmp_path}")
    log = tmp_path / "process-1.log"
    assert process.stdout.readline() and until(lambda: log.exists() and log.read_text())  # both hear signals
    os.killpg(process.pid, number)  # as a terminal does
    assert process.communicate(timeout=60)[0].splitlines().count("saved") == 1 and process.returncode == 130
    assert (tmp_path / "process-1.log").read_text().endswith("saved\n")


def test_one_that_fails_ends_the_others(start, tmp_path):
    process = start("2", "--fail", f"--workdir={tmp_path}")
    assert "saved" in process.communicate(timeout=60)[0] and process.returncode == 130


@pytest.mark.e2e
def test_two_processes_are_the_run_of_one(start, checkpoint, sets, tmp_path):
    settings = {
        **tiny.SETTINGS, **sets, "checkpoint": str(checkpoint), "order": ("text",), "evaluation.sets": ("text",),
        "evaluation.questions": 4, "evaluation.blind": False, "reward.workers": 1, "log.tensorboard": False,
        "reward.function": "tests.own_rewards:by_length", "stages.text.steps": 2, "stages.text.prompts": 4,
        "mesh.data": 2,
    }  # fmt: skip
    losses = []
    for processes in (2, 1):
        workdir = tmp_path / str(processes)
        variables = {"PYTHON": sys.executable, "JAX_NUM_CPU_DEVICES": str(2 // processes), **environment.TOGETHER}
        process = start(str(processes), "--config=configs/staged.py", f"--workdir={workdir}",
                        *tiny.arguments(settings), **variables)  # fmt: skip
        said = process.communicate(timeout=400)[0]
        assert process.returncode == 0, said[-2000:]
        losses.append([step["loss"] for step in read_jsonl(workdir / "metrics.jsonl") if step["type"] == "step"])
    assert len(losses[0]) == 2 and losses[0] == pytest.approx(losses[1], abs=1e-5)
