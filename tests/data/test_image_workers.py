"""The image workers: threads share them, they may die, and they end with what started them."""

import os
import signal
import stat
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import psutil
import pytest
from PIL import Image

from capcur_jax import checks, presets, schedule
from capcur_jax.checkpointing import check_same_config
from capcur_jax.data import image_pool
from capcur_jax.data.images import ImageStore
from capcur_jax.data.sets import Sets
from capcur_jax.errors import InputError
from capcur_jax.models.inputs import BadImage
from tests.conftest import random_image

SIZE = (24, 16)  # height, width of what is loaded


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    """Thirty small images."""
    folder, found = tmp_path_factory.mktemp("thirty"), []
    for number in range(30):
        found.append(str(folder / f"{number}.jpg"))
        random_image(20 + number, 30, seed=number).save(found[-1])
    return found


def wait_for(condition, seconds=20.0):
    limit = time.monotonic() + seconds
    while not condition() and time.monotonic() < limit:
        time.sleep(0.02)
    return condition()


def gone(pid):
    """No such process, not even a zombie."""
    return not psutil.pid_exists(pid)


def test_threads_share_the_workers(paths):
    with ImageStore(2) as store, ThreadPoolExecutor(5) as threads:
        found = list(threads.map(lambda path: store.load(path, SIZE), paths * 4))
        assert len(store._pool.processes()) == 2
    for path, pixels in zip(paths * 4, found, strict=True):
        np.testing.assert_array_equal(pixels, ImageStore().load(path, SIZE))


def test_workers_import_neither_jax_nor_transformers_and_start_when_needed(paths):
    with ImageStore(3) as store:
        assert not store._pool.processes()
        store.size(paths[0])
        (pid,) = store._pool.processes()
        with open(f"/proc/{pid}/maps") as maps:
            loaded = maps.read()
        assert "PIL" in loaded and "jax" not in loaded and "numpy" not in loaded


@pytest.mark.parametrize("way", [signal.SIGKILL, signal.SIGSTOP], ids=["dies", "hangs"])
def test_an_image_that_costs_two_workers_is_bad_and_the_others_go_on(monkeypatch, paths, way):
    ask = image_pool._Worker.ask

    def struck(worker, request, timeout_s):
        if request["path"] in (paths[3], paths[7]) and (request["path"] == paths[3] or not struck.done):
            struck.done |= request["path"] == paths[7]
            os.kill(worker.process.pid, way)
        return ask(worker, request, timeout_s)

    struck.done = False
    monkeypatch.setattr(image_pool._Worker, "ask", struck)
    words = "ended by signal 9" if way == signal.SIGKILL else "took too long"
    with ImageStore(2, timeout_s=2.0) as store, ThreadPoolExecutor(3) as threads:

        def load(path):
            try:
                return store.load(path, SIZE)
            except BadImage as error:
                return str(error)

        found = list(threads.map(load, paths))
        # Number 7 cost one worker and was read by the next.
        assert store.counters()["deaths"] == 3
        assert [i for i, one in enumerate(found) if isinstance(one, str)] == [3]
        assert found[3].startswith(f"{paths[3]}: it ended the process that decoded it ({words})")
        pids = store._pool.processes()
    assert pids and all(map(gone, pids))


def test_a_worker_that_died_at_rest_is_no_image_s_fault(paths):
    with ImageStore(1) as store:
        store.size(paths[0])
        (pid,) = store._pool.processes()
        os.kill(pid, signal.SIGKILL)
        assert wait_for(
            lambda: psutil.Process(pid).status() == psutil.STATUS_ZOMBIE if psutil.pid_exists(pid) else True
        )
        assert store.load(paths[0], SIZE).shape == (*SIZE, 3)
        assert store.counters()["deaths"] == 0 and store._pool.processes() != [pid]


