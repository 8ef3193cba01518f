"""Runs on a real Slurm of this machine: several processes, what is requeued, rollout nodes, and grids as arrays."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from capcur_jax.records.jsonl import read_jsonl
from tests import environment, tiny
from tests.grid.test_executors import until
from tests.launch import slurm
from tests.test_main import ROOT
from tests.test_resume import records

pytestmark = [pytest.mark.e2e, pytest.mark.skipif(bool(slurm.missing()), reason=slurm.missing())]

SETTINGS = {
    **tiny.SETTINGS, "reward.function": "tests.own_rewards:by_length", "evaluation.questions": 4, "reward.workers": 1,
    "evaluation.blind": False, "log.tensorboard": False, "rollout.max_new_tokens": 4,
}  # fmt: skip
# Plays the trainer and the servers: says what it was given, and saves for a second when it hears SIGTERM.
STAND_IN = """#!/bin/bash
echo "$SLURM_PROCID of $SLURM_NTASKS: $*"
case $2 in capcur_jax.rollout.sglang)
  for argument; do case $argument in --register=*) folder=${argument#--register=} ;; esac; done
  mkdir -p "$folder" && echo -n "'http://host-$SLURM_PROCID:1'," >"$folder/$SLURM_PROCID.txt"
  sleep 60; exit ;;
esac
[ -e "$STAY" ] || exit 0
trap 'heard=yes; rm -f "$STAY"' TERM
for _ in $(seq 600); do
  sleep 0.1
  [ -z "$heard" ] || { sleep 1; echo "$SLURM_PROCID saved"; exit 130; }
done
"""


@pytest.fixture(scope="module")
def cluster():
    """Its folder; the environment names it to Slurm's commands."""
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))  # pytest's own paths are too long for a socket
    with pytest.MonkeyPatch.context() as patch, slurm.cluster(folder) as config:
        patch.setenv("SLURM_CONF", str(config))
        patch.setenv("PYTHON", sys.executable)
        yield folder
    shutil.rmtree(folder)


