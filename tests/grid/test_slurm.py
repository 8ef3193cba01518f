"""Jobs of a grid in Slurm, with commands that only play Slurm; tests/launch/test_slurm.py has a real one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from submitit.core import utils

from capcur_jax.errors import InputError
from capcur_jax.grid import slurm
from tests.grid.test_executors import until

ROOT = Path(slurm.__file__).parents[2]
LINE = ["python", "-m", "capcur_jax.main"]


@pytest.fixture
def played(tmp_path, monkeypatch):
    """A folder whose file `queue` squeue prints, and to whose file `said` the other commands append."""
    commands = {
        "sbatch": 'echo "sbatch" >>said; [ ! -e refused ] || { echo "invalid partition" >&2; exit 1; }\n'
        "echo Submitted batch job 7",
        "srun": "",
        "squeue": "[ ! -e down ] && cat queue",
        "scancel": 'echo "scancel $*" >>said',
        "scontrol": 'echo "scontrol $*" >>said',
    }
    for name, text in commands.items():
        (tmp_path / name).write_text(f"#!/bin/bash\ncd {tmp_path}\n{text}\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "queue").write_text("7_0 RUNNING\n7_1 PENDING\n")
    (tmp_path / "said").touch()
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(slurm, "LOOK_S", 0.0)
    return tmp_path


def sent(folder: Path, *settings: str, names=("a", "b"), line=LINE):
    executor = slurm.Slurm(len(names), folder / "slurm", settings)
    with executor.together():
        jobs = [executor.start(line, folder / name / "log.txt") for name in names]
    return executor, jobs


def test_what_starts_together_is_one_array(played):
    _, jobs = sent(played, "partition=gpu", "nodes=2", "setup=module load x", "setup=y")
    assert [job.id for job in jobs] == ["7_0", "7_1"] and (played / "said").read_text() == "sbatch\n"
    (file,) = (played / "slurm").glob("[0-9]*_submission.sh")
    text = file.read_text()
    for words in ("--array=0-1%2", "--partition=gpu", "--nodes=2", "--ntasks-per-node=1", "--signal=USR2@120"):
        assert f"#SBATCH {words}\n" in text
    assert "\nmodule load x\ny\n" in text and "#SBATCH --requeue\n" in text
    assert [job.poll() for job in jobs] == [None, None]


def test_a_job_that_ended_has_the_code_of_its_command(played, monkeypatch):
    executor, (first, second) = sent(played)
    (played / "queue").write_text("")
    assert (first.poll(), second.poll()) == (None, None)  # a file system may be slow to show results
    result = utils.JobPaths(executor.folder, "7_0").result_pickle
    result.parent.mkdir(parents=True, exist_ok=True)
    utils.cloudpickle_dump(("success", 3), result)
    monkeypatch.setattr(slurm, "LAG_S", 0.0)
    assert (first.poll(), second.poll()) == (3, slurm.LOST)
    assert not first.note.exists() and not second.note.exists()


def test_what_submitit_could_not_run_is_told_in_the_log(played):
    executor, (first, _) = sent(played)
    (played / "queue").write_text("")
    result = utils.JobPaths(executor.folder, "7_0").result_pickle
    result.parent.mkdir(parents=True, exist_ok=True)
    utils.cloudpickle_dump(("error", "OSError: no python"), result)
    assert first.poll() == slurm.LOST and "OSError: no python" in first.log.read_text()


def test_nothing_is_concluded_while_slurm_does_not_answer(played, monkeypatch):
    monkeypatch.setattr(slurm, "LAG_S", 0.0)
    _, (first, _) = sent(played)
    (played / "down").touch()
    assert first.poll() is None


def test_another_grid_finds_the_jobs_that_live_and_refuses_other_commands(played):
    sent(played)
    _, jobs = sent(played)
    assert [job.id for job in jobs] == ["7_0", "7_1"] and (played / "said").read_text() == "sbatch\n"
    with pytest.raises(InputError, match=r"job 7_0 of another command .* scancel 7_0"):
        sent(played, line=["python", "other"])
    (played / "queue").write_text("")  # they are gone: sent again
    sent(played)
    assert (played / "said").read_text() == "sbatch\nsbatch\n"


def test_waiting_jobs_are_cancelled_and_running_ones_asked_to_save(played):
    jobs = sent(played)[1]
    for job in jobs:
        job.stop()
    (played / "queue").write_text("7_0 RUNNING\n")
    assert [job.poll() for job in jobs] == [None, slurm.LOST]
    assert (played / "said").read_text() == "sbatch\nscancel --signal=USR1 7_0\nscancel 7_1\n"


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("partition", "give KEY=VALUE"),
        ("=x", "give KEY=VALUE"),
        ("partitoin=x", "partitoin"),
        ("use_srun=0", "itself"),
        ("time=1:00:00", "whole minutes"),
    ],
)
def test_mistakes_get_one_clear_line(played, setting, words):
    with pytest.raises(InputError, match=words):
        slurm.Slurm(1, played / "slurm", [setting])


def test_what_slurm_refuses_is_said(played):
    (played / "refused").touch()
    with pytest.raises(InputError, match=r"the jobs can.t be sent.*invalid partition"):
        sent(played)


def test_a_refusal_ends_nothing_once_jobs_run(played, monkeypatch):
    executor, (first, _) = sent(played)
    (played / "refused").touch()
    with executor.together():
        late = executor.start(LINE, played / "c" / "log.txt")
    assert late.poll() is None and first.poll() is None and not late.id
    assert "can't be sent" in late.log.read_text() and "invalid partition" in late.log.read_text()
    (played / "refused").unlink()
    with executor.together():
        pass
    assert not late.id  # it is not asked again at once
    monkeypatch.setattr(executor, "_again", 0.0)
    with executor.together():
        pass
    assert late.id and late.poll() is None


def test_a_job_that_was_never_sent_can_be_stopped(played):
    executor, _ = sent(played)
    (played / "refused").touch()
    with executor.together():
        late = executor.start(LINE, played / "c" / "log.txt")
    late.stop()
    assert late.poll() == slurm.LOST and "scancel" not in (played / "said").read_text()


def test_without_slurm_it_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(InputError, match="there is no sbatch here"):
        slurm.Slurm(1, tmp_path, [])


# ---------------------------------------------------------------------- in a job

SAVES = """
import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: (print("saved", flush=True), sys.exit(130)))
print("on", flush=True)
while True: time.sleep(0.05)
"""
JOB = """
import signal, sys
from capcur_jax.grid.slurm import Command
command, line, log = Command(), [sys.executable, "-c", sys.argv[1]], sys.argv[2]
def limit(*unused):
    again = command.checkpoint(line, log)
    print("again", again.args == (line, log), flush=True)
    sys.exit(4)
