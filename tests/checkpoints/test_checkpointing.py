"""Checkpoints are exact, whole or absent, and fit any mesh. Run as a script, this file is the processes it tests."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
import types
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from capcur_jax.checkpoints.checkpointing import (
    CheckpointFailed,
    Checkpoints,
    Progress,
    check_same_config,
    go_on,
    record_sizes,
    start_anew,
    truncate_records,
)
from capcur_jax.checkpoints.store import Store
from capcur_jax.errors import InputError
from capcur_jax.records.metrics import CompilationCounter
from tests.environment import TOGETHER


class State(NamedTuple):
    parameters: Any
    optimizer: Any
    skipped: Any


def make_state(seed: int, size: int = 64) -> State:
    """Every dtype of a run's state, numbers that a cast or a text would spoil among them, and optax's records."""
    draw = np.random.default_rng(seed)
    kernel = draw.standard_normal((8, size)).astype(np.float32)
    kernel[0, :4] = [np.nan, -0.0, np.inf, 1e-42]
    parameters = {
        "blocks": {0: {"kernel": kernel}, 1: {"kernel": kernel[::-1].astype(jnp.bfloat16)}},
        "random": draw.integers(0, 2**32, 2, dtype=np.uint32),
        "steps": draw.integers(-(2**31), 2**31, (8,), dtype=np.int32),
    }
    parameters = jax.tree.map(jnp.asarray, parameters)
    floating = {"kernel": parameters["blocks"][0]["kernel"]}
    transform = optax.chain(optax.clip_by_global_norm(1.0), optax.inject_hyperparams(optax.adamw)(learning_rate=0.1))
    return State(parameters, transform.init(floating), jnp.int32(seed))


def shapes(tree: Any, sharding=None) -> Any:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree)


def bits(tree: Any) -> list:
    return [(leaf.dtype.name, leaf.shape, np.asarray(leaf).tobytes()) for leaf in jax.tree.leaves(tree)]


def listed(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir() if path.name != "reference")


def test_a_state_comes_back_bit_for_bit_with_its_types(tmp_path):
    state, position = make_state(1), {"stage": 2, "order": [3, 1], "accuracy": 0.1}
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        assert checkpoints.latest() is None
        checkpoints.save(7, state, position)
        position["stage"] = 3  # the trainer goes on
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        assert checkpoints.latest() == 7
        assert checkpoints.position(7) == {"stage": 2, "order": [3, 1], "accuracy": 0.1}
        restored = checkpoints.restore(7, shapes(state))
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    assert bits(restored) == bits(state)


def test_an_nnx_state_and_scalars_come_back(tmp_path):
    parameters = nnx.state(nnx.Linear(3, 4, rngs=nnx.Rngs(0)))
    state = {"parameters": parameters, "step": 3, "rate": 0.5}
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(1, state, {}, wait=True)
        restored = checkpoints.restore(1, jax.eval_shape(lambda: state))
    assert isinstance(restored["parameters"], nnx.State) and bits(restored["parameters"]) == bits(parameters)
    assert (int(restored["step"]), float(restored["rate"])) == (3, 0.5)


def test_buffers_may_be_donated_and_rewritten_at_once(tmp_path):
    state = {"device": jnp.arange(1 << 20, dtype=jnp.float32), "host": np.arange(1 << 20, dtype=np.int32)}
    before, abstract = bits(state), shapes(state)
    overwrite = jax.jit(lambda array: array * 0 - 1, donate_argnums=0)
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(1, state, {})
        overwrite(state["device"]).block_until_ready()
        state["host"][:] = -1
        assert bits(checkpoints.restore(checkpoints.latest(), abstract)) == before


def test_a_save_returns_before_it_is_written(tmp_path, monkeypatch):
    written, go_on = ocp.JsonCheckpointHandler._save_fn, threading.Event()

    async def late(*arguments):
        assert go_on.wait(20)
        await written(*arguments)

    monkeypatch.setattr(ocp.JsonCheckpointHandler, "_save_fn", late)
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(1, {"a": jnp.ones(3)}, {})
        assert listed(tmp_path) != ["1"]
        go_on.set()
        assert checkpoints.latest() == 1 and listed(tmp_path) == ["1"]


def test_restored_buffers_can_be_donated(tmp_path):
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(1, {"a": jnp.arange(1024.0)}, {}, wait=True)
        restored = checkpoints.restore(1, shapes({"a": jnp.arange(1024.0)}))
        assert float(jax.jit(lambda tree: tree["a"] + 1, donate_argnums=0)(restored)[3]) == 4
        assert float(checkpoints.restore(1, shapes({"a": jnp.arange(1024.0)}))["a"][3]) == 3


def test_the_last_and_the_best_are_kept(tmp_path):
    metrics = [0.2, 0.5, None, 0.5, 0.1, None, 0.3]
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        for step, metric in enumerate(metrics):
            checkpoints.save(step, {"a": jnp.float32(step)}, {"step": step}, metric=metric)
            assert checkpoints.latest() == step
            best = metrics.index(max(known for known in metrics[: step + 1] if known is not None))
            # Of equals the earliest, as the export of the best.
            assert listed(tmp_path) == sorted({str(number) for number in (best, step - 1, step) if number >= 0})
    assert listed(tmp_path) == ["1", "5", "6"]
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        assert checkpoints.latest() == 6
        checkpoints.save(9, {"a": jnp.float32(9)}, {})
    assert listed(tmp_path) == ["1", "9"]
    with pytest.raises(InputError, match="keep"):
        Checkpoints(tmp_path, keep=0)


def test_a_step_is_saved_once_and_in_order(tmp_path):
    state = {"a": jnp.float32(1)}
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        checkpoints.save(4, state, {}, metric=0.5)
        for step in (3, 4):
            with pytest.raises(InputError, match=f"checkpoint of step 4, and step {step} is to be saved"):
                checkpoints.save(step, state, {"later": True})
        assert checkpoints.latest() == 4 and checkpoints.position(4) == {}
    (tmp_path / "5.orbax-checkpoint-tmp").mkdir()  # killed while 5 was being written
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        assert checkpoints.latest() == 4
        checkpoints.save(5, state, {}, wait=True)  # waits till orbax has taken away what was left
    assert listed(tmp_path) == ["4", "5"]


def test_what_does_not_fit_is_named(tmp_path):
    state = {"a": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}, "b": jnp.ones((), jnp.int32)}
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(1, state, {}, wait=True)
        other = {"a": {"kernel": jnp.ones((3, 2)), "scale": jnp.ones(3)}, "b": jnp.ones((), jnp.uint32)}
        with pytest.raises(InputError) as caught:
            checkpoints.restore(1, shapes(other))
        for line in (
            "a.kernel: 'float32[2,3]' -> 'float32[3,2]'",
            "a.bias: 'float32[3]' -> not in",
            "a.scale: not in",
            "b: 'int32[]' -> 'uint32[]'",
        ):
            assert line in str(caught.value)
        with pytest.raises(InputError, match=r"no checkpoint of step 2, only of \[1\]"):
            checkpoints.restore(2, shapes(state))


def test_nothing_is_compiled(tmp_path):
    state = make_state(1)
    with Checkpoints(tmp_path, keep=1) as checkpoints, CompilationCounter() as counter:
        for step in range(3):
            checkpoints.save(step, state, {}, metric=0.5)
        checkpoints.save_reference("grpo", state.parameters)
        checkpoints.restore(checkpoints.latest(), shapes(state))
    assert counter.count == 0


def test_references_stay_as_long_as_a_continuation_may_need_them(tmp_path):
    first, second = {"a": jnp.float32(1)}, {"a": jnp.float32(2)}

    def stored() -> int:
        return len([path for path in (tmp_path / "reference").iterdir() if path.name.isdigit()])

    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save_reference("perception", first)
        checkpoints.save(1, first, {})
        checkpoints.save_reference("reasoning", second)
    # Killed here, a continuation would start from step 1.
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        assert bits(checkpoints.restore_reference("perception", shapes(first))) == bits(first)
        checkpoints.save_reference("reasoning", first)
        checkpoints.save_reference("reasoning", second)
        assert bits(checkpoints.restore_reference("reasoning", shapes(first))) == bits(second)
        assert bits(checkpoints.restore_reference("perception", shapes(first))) == bits(first)
        checkpoints.restore_reference("reasoning", shapes(first))
        checkpoints.save(2, second, {})
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        assert checkpoints.latest() == 2 and stored() == 1
        assert bits(checkpoints.restore_reference("reasoning", shapes(first))) == bits(second)
        with pytest.raises(InputError, match="perception"):
            checkpoints.restore_reference("perception", shapes(first))


def test_configs_are_compared_by_key():
    stored = {"mesh": {"fsdp": 1}, "meshes": 1, "stages": [{"rate": 0.1}], "optimizer": {"beta1": 0.9, "old": 1}}
    now = {"mesh": {"fsdp": 8, "data": 2}, "meshes": 1, "stages": ({"rate": 0.1},), "optimizer": stored["optimizer"]}
    check_same_config(stored, now, ("mesh", "log"))
    now = {**now, "meshes": 2, "stages": [{"rate": 0.2}, {"rate": 1}], "optimizer": {"beta1": 0.95, "new": {"a": []}}}
    with pytest.raises(InputError) as caught:
        check_same_config(stored, now, ("mesh",))
    assert [line.strip() for line in str(caught.value).splitlines()[1:-1]] == [
        "meshes: 1 -> 2",
        "optimizer.beta1: 0.9 -> 0.95",
        "optimizer.new.a: not in the stored one -> []",
        "optimizer.old: 1 -> not in the new one",
        "stages.0.rate: 0.1 -> 0.2",
        "stages.1.rate: not in the stored one -> 1",
    ]
    check_same_config(stored, now, ("meshes", "mesh", "optimizer", "stages"))
    with pytest.raises(InputError, match=r"log: \{\} -> not in the new one"):
        check_same_config({"seed": 1, "log": {}}, {"seed": 1}, ())


def test_records_after_the_checkpoint_are_cut(tmp_path):
    path = tmp_path / "metrics.jsonl"
    truncate_records(path, 0)
    path.write_text('{"step": 1}\n{"step": 2}\n{"st')
    truncate_records(path, 12)
    assert path.read_text() == '{"step": 1}\n'
    truncate_records(path, 12)
    with pytest.raises(InputError, match="12 bytes, but 24"):
        truncate_records(path, 24)
    with pytest.raises(InputError, match="no record ends at byte 5"):
        truncate_records(path, 5)
    truncate_records(path, 0)
    assert path.read_text() == ""
    with pytest.raises(InputError):
        truncate_records(tmp_path / "none.jsonl", 1)


def test_progress_comes_back_and_is_known_again(tmp_path):
    progress = Progress(stage=1, stage_step=2, batches=3, step=7, version=14, best=0.25, seconds=1.5)
    assert progress.number == 8
    state = {"a": jnp.ones(3)}
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        assert not checkpoints.holds(progress)
        checkpoints.save_run(progress, state, {"metrics.jsonl": 10}, metric=0.25)
        assert checkpoints.progress(8) == (progress, {"metrics.jsonl": 10})
        assert checkpoints.holds(dataclasses.replace(progress, seconds=9.0))
        for change in ({"stage": 0, "step": 8}, {"stage_step": 3}, {"batches": 4}, {"version": 15}, {"best": None}):
            assert not checkpoints.holds(dataclasses.replace(progress, **change)), change
        checkpoints.save(9, state, {"position": {"stage": 1}})
        with pytest.raises(InputError, match=r"9 was written by another version .*--workdir"):
            checkpoints.progress(9)


def test_a_step_and_a_stage_move_progress_on():
    begun = Progress(stage=0, stage_step=4, batches=5, step=4, version=8, skipped=1, best=0.5).begin_stage(1, 3)
    assert begun == Progress(stage=1, step=4, version=8, skipped=3, best=0.5)
    assert begun.after_step(2, 3) == dataclasses.replace(begun, stage_step=1, step=5, version=10, batches=3)


ASKED = {
    "latest": lambda checkpoints: checkpoints.latest() == 1,
    "position": lambda checkpoints: checkpoints.position(1) == {"stage": 1},
    "restore": lambda checkpoints: checkpoints.restore(1, shapes({"a": jnp.ones(3)}))["a"].shape == (3,),
}


@pytest.fixture
def slow(monkeypatch):
    """What is written takes a while, from the moment on that its checkpoint is asked for."""
    written = ocp.JsonCheckpointHandler._save_fn

    async def late(*arguments):
        await asyncio.sleep(0.2)
        await written(*arguments)

    monkeypatch.setattr(ocp.JsonCheckpointHandler, "_save_fn", late)


@pytest.mark.parametrize("asked", ASKED)
def test_what_is_asked_waits_for_what_is_being_written(tmp_path, slow, asked):
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(1, {"a": jnp.ones(3)}, {"stage": 1}, metric=0.5)
        assert ASKED[asked](checkpoints)


def test_who_waits_finds_it_on_the_disk(tmp_path, slow):
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save_reference("grpo", {"a": jnp.ones(3)})  # before the stage's first checkpoint needs it
        assert listed(tmp_path / "reference") == ["1"]
        checkpoints.save_run(Progress(step=4), {"a": jnp.ones(3)}, {}, wait=True)
        assert listed(tmp_path) == ["4"]


def test_closing_leaves_no_thread(tmp_path):
    def alive():
        # asyncio keeps the threads of its pool for what comes next.
        return {thread for thread in threading.enumerate() if not thread.name.startswith("asyncio_")}

    before = alive()
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save_reference("grpo", {"a": jnp.ones(3)})
        checkpoints.save(1, {"a": jnp.ones(3)}, {})
    assert alive() <= before


def test_the_reference_of_a_run_that_went_on_stays_for_the_next_one(tmp_path):
    state = {"a": jnp.float32(1)}
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save_reference("grpo", state)
        checkpoints.save(1, state, {})
    for step in (2, 3):
        with Checkpoints(tmp_path, keep=1) as checkpoints:
            assert bits(checkpoints.restore_reference("grpo", shapes(state))) == bits(state)
            checkpoints.save(step, state, {})


def test_the_directory_may_be_relative(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with Checkpoints(Path("run/state"), keep=1) as checkpoints:
        checkpoints.save(1, {"a": jnp.ones(3)}, {})
    assert listed(tmp_path / "run" / "state") == ["1"]


@pytest.mark.parametrize("metric", [float("nan"), float("inf")])
def test_a_metric_that_nothing_can_beat_is_refused(tmp_path, metric):
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        with pytest.raises(ValueError, match="the metric of step 1 is"):
            checkpoints.save(1, {"a": jnp.ones(3)}, {}, metric=metric)
        assert checkpoints.latest() is None


def test_a_checkpoint_of_another_version_is_one_clear_message(tmp_path):
    known = dataclasses.asdict(Progress())
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        for step, position in enumerate(({}, {"progress": {**known, "epoch": 1}, "bytes": {}}, {"progress": known}), 1):
            checkpoints.save(step, {"a": jnp.ones(3)}, position)
            with pytest.raises(InputError, match=f"{step} was written by another version .*--workdir"):
                checkpoints.progress(step)


def test_leaves_that_could_not_come_back_are_refused(tmp_path):
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        with pytest.raises(ValueError, match="same dotted path"):
            checkpoints.save(1, {"a": {"b": jnp.ones(1)}, "a.b": jnp.ones(1)}, {})
        with pytest.raises(ValueError, match="float64, which JAX would not restore"):
            checkpoints.save(1, {"a": np.ones(3)}, {})
        assert checkpoints.latest() is None


def test_arrays_are_read_without_their_tree(tmp_path):
    state = make_state(1)
    store = Store(tmp_path, None, 60)
    store.save(1, state, {})
    store.wait()
    found = store.arrays(1)
    kernel = state.parameters["blocks"][1]["kernel"]
    assert len(found) == len(jax.tree.leaves(state)) and sorted(bits(found)) == sorted(bits(state))
    assert bits(found["parameters.blocks.1.kernel"]) == bits(kernel) and bits(found["skipped"]) == bits(state.skipped)
    with pytest.raises(InputError, match=r"no checkpoint of step 2, only of \[1\]"):
        store.arrays(2)
    store.close()


def test_at_most_twenty_differences_are_listed():
    def message(count: int) -> list[str]:
        with pytest.raises(InputError) as caught:
            check_same_config({"a": 1}, {"a": 1} | {f"key{i:02}": i for i in range(count)}, ())
        return str(caught.value).splitlines()[1:-1]

    assert len(message(20)) == 20 and "key19" in message(20)[-1]
    assert message(22)[:-1] == message(20) and message(22)[-1] == "  and 2 more"


def failing(error: BaseException, cause: BaseException | None = None, context: BaseException | None = None):
    """`error` as it comes from where something was written."""

    async def write(*unused):
        if context is None:
            raise error from cause
        try:
            raise context
        except type(context):
            raise error  # noqa: B904 - as Orbax does

    return write


@pytest.mark.parametrize(
    ("write", "reason"),
    [
        (failing(OSError(5, "Input/output error")), "Input/output error"),
        (failing(OSError("the server does not answer.")), "the server does not answer"),
        (failing(ValueError("a: b: Disk quota exceeded [source='x']\nmore")), "Disk quota exceeded"),
        (failing(ValueError("failed"), cause=OSError(30, "Read-only file system")), "Read-only file system"),
        (failing(ValueError("failed"), context=OSError(30, "Read-only file system")), "Read-only file system"),
    ],
)
def test_what_went_wrong_on_the_disk_is_said_once_with_the_remedy(tmp_path, monkeypatch, caplog, write, reason):
    state = {"a": np.zeros(3 << 18, np.int32)}
    monkeypatch.setattr("shutil.disk_usage", lambda path: types.SimpleNamespace(free=3 << 29))
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(1, state, {}, wait=True)
        with monkeypatch.context() as patch:
            patch.setattr(ocp.JsonCheckpointHandler, "_save_fn", write)
            with pytest.raises(CheckpointFailed) as caught:
                checkpoints.save(2, state, {}, wait=True)
        assert f"2 was not written: {reason}. It takes 3.0 MiB, and 1.5 GiB are free." in str(caught.value)
        assert "1 is complete: the same command goes on" in str(caught.value)
        assert checkpoints.latest() == 1 and listed(tmp_path) == ["1"]
    assert not caplog.records  # Orbax would log its traceback


@pytest.mark.parametrize("asked", ASKED)
def test_whoever_asks_learns_that_the_last_one_was_not_written(tmp_path, monkeypatch, asked):
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        with monkeypatch.context() as patch:
            patch.setattr(ocp.JsonCheckpointHandler, "_save_fn", failing(OSError(5, "Input/output error")))
            checkpoints.save(1, {"a": jnp.ones(3)}, {}, metric=0.5)
            with pytest.raises(CheckpointFailed, match=r"1 was not written: Input/output error.*Nothing is complete"):
                ASKED[asked](checkpoints)
        assert checkpoints.latest() is None  # it is said once


def test_another_error_is_not_taken_for_the_disk_s(tmp_path, monkeypatch):
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        with monkeypatch.context() as patch:
            patch.setattr(ocp.JsonCheckpointHandler, "_save_fn", failing(ZeroDivisionError("a bug")))
            with pytest.raises(ZeroDivisionError, match="a bug"):
                checkpoints.save(1, {"a": jnp.ones(3)}, {}, wait=True)
        assert checkpoints.latest() is None


def test_a_run_that_is_stopped_before_its_first_checkpoint_begins_anew(tmp_path):
    assert start_anew(tmp_path, owner=True) == Progress()  # an empty directory
    files = [tmp_path / name for name in ("metrics.jsonl", "rollouts.jsonl")]
    for file in files:
        file.write_text('{"type": "evaluation"}\n')
    assert start_anew(tmp_path, owner=False) == Progress() and all(file.exists() for file in files)
    assert start_anew(tmp_path, owner=True) == Progress() and not any(file.exists() for file in files)
    files[0].write_text('{"type": "evaluation"}\n{"type": "step"}\n')
    for owner in (True, False):
        with pytest.raises(InputError, match="holds the records of a run but no checkpoint"):
            start_anew(tmp_path, owner)
    assert files[0].read_text().count("\n") == 2


def test_no_process_reads_what_the_owner_has_deleted(tmp_path, monkeypatch):
    records, met = tmp_path / "metrics.jsonl", {}
    records.write_text('{"type": "evaluation"}\n')
    meet = lambda name: met.setdefault(name, records.exists())  # noqa: E731
    monkeypatch.setattr("capcur_jax.devices.distributed.barrier", meet)
    start_anew(tmp_path, owner=True)
    assert met == {"read": True, "anew": False}


FAULTS = {"flipped": lambda data: data[:-9] + bytes([data[-9] ^ 4]) + data[-8:], "cut": lambda data: data[:-1]}


def spoil(folder: Path, fault: str, part: str = "ocdbt") -> Path:
    """Damages the largest file below `folder` whose path has that part."""
    files = [path for path in folder.rglob("*") if part in str(path) and path.is_file()]
    file = max(files, key=lambda path: path.stat().st_size)
    if fault == "gone":
        file.unlink()
    else:
        file.write_bytes(FAULTS[fault](file.read_bytes()))
    return file


def saved(directory: Path, keep: int = 2) -> State:
    """Checkpoints 1 and 2 of a first stage and 3 of a second, each stage with its reference policy."""
    with Checkpoints(directory, keep=keep) as checkpoints:
        for step, stage in ((1, "first"), (2, ""), (3, "second")):
            if stage:
                checkpoints.save_reference(stage, {"a": jnp.arange(9) + step})
            checkpoints.save(step, make_state(step), {"at": step}, metric=1 / step)
    return make_state(2)


@pytest.mark.parametrize("fault", ["flipped", "cut", "gone"])
@pytest.mark.parametrize("part", ["3/arrays", "3/document", "3/metrics", "reference/2/arrays"])
def test_a_damaged_last_checkpoint_is_set_aside_and_the_one_before_is_taken(tmp_path, fault, part):
    state = saved(tmp_path)
    file = spoil(tmp_path, fault, part)
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        (line,) = checkpoints.set_aside
        assert line.startswith("checkpoint 3 is damaged: ") and str(file) in line and "damaged-3" in line
        assert checkpoints.latest() == 2 and checkpoints.position(2) == {"at": 2}
        assert bits(checkpoints.restore(2, shapes(state))) == bits(state)
        first = checkpoints.restore_reference("first", {"a": jax.ShapeDtypeStruct((9,), np.int32)})
        assert first["a"].tolist() == list(range(1, 10))
        checkpoints.save(3, state, {}, wait=True)
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        assert not checkpoints.set_aside and checkpoints.latest() == 3
        assert (tmp_path / "damaged-3").is_dir()


def test_a_lost_folder_of_references_is_said_when_the_checkpoints_are_opened(tmp_path):
    """Long before a stage asks for its reference: a run opens its checkpoints before model, plan and programs."""
    saved(tmp_path)
    shutil.rmtree(tmp_path / "reference")
    with pytest.raises(InputError, match="no checkpoint in") as caught:
        Checkpoints(tmp_path, keep=2)
    assert f"3: {tmp_path / 'reference' / '2'}" in str(caught.value) and "Put the files back" in str(caught.value)


def test_where_no_checkpoint_is_sound_all_are_named_and_stay(tmp_path):
    saved(tmp_path)
    files = [spoil(tmp_path / str(step), "flipped") for step in (1, 2, 3)]  # 1 is the best
    before = listed(tmp_path)
    with pytest.raises(InputError, match="no checkpoint in") as caught:
        Checkpoints(tmp_path, keep=2)
    assert all(str(file) in str(caught.value) for file in files[1:]) and listed(tmp_path) == before


def test_a_checkpoint_without_sums_is_one_clear_message(tmp_path):
    saved(tmp_path, keep=1)
    for file in tmp_path.glob("*/sums.json"):
        file.unlink()
    with pytest.raises(InputError, match=r"no checkpoint(?s:.*)3 has no sums\.json: an earlier version"):
        Checkpoints(tmp_path, keep=1)


def test_a_damaged_metric_of_an_old_checkpoint_does_not_end_a_run(tmp_path):
    saved(tmp_path)
    spoil(tmp_path, "cut", "1/metrics")
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        assert checkpoints.latest() == 3 and "checkpoint 1 is damaged" in checkpoints.set_aside[0]


def test_a_run_that_goes_on_has_the_records_of_its_checkpoint(tmp_path):
    metrics, rollouts = tmp_path / "metrics.jsonl", tmp_path / "rollouts.jsonl"
    metrics.write_text('{"type": "step", "step": 1}\n')
    rollouts.write_text('{"step": 1}\n')
    before, sizes = [metrics.read_bytes(), rollouts.read_bytes()], record_sizes(tmp_path)
    assert sizes == {"metrics.jsonl": 28, "rollouts.jsonl": 12}
    progress = Progress(step=1, stage_step=1)
    with Checkpoints(tmp_path / "state", keep=1) as checkpoints:
        checkpoints.save_run(progress, {"a": jnp.ones(3)}, sizes, wait=True)
        for path in (metrics, rollouts):
            path.write_bytes(path.read_bytes() * 2)
        assert go_on(tmp_path, False, checkpoints, 1) == progress
        assert [path.stat().st_size for path in (metrics, rollouts)] == [56, 24]
        assert go_on(tmp_path, True, checkpoints, 1) == progress
        assert [path.read_bytes() for path in (metrics, rollouts)] == before
    rollouts.unlink()
    assert record_sizes(tmp_path) == {"metrics.jsonl": 28}


# What needs processes of its own: each function `run_...` below is one, started by its name.


def start(name: str, *arguments: Any, devices: int = 1) -> subprocess.Popen:
    root = str(Path(__file__).resolve().parents[2])
    settings = {**os.environ, "PYTHONPATH": root, "JAX_NUM_CPU_DEVICES": str(devices), **TOGETHER}
    command = [sys.executable, __file__, name, *map(str, arguments)]
    return subprocess.Popen(command, env=settings, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(*processes: subprocess.Popen) -> list[str]:
    try:
        outputs = [process.communicate(timeout=300)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == 0, output
    return outputs


def sharded(mesh: Mesh, spec: tuple, values: np.ndarray) -> jax.Array:
    return jax.make_array_from_callback(values.shape, NamedSharding(mesh, PartitionSpec(*spec)), lambda i: values[i])


def mesh_state(mesh: Mesh | None) -> dict[str, Any]:
    """Sharded by both axes, by one (a replica by the other), by neither, and on the host's memory; [16, 8] each."""
    values = np.random.default_rng(0).standard_normal((16, 8)).astype(np.float32)
    if mesh is None:
        return {"both": values, "one": values * 2, "none": values.astype(jnp.bfloat16), "count": np.int32(5)}
    pinned = NamedSharding(mesh, PartitionSpec("fsdp"), memory_kind="pinned_host")
    return {
        "both": sharded(mesh, ("data", "fsdp"), values),
        "one": jax.device_put(sharded(mesh, ("fsdp",), values * 2), pinned),
        "none": sharded(mesh, (), values.astype(jnp.bfloat16)),
        "count": sharded(mesh, (), np.array(5, np.int32)),
    }


