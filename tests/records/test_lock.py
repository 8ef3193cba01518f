"""Who has a work directory: one process at a time, and none that is dead."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from capcur_jax.errors import InputError
from capcur_jax.records import lock
from capcur_jax.records.lock import DEAD_S, NAME, Lock

HOLD = """
import sys, time
from pathlib import Path
from capcur_jax.records.lock import Lock
held = Lock(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(60)
"""


@contextlib.contextmanager
def holder(directory):
    """A process that has the directory."""
    with subprocess.Popen([sys.executable, "-c", HOLD, directory], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout.readline() == "held\n"
            yield process
        finally:
            process.kill()


def of_another_host(directory, age):
    """The lock of a process on another host that was heard of `age` seconds ago."""
    path = directory / NAME
    path.write_text(json.dumps({"host": "node7", "process": os.getpid(), "boot": "another", "token": "t"}))
    os.utime(path, (time.time() - age,) * 2)
    return path


def test_a_second_process_is_refused_while_the_first_lives_or_is_stopped(tmp_path):
    with holder(tmp_path) as first:
        for stopped in (False, True):
            if stopped:
                os.kill(first.pid, signal.SIGSTOP)
                os.utime(tmp_path / NAME, (0, 0))  # silent for long: on one host the kernel knows better
            with pytest.raises(InputError, match=rf"{tmp_path} is another run's: process {first.pid} on .*is running"):
                Lock(tmp_path)
        assert json.loads((tmp_path / NAME).read_text())["process"] == first.pid


def test_a_killed_process_leaves_nothing_that_blocks(tmp_path):
    with holder(tmp_path) as first:
        first.kill()
        first.wait()
        assert (tmp_path / NAME).exists()
        with Lock(tmp_path):
            assert json.loads((tmp_path / NAME).read_text())["process"] == os.getpid()
    assert list(tmp_path.iterdir()) == []


def test_another_host_s_lock_counts_as_long_as_it_is_heard_of(tmp_path):
    path = of_another_host(tmp_path, age=5)
    with pytest.raises(InputError, match=r"on node7 has it \(last heard of 5 s ago; if it is dead, try again in 5\d s"):
        Lock(tmp_path)
    assert json.loads(path.read_text())["host"] == "node7" and [path] == list(tmp_path.iterdir())
    of_another_host(tmp_path, age=DEAD_S + 1)
    with Lock(tmp_path):
        assert json.loads(path.read_text())["process"] == os.getpid()


def test_without_flock_the_heartbeat_decides(tmp_path, monkeypatch):
    def unsupported(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(lock.fcntl, "flock", unsupported)
    with Lock(tmp_path):
        with pytest.raises(InputError, match="it is running"):
            Lock(tmp_path)
        monkeypatch.setattr(lock.psutil, "pid_exists", lambda _: False)
        Lock(tmp_path).close()


@pytest.mark.parametrize("left", ["", "{", "[]", "{}"])
def test_half_a_lock_is_none(tmp_path, left):
    (tmp_path / NAME).write_text(left)
    Lock(tmp_path).close()


def test_the_heartbeat_goes_on_and_a_lost_lock_ends_its_run(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "BEAT_S", 0.01)
    with Lock(tmp_path) as held:
        os.utime(tmp_path / NAME, (0, 0))
        _until(lambda: (tmp_path / NAME).stat().st_mtime > 1)
        held.check()
        of_another_host(tmp_path, age=0)  # it took this process for dead
        _until(lambda: held.lost)
        with pytest.raises(InputError, match=r"was taken by another process \(process \d+ on node7\)"):
            held.check()
    assert (tmp_path / NAME).exists() and not [t for t in threading.enumerate() if t.name == "lock"]


def test_a_directory_that_can_t_be_written_is_named(tmp_path):
    (tmp_path / NAME).mkdir()
    with pytest.raises(InputError, match=rf"{NAME} can't be written \(Is a directory\)"):
        Lock(tmp_path)


def _until(happens):
    limit = time.monotonic() + 10
    while not happens() and time.monotonic() < limit:
        time.sleep(0.01)
    assert happens()