signal.signal(signal.SIGUSR2, limit)  # as submitit does
print("returned", command(line, log), flush=True)
"""


@pytest.mark.parametrize(
    ("number", "said", "code"), [(signal.SIGUSR1, "returned 130\n", 0), (signal.SIGUSR2, "again True\n", 4)]
)
def test_a_run_in_a_job_saves_when_the_grid_stops_and_before_the_time_limit(tmp_path, number, said, code):
    log = tmp_path / "log.txt"
    job = subprocess.Popen([sys.executable, "-c", JOB, SAVES, log], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert until(lambda: log.exists() and "on" in log.read_text(), 60)
    job.send_signal(number)
    assert job.communicate(timeout=60)[0] == said and job.returncode == code
    assert log.read_text() == "on\nsaved\n"


@pytest.mark.parametrize(("module", "takes_part"), [("capcur_jax.main", True), ("capcur_jax.data", False)])
def test_the_second_of_two_nodes_takes_part_in_runs_alone(module, takes_part, tmp_path):
    """Two processes that measure the same pass rates would write the same journal."""
    job = "import sys; from capcur_jax.grid.slurm import Command; sys.exit(Command()(sys.argv[2:], sys.argv[1]))"
    line = [sys.executable, "-c", "print('here')", module]
    environment = {**os.environ, "SLURM_PROCID": "1"}
    done = subprocess.run([sys.executable, "-c", job, tmp_path / "log", *line], cwd=ROOT, env=environment)
    assert done.returncode == 0 and (tmp_path / "log.1").exists() == takes_part


def test_a_preempted_job_goes_back_to_the_queue(tmp_path, played):
    log = tmp_path / "log.txt"
    job = subprocess.Popen([sys.executable, "-c", JOB, SAVES, log], cwd=ROOT, stdout=subprocess.PIPE, text=True,
                           env={**os.environ, "SLURM_JOB_ID": "12"}, start_new_session=True)  # fmt: skip
    try:
        assert until(lambda: log.exists() and "on" in log.read_text(), 60)
        os.killpg(job.pid, signal.SIGTERM)  # Slurm tells all processes of a job
        assert until(lambda: "scontrol requeue 12\n" in (played / "said").read_text())
        assert log.read_text() == "on\nsaved\n" and job.poll() is None  # it waits for Slurm to end it
    finally:
        job.kill()
        job.communicate()