def run_meshes(directory: str) -> None:
    devices = np.array(jax.devices())
    assert len(devices) == 8
    state = mesh_state(Mesh(devices.reshape(4, 2), ("data", "fsdp")))
    with Checkpoints(Path(directory), keep=1) as checkpoints:
        with CompilationCounter() as counter:
            checkpoints.save(1, state, {}, wait=True)
        assert counter.count == 0, counter.count
        for shape in ((4, 2), (2, 4), (1, 8), (8, 1)):
            target = mesh_state(Mesh(devices.reshape(shape), ("data", "fsdp")))
            abstract = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), target)
            restored = checkpoints.restore(1, abstract)
            assert bits(restored) == bits(mesh_state(None))
            for name, array in restored.items():
                assert array.sharding == target[name].sharding and array.sharding.memory_kind == (
                    "pinned_host" if name == "one" else "device"
                ), (name, array.sharding)


def test_a_checkpoint_fits_any_mesh(tmp_path):
    finish(start("meshes", tmp_path, devices=8))
    with Checkpoints(tmp_path, keep=1) as checkpoints:  # and one device
        assert bits(checkpoints.restore(1, shapes(mesh_state(None)))) == bits(mesh_state(None))


def connect(number: str, port: str) -> np.ndarray:
    """The four devices of two processes, [process, device]."""
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"localhost:{port}", num_processes=2, process_id=int(number))
    return np.array(jax.devices()).reshape(2, 2)