def test_memory_is_limited_in_workers(paths, tmp_path):
    Image.new("RGB", (9000, 9000)).save(tmp_path / "a.png")
    with ImageStore(1, memory_mb=256) as store:
        with pytest.raises(BadImage, match=r"a\.png: not enough memory to decode it; shrink"):
            store.load(str(tmp_path / "a.png"), SIZE)
        assert store.load(paths[0], SIZE).shape == (*SIZE, 3)
        assert store.counters()["deaths"] == 0


def test_closing_ends_the_workers_and_who_is_waiting_hears_of_it(paths):
    store, errors = ImageStore(2), []

    def work():
        try:
            while True:
                store.load(paths[0], (2000, 2000))
        except RuntimeError as error:
            errors.append(str(error))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    assert wait_for(lambda: len(store._pool.processes()) == 2 and store.counters()["misses"] > 8)
    pids = store._pool.processes()
    store.close()
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()
    assert errors == ["the image workers were closed"] * 4 and all(map(gone, pids))
    with pytest.raises(RuntimeError, match="were closed"):
        store.size(str(paths[1]))


def test_a_worker_that_starts_while_the_store_closes_does_not_stay(monkeypatch, paths):
    start, started, closed = image_pool._Worker.__init__, [], threading.Event()

    def slow(worker, *limits):
        started.append(True)
        closed.wait(20)
        start(worker, *limits)
        started.append(worker.process.pid)

    monkeypatch.setattr(image_pool._Worker, "__init__", slow)
    store, errors = ImageStore(1), []

    def work():
        try:
            store.load(paths[0], SIZE)
        except RuntimeError as error:
            errors.append(str(error))

    thread = threading.Thread(target=work)
    thread.start()
    assert wait_for(lambda: started)
    store.close()  # gives up waiting for the one that starts
    closed.set()
    thread.join(30)
    assert errors == ["the image workers were closed"] and gone(started[1]) and not store._pool.processes()


PARENT = """
import os, signal, sys, time
from capcur_jax.data.images import ImageStore
store = ImageStore(2)
store.size(sys.argv[1])
try:
    print(*store._pool.processes(), flush=True)
    time.sleep(60)
except KeyboardInterrupt:
    print(store.load(sys.argv[1], (4, 6)).shape, flush=True)
"""


@pytest.mark.parametrize("way", [signal.SIGKILL, signal.SIGINT], ids=["killed", "ctrl-c"])
def test_workers_end_with_their_parent_and_not_with_ctrl_c(paths, way):
    command = [sys.executable, "-c", PARENT, paths[0]]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as parent:
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        assert pids and not any(map(gone, pids))
        os.killpg(parent.pid, way)
        output, errors = parent.communicate(timeout=60)
    if way == signal.SIGINT:  # as a terminal sends it, to the whole group
        assert (output, errors, parent.returncode) == ("(4, 6, 3)\n", "", 0)
    assert wait_for(lambda: all(map(gone, pids)))


def test_a_worker_that_can_t_start_is_no_image_s_fault(monkeypatch, paths, tmp_path):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho no module named PIL >&2\nexit 1\n")
    python.chmod(stat.S_IRWXU)
    for executable, words in ((str(python), "no module named PIL"), (str(tmp_path / "none"), "No such file")):
        monkeypatch.setattr(sys, "executable", executable)
        with ImageStore(1) as store, pytest.raises(RuntimeError, match=f"can't start: .*{words}.*config.data.workers"):
            store.size(paths[0])


# ---------------------------------------------------------------------- the keys


@pytest.mark.parametrize("key", ["workers", "image_cache_mb"])
def test_keys_are_checked_and_may_change_in_a_run_that_goes_on(tmp_path, key):
    config = presets.laptop()
    before = config.to_dict()
    for value in (0, config.data[key] + 1):
        config.data[key] = value
        checks.check(config, schedule.stages(config), Sets(config.data, tmp_path))
        check_same_config(before, config.to_dict(), checks.MAY_CHANGE)
    config.data[key] = -1
    with pytest.raises(InputError, match=rf"config\.data\.{key} must be at least 0"):
        checks.check(config, schedule.stages(config), Sets(config.data, tmp_path))
