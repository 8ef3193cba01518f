"""The image workers: what they read is what this process reads, and an image that they die of is a bad one."""

import os
import signal
import stat
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import psutil
import pytest
from PIL import Image

from capcur_jax import checks, presets, schedule, workers
from capcur_jax.checkpoints.checkpointing import check_same_config
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
    ask = workers.Worker.ask

    def struck(worker, request):
        if request["path"] in (paths[3], paths[7]) and (request["path"] == paths[3] or not struck.done):
            struck.done |= request["path"] == paths[7]
            os.kill(worker.process.pid, way)
        return ask(worker, request)

    struck.done = False
    monkeypatch.setattr(workers.Worker, "ask", struck)
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


def test_memory_is_limited_in_workers(paths, tmp_path):
    Image.new("RGB", (9000, 9000)).save(tmp_path / "a.png")
    with ImageStore(1, memory_mb=256) as store:
        with pytest.raises(BadImage, match=r"a\.png: not enough memory to decode it; shrink"):
            store.load(str(tmp_path / "a.png"), SIZE)
        assert store.load(paths[0], SIZE).shape == (*SIZE, 3)
        assert store.counters()["deaths"] == 0


def test_a_closed_store_reads_no_more(paths):
    with ImageStore(1) as store:
        store.size(paths[0])
        pids = store._pool.processes()
    assert pids and all(map(gone, pids))
    with pytest.raises(RuntimeError, match="the image workers were closed"):
        store.size(paths[1])


def test_a_store_that_nobody_holds_leaves_no_worker(paths):
    store = ImageStore(1, cache_mb=1)
    store.load(paths[0], SIZE)
    pids = store._pool.processes()
    del store
    assert pids and all(map(gone, pids))


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
    with pytest.raises(InputError, match=rf"config\.data\.{key} = -1: it must lie in"):
        checks.check(config, schedule.stages(config), Sets(config.data, tmp_path))