def start_two(name: str, *arguments: Any) -> list[subprocess.Popen]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [start(name, number, port, *arguments, devices=2) for number in range(2)]


def run_process(number: str, port: str, directory: str) -> None:
    devices = connect(number, port)
    state = mesh_state(Mesh(devices, ("fsdp", "data")))  # "both" and "one" lie half on either process
    state["local"] = jnp.arange(3)
    with CompilationCounter() as counter:
        checkpoints = Checkpoints(Path(directory), keep=1)
        checkpoints.save_reference("grpo", {"both": state["both"]})
        for step in (1, 2):
            checkpoints.save(step, state, {"step": step}, metric=0.5 - step)
        assert checkpoints.latest() == 2
    assert counter.count == 0, counter.count
    target = mesh_state(Mesh(devices.T, ("fsdp", "data")))
    target["local"] = sharded(Mesh(devices, ("fsdp", "data")), (), np.zeros(3, np.int32))
    abstract = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), target)
    restored = checkpoints.restore(2, abstract)
    expected = {**mesh_state(None), "local": np.arange(3)}
    for name, array in restored.items():
        assert array.sharding == target[name].sharding
        for shard in array.addressable_shards:
            np.testing.assert_array_equal(np.asarray(shard.data), expected[name][shard.index])
    checkpoints.restore_reference("grpo", {"both": abstract["both"]})
    checkpoints.close()