def ask(*command: str, **variables: str) -> str:
    given = {**os.environ, **variables}
    done = subprocess.run(command, cwd=ROOT, env=given, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def sent(*arguments: str, **variables: str) -> str:
    """The number of a job. `arguments` of sbatch, then the file's name and what it is told."""
    return ask("sbatch", "--parsable", *arguments, **variables).split(";")[0]


def ended(job: str, seconds: float = 300) -> bool:
    return until(lambda: not ask("squeue", "--noheader", f"--jobs={job}"), seconds)


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """stand_in(*arguments): the lines that a job of two nodes prints whose Python only says what it was given.

    once: it is cancelled when it is back in the queue. Slurm takes minutes to start a job of two parts again.
    """
    (tmp_path / "python").write_text(STAND_IN)
    (tmp_path / "python").chmod(0o755)

    def run(*options: str, arguments: tuple[str, ...] = (), once: bool = False, **variables: str) -> list[str]:
        log = tmp_path / "log-%a.txt" if any(one.startswith("--array") for one in options) else tmp_path / "log.txt"
        job = sent(*options[:1], f"--output={log}", *options[1:], "launch/slurm.sbatch", *arguments,
                   PYTHON=str(tmp_path / "python"), STAY=str(tmp_path / "stay"), **variables)  # fmt: skip
        if (tmp_path / "stay").exists():
            assert until(lambda: log.exists() and "capcur_jax.main" in log.read_text())
            ask("scancel", "--batch", "--signal=USR1", job)  # as before a time limit
        if once:
            assert until(lambda: "PENDING" in ask("squeue", "--noheader", f"--jobs={job}", "--format=%T"))
            ask("scancel", job)
        assert ended(job, 90)
        return [line for file in sorted(tmp_path.glob("log*.txt")) for line in file.read_text().splitlines()]

    return run


def test_a_run_at_its_time_limit_saves_and_is_requeued(cluster, stand_in, tmp_path):
    (tmp_path / "stay").touch()
    lines = stand_in("--nodes=2", arguments=(f"--workdir={tmp_path}", "--config=x"))
    said = f"of 2: -m capcur_jax.main --workdir={tmp_path} --config=x"
    assert lines.count(f"0 {said}") == lines.count(f"1 {said}") == 2
    assert "0 saved" in lines and "1 saved" in lines


def test_rollout_nodes_of_the_same_kind_and_of_another(cluster, stand_in, tmp_path):
    given = (f"--workdir={tmp_path}", "--config=x")
    served = f"0 of 1: -m capcur_jax.rollout.sglang --host={os.uname().nodename} --register={tmp_path}/sglang/addresses"
    trained = (
        f"0 of 1: -m capcur_jax.main --workdir={tmp_path} --config=x --config.rollout.engine=sglang "
        f"--config.rollout.sglang.addresses=('http://host-0:1',) "
        f"--config.rollout.sglang.weights={tmp_path}/sglang/weights"
    )
    for kind in (("--nodes=2",), ("--nodes=1", ":", "--nodes=1")):
        lines = stand_in(*kind, arguments=given, ROLLOUT_NODES="1")
        assert f"{served} {' '.join(given)}" in lines and trained in lines


@pytest.mark.parametrize("kind", [("--nodes=2",), ("--nodes=1", ":", "--nodes=1")], ids=["one kind", "two kinds"])
def test_a_trainer_with_rollout_nodes_saves_at_the_time_limit(kind, cluster, stand_in, tmp_path):
    """Slurm counts the steps of all parts of a job together."""
    (tmp_path / "stay").touch()
    lines = stand_in(*kind, arguments=(f"--workdir={tmp_path}", "--config=x"), once=True, ROLLOUT_NODES="1")
    assert "0 saved" in lines


def test_an_array_takes_a_line_of_a_dry_run_each(cluster, stand_in, tmp_path):
    lines = [f"staged\t{seed}\t-\tpython -m capcur_jax.main --config=x '--workdir={tmp_path}/a b' --config.seed={seed}"
             for seed in (3, 4)]  # fmt: skip
    (tmp_path / "grid.tsv").write_text("\n".join(lines) + "\n")
    said = stand_in("--nodes=1", "--array=1-2", arguments=(str(tmp_path / "grid.tsv"),))
    wanted = f"0 of 1: -m capcur_jax.main --config=x --workdir={tmp_path}/a b --config.seed="
    assert [line for line in said if " of " in line] == [f"{wanted}3", f"{wanted}4"]


def test_a_preempted_run_of_two_tasks_goes_on_and_ends_as_an_unbroken_one(cluster, checkpoint, sets, tmp_path):
    settings = {
        **SETTINGS, **sets, "checkpoint": str(checkpoint), "order": ("text",), "evaluation.sets": ("text",),
        "stages.text.steps": 12, "stages.text.prompts": 4, "checkpointing.every": 20, "mesh.data": 2,
        "reward.timeout_s": 120.0,  # it is held up below
    }  # fmt: skip

    def run(name: str) -> str:
        arguments = ["--config=configs/staged.py", f"--workdir={tmp_path / name}", *tiny.arguments(settings)]
        options = ("--nodes=2", f"--output={tmp_path / name}.log", "launch/slurm.sbatch")
        return sent(*options, *arguments, JAX_NUM_CPU_DEVICES="1", **environment.TOGETHER)

    def steps(name: str) -> int:
        path = tmp_path / name / "metrics.jsonl"
        return path.read_text().count('"type": "step"') if path.exists() else 0

    whole = run("whole")
    assert ended(whole), (tmp_path / "whole.log").read_text()[-3000:]
    broken = run("broken")
    assert until(lambda: steps("broken") >= 2, 120), (tmp_path / "broken.log").read_text()[-3000:]
    # Another job takes all nodes; the partition gives those that have to go a minute. The run is held up until then:
    # Slurm sends SIGCONT with the SIGTERM.
    ask("scancel", "--signal=STOP", broken)
    ask("sbatch", "--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=true")
    assert ended(broken), (tmp_path / "broken.log").read_text()[-3000:]
    log = (tmp_path / "broken.log").read_text()
    assert "going on after step" in log, log[-3000:]
    before = json.loads((tmp_path / "whole" / "summary.json").read_text())
    after = json.loads((tmp_path / "broken" / "summary.json").read_text())
    assert before["status"] == after["status"] == "finished" and before["accuracy"] == after["accuracy"]
    assert records(tmp_path / "broken") == records(tmp_path / "whole")
    ours, theirs = (load_file(tmp_path / name / "checkpoints" / "final" / "model.safetensors")
                    for name in ("broken", "whole"))  # fmt: skip
    assert ours.keys() == theirs.keys() and all((ours[key] == theirs[key]).all() for key in theirs)


def test_a_grid_of_two_runs_is_one_array(cluster, checkpoint, sets, tmp_path):
    settings = {
        **SETTINGS, **sets, "checkpoint": str(checkpoint), "evaluation.sets": ("text",),
        **{f"stages.{name}.steps": 2 for name in ("perception", "text", "visual")},
        **{f"stages.{name}.prompts": 4 for name in ("perception", "text", "visual")},
    }  # fmt: skip
    command = [
        sys.executable, "-m", "capcur_jax.ablations", "--rows=visual,perception", f"--workdir={tmp_path / 'grid'}",
        "--executor=slurm", "--jobs=2", "--slurm=time=10", *tiny.arguments(settings),
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "2 of 2 done" in done.stdout
    (file,) = (tmp_path / "grid" / "slurm").glob("[0-9]*_submission.sh")
    assert "#SBATCH --array=0-1%2" in file.read_text() and "#SBATCH --requeue" in file.read_text()
    for row in ("visual", "perception"):
        folder = tmp_path / "grid" / row / "seed0"
        assert json.loads((folder / "summary.json").read_text())["status"] == "finished"
        assert [r["step"] for r in read_jsonl(folder / "metrics.jsonl") if r["type"] == "step"] == [1, 2]
        assert "Stage" in (folder / "log.txt").read_text() and not (folder / "log.txt.job").exists()
