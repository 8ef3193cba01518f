"""Shares of the machine, and processes that end with the grid that started them."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from capcur_jax.errors import InputError
from capcur_jax.grid import executors
from capcur_jax.grid.executors import Local, shared

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="other systems have no affinity and no death signal")
TELLS = "import os; print(sorted(os.sched_getaffinity(0)), os.environ['NPROC'], os.environ.get('CUDA_VISIBLE_DEVICES'))"


def until(there, seconds=20.0):
    limit = time.monotonic() + seconds
    while not (found := there()) and time.monotonic() < limit:
        time.sleep(0.02)
    return found


def test_everything_is_shared_out_and_nothing_twice():
    for count, jobs in ((8, 3), (2, 2), (7, 1), (5, 4)):
        parts = shared(range(count), jobs, "core")
        assert [thing for part in parts for thing in part] == list(range(count)) and len(parts) == jobs
        assert max(map(len, parts)) - min(map(len, parts)) <= 1
    with pytest.raises(InputError, match="--jobs=3, but this machine has 2 cores"):
        shared([0, 1], 3, "core")


@LINUX
def test_a_run_has_its_share_and_gives_it_back(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5,6,7")
    cores = sorted(os.sched_getaffinity(0))
    jobs = min(2, len(cores))
    executor = Local(jobs)
    for _ in range(2):
        running = [executor.start([sys.executable, "-c", TELLS], tmp_path / f"{n}.txt") for n in range(jobs)]
        assert all(until(lambda one=one: one.poll() is not None) and one.poll() == 0 for one in running)
    said = [(tmp_path / f"{n}.txt").read_text().splitlines() for n in range(jobs)]
    gpus = ["3,5", "6,7"] if jobs == 2 else ["3,5,6,7"]
    for n, part in enumerate(shared(cores, jobs, "core")):
        assert said[n] == [f"{part} {len(part)} {gpus[n]}"] * 2  # what each start said is appended


def test_gpus_that_do_not_go_round_are_said(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    with pytest.raises(InputError, match="--jobs=2, but this machine has 1 GPUs"):
        executors._gpus(2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert executors._gpus(2) == [None, None]


def test_a_run_is_asked_to_stop_and_then_made_to(tmp_path):
    stubborn = (
        "import signal, time; signal.signal(15, lambda *a: print('heard', flush=True)); print('on', flush=True)\n"
    )
    stubborn += "while True: time.sleep(0.1)"
    log, running = tmp_path / "log.txt", None
    running = Local(1).start([sys.executable, "-c", stubborn], log)
    try:
        assert until(lambda: log.read_text() == "on\n")
        running.stop()
        assert until(lambda: "heard" in log.read_text()) and running.poll() is None
    finally:
        running.kill()
    assert running.poll() == -signal.SIGKILL


@LINUX
def test_runs_end_with_a_grid_that_is_killed(tmp_path):
    code = (
        "import sys, time; from pathlib import Path; from capcur_jax.grid.executors import Local\n"
        "Local(1).start([sys.executable, '-c', 'import os, time; print(os.getpid(), flush=True); time.sleep(60)'],"
        f"Path({str(tmp_path / 'log.txt')!r}))\ntime.sleep(60)"
    )
    root = Path(executors.__file__).parents[2]
    grid = subprocess.Popen([sys.executable, "-c", code], cwd=root)
    log = tmp_path / "log.txt"
    try:
        assert until(lambda: log.exists() and log.read_text().strip())
        child = int(log.read_text())
    finally:
        grid.kill()
        grid.wait()

    def gone():
        with contextlib.suppress(psutil.NoSuchProcess):
            return psutil.Process(child).status() == psutil.STATUS_ZOMBIE
        return True

    assert until(gone, 10)