def test_two_processes_write_one_checkpoint(tmp_path):
    finish(*start_two("process", tmp_path))
    assert listed(tmp_path) == ["1", "2"]
    parts = {path.name for path in (tmp_path / "2" / "arrays").iterdir()}
    assert {"ocdbt.process_0", "ocdbt.process_1"} <= parts, "one process wrote it all"
    expected = {**mesh_state(None), "local": np.arange(3, dtype=np.int32)}
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        assert checkpoints.position(2) == {"step": 2}
        assert bits(checkpoints.restore(2, shapes(expected))) == bits(expected)


def run_half(number: str, port: str, directory: str) -> None:
    """The second process cannot write its half of step 2."""
    devices = connect(number, port)
    values = np.random.default_rng(0).standard_normal((2, 1 << 19)).astype(np.float32)
    state = {"a": sharded(Mesh(devices, ("fsdp", "data")), ("fsdp",), values)}
    with Checkpoints(Path(directory), keep=1) as checkpoints:
        checkpoints.save(1, state, {})
    if number == "1":
        limit_files(1 << 20)
    checkpoints = Checkpoints(Path(directory), keep=1, timeout=2)
    checkpoints.save(2, state, {})
    reason = "File too large" if number == "1" else "Timed out"
    with pytest.raises(CheckpointFailed, match=f"2 was not written: {reason}.*1 is complete"):
        checkpoints.save(3, state, {})
    checkpoints.close()


def test_half_a_checkpoint_is_none(tmp_path):
    finish(*start_two("half", tmp_path))
    assert listed(tmp_path) == ["1"]


def killed_state(step: int) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(step)
    return {f"layer{i}": draw.integers(0, 2**32, 1 << 15, dtype=np.uint32) for i in range(40)}


def continue_until_killed(directory: Path, report: int) -> None:
    checkpoints = Checkpoints(directory, keep=2)
    last = checkpoints.latest()
    if last is not None:
        assert checkpoints.position(last)["step"] == last
        assert bits(checkpoints.restore(last, shapes(killed_state(last)))) == bits(killed_state(last))
    os.write(report, b"ready")
    for step in range((last or 0) + 1, 10**6):
        checkpoints.save(step, killed_state(step), {"step": step}, metric=float(step % 5))


def kill_in_a_save(child: int, directory: Path, draw: random.Random) -> None:
    """Kills it when it has completed some saves more and is somewhere in the next one."""
    begun, more = last_in(directory), draw.randint(0, 2)
    limit = time.monotonic() + 60
    while time.monotonic() < limit:
        time.sleep(draw.uniform(0.0, 0.02))
        os.kill(child, signal.SIGSTOP)
        assert os.WIFSTOPPED(os.waitpid(child, os.WUNTRACED)[1]), "it ended by itself"
        if last_in(directory) >= begun + more and any("tmp" in name for name in os.listdir(directory)):
            os.kill(child, signal.SIGKILL)
            assert os.waitpid(child, 0)[1] == signal.SIGKILL
            return
        os.kill(child, signal.SIGCONT)
    raise AssertionError("no save in a minute")


def last_in(directory: Path) -> int:
    return max((int(name) for name in os.listdir(directory) if name.isdigit()), default=0)


def run_kills(directory: str, count: str) -> None:
    """Forks before JAX has threads: importing it anew for every kill would take most of the time."""
    draw = random.Random(0)
    for _ in range(int(count)):
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                continue_until_killed(Path(directory), writing)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(1)
        os.close(writing)
        assert os.read(reading, 5) == b"ready", "the checkpoint that the last kill left is not whole"
        kill_in_a_save(child, Path(directory), draw)
        os.close(reading)


def test_kills_leave_whole_checkpoints(tmp_path):
    finish(start("kills", tmp_path, 10))
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        last = checkpoints.latest()
        assert last > 1, "no save was ever completed"
        assert bits(checkpoints.restore(last, shapes(killed_state(last)))) == bits(killed_state(last))
        checkpoints.save(last + 1, killed_state(last + 1), {})
    assert not [name for name in listed(tmp_path) if not name.isdigit()]


def save_on_full(directory: Path, reason: str, fill: Any, empty: Any) -> None:
    """One checkpoint fits, the next does not, and once there is room a later one does."""
    state = {"a": np.random.default_rng(0).standard_normal(2 << 18).astype(np.float32)}  # 2 MiB
    checkpoints = Checkpoints(directory, keep=1)
    checkpoints.save(1, state, {}, wait=True)
    fill()
    for last in ("save", "close"):
        checkpoints.save(2, state, {})  # the error comes with the next call
        with pytest.raises(CheckpointFailed) as caught:
            checkpoints.save(3, state, {}) if last == "save" else checkpoints.close()
        for part in (f"{directory}/2 was not written: {reason}. It takes 2.0 MiB", "Make room", "1 is complete"):
            assert part in str(caught.value), str(caught.value)
        assert listed(directory)[0] == "1" and not [name for name in listed(directory) if "tmp" in name]
    empty()
    with Checkpoints(directory, keep=1) as checkpoints:
        assert checkpoints.latest() == 1
        assert bits(checkpoints.restore(1, shapes(state))) == bits(state)
        fill()
        checkpoints.save(2, state, {})
        with pytest.raises(CheckpointFailed):
            checkpoints.latest()
        assert checkpoints.latest() == 1 and checkpoints.position(1) == {}
        empty()
        checkpoints.save(2, state, {})
    assert listed(directory)[0] == "2"


def limit_files(size: int | None) -> None:
    _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most if size is None else size, most))


def run_limit(directory: str) -> None:
    """Files of half the size may be written, so that the document goes through and the arrays do not."""
    save_on_full(Path(directory), "File too large", lambda: limit_files(1 << 20), lambda: limit_files(None))


def test_a_write_that_fails_is_an_error_and_leaves_the_last(tmp_path):
    finish(start("limit", tmp_path))


def test_a_full_disk_is_an_error_and_leaves_the_last(tmp_path):
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "none", tmp_path], capture_output=True)
    if mounted.returncode:
        pytest.skip("needs the right to mount a small file system")
    filler = tmp_path / "filler"
    try:
        directory = tmp_path / "checkpoints"

        def fill():
            with open(filler, "wb") as file:
                file.write(bytes(os.statvfs(tmp_path).f_bavail * os.statvfs(tmp_path).f_frsize - (3 << 19)))

        save_on_full(directory, "No space left on device", fill, filler.unlink)
    finally:
        subprocess.run(["umount", tmp_path], check=True)


if __name__ == "__main__":
    globals()[f"run_{sys.argv[1]}"](*sys.argv[2:])
