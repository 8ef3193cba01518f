"""Versions of weights on disk: the published tensors bit for bit, only what changed, whole or not there at all."""

from __future__ import annotations

import shutil
import threading
import types
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from capcur_jax.errors import InputError, RolloutError
from capcur_jax.models import config as config_lib
from capcur_jax.models import huggingface, weight_files
from capcur_jax.models.lora import LoRA
from capcur_jax.rollout.sglang import manifest, weights
from capcur_jax.rollout.sglang.weights import WeightStore
from tests.devices.test_distributed import by_variables, free_port
from tests.devices.test_distributed import run as run_processes

SMALL = 13_000  # bytes of a file: stacked parameters are split


def read(directory) -> dict[str, np.ndarray]:
    """Every tensor of a directory; none is there twice."""
    found = {}
    for file in sorted(directory.glob("*.safetensors")):
        tensors = load_file(file)
        assert not tensors.keys() & found.keys(), file
        found |= tensors
    return found


def assert_bits(ours: dict, theirs: dict) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype and ours[name].shape == tensor.shape, name
        assert ours[name].tobytes() == np.ascontiguousarray(tensor).tobytes(), name


def is_visual(path) -> bool:
    return path[0] == "visual"


def split(parameters, frozen):
    """(trained, frozen), as a trainer holds them."""
    flat = list(nnx.to_flat_state(parameters))
    return tuple(nnx.from_flat_state([(p, x) for p, x in flat if frozen(p) == side]) for side in (False, True))


def stepped(parameters, frozen=lambda path: False):
    """After an optimizer step: new arrays for all but the frozen, merged as Trainer.parameters does."""
    trained, still = split(parameters, frozen)
    moved = [(path, leaf.replace(leaf[...] + 0.5)) for path, leaf in nnx.to_flat_state(trained)]
    return nnx.merge_state(nnx.from_flat_state(moved), still)


def published(parameters, config, dtype=np.float32) -> dict[str, np.ndarray]:
    return dict(huggingface.published_tensors(parameters, config, dtype))


@pytest.fixture
def make(tmp_path, model):
    """A store in tmp_path / "weights"; closed at the end."""
    made = []

    def new(config=model.config, dtype=np.float32, **kinds):
        for old in made:
            old.close()
        made.append(WeightStore(tmp_path / "weights", config, dtype, file_bytes=SMALL, **kinds))
        return made[-1]

    yield new
    for store in made:
        store.close()


# --------------------------------------------------------------------- what is written


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["qwen3_vl", "qwen2_5_vl"])
def test_a_version_is_the_published_checkpoint(make, checkpoint, windowed_untied_checkpoint, family, dtype):
    source = {"qwen3_vl": checkpoint, "qwen2_5_vl": windowed_untied_checkpoint}[family]
    loaded = huggingface.load(source)
    assert loaded.config.family == family
    update = make(loaded.config, dtype).write(nnx.state(loaded), 1)
    want = {name: tensor.astype(dtype) for name, tensor in load_file(source / "model.safetensors").items()}
    for directory in (update.directory, update.complete):
        assert_bits(read(directory), want)
        assert manifest.verify(directory) == 1
    assert update.checksums.keys() == want.keys() and sum(len(file.checksums) for file in update.files) == len(want)
    assert update.bytes == sum(tensor.nbytes for tensor in want.values()) == sum(file.bytes for file in update.files)
    assert update.seconds.keys() == {"gather", "write"} and all(value >= 0 for value in update.seconds.values())


def test_files_are_of_the_size_asked_for_and_of_one_parameter(make, model):
    update = make().write(nnx.state(model), 1)
    assert any(len(file.checksums) > 1 for file in update.files)
    for file in update.files:
        assert file.bytes <= SMALL or len(file.checksums) == 1
        names = load_file(update.directory / file.name)
        assert names.keys() == file.checksums.keys()
        assert len({"".join(c for c in name if not c.isdigit()) for name in names}) == 1
        assert sum(tensor.nbytes for tensor in names.values()) == file.bytes
    split_up = [file.name for file in update.files if file.name.startswith("text.layers.up.kernel-")]
    assert len(split_up) > 1


def test_transformers_knows_the_names(make, checkpoint, transformers_model, model):
    update = make().write(nnx.state(model), 1)
    known = {weight_files.neutral(name) for name, _ in transformers_model(checkpoint).named_parameters()}
    assert {weight_files.neutral(name) for name in update.checksums} == known


def test_factors_are_merged_and_alone_decide_what_changed(make, checkpoint, tmp_path):
    lora = LoRA(rank=2, alpha=4.0, targets=("q", "down"))
    adapted = huggingface.load(checkpoint, lora=lora)
    store, parameters = make(lora=lora), nnx.state(adapted)
    store.write(parameters, 1)
    moved = stepped(parameters, frozen=lambda path: not path[-1].startswith("lora_"))
    update = store.write(moved, 2)
    assert {name.split(".")[-2] for name in update.checksums} == {"q_proj", "down_proj"}
    huggingface.save(tmp_path / "out", moved, adapted.config, checkpoint, np.float32, lora=lora)
    want = load_file(tmp_path / "out" / "model.safetensors")
    assert_bits(read(update.complete), want)
    assert any((want[name] != value).any() for name, value in load_file(checkpoint / "model.safetensors").items())


# --------------------------------------------------------------------- only what changed


def test_frozen_parts_are_neither_gathered_nor_written(make, model, monkeypatch):
    store, parameters = make(), nnx.state(model)
    store.write(parameters, 1)
    gathered = []
    fetch = huggingface._fetch
    monkeypatch.setattr(huggingface, "_fetch", lambda value, *rest: gathered.append(value) or fetch(value, *rest))
    parameters = stepped(parameters, is_visual)
    update = store.write(parameters, 2)
    assert update.checksums and not any("visual" in name for name in update.checksums)
    visual = [leaf[...] for path, leaf in nnx.to_flat_state(parameters) if is_visual(path)]
    assert gathered and visual and not any(value is one for value in gathered for one in visual)
    want = published(parameters, model.config)
    assert_bits(read(update.directory), {name: want[name] for name in update.checksums})
    assert_bits(read(update.complete), want)
    again = store.write(parameters, 3)
    assert not again.files and again.bytes == 0 and not read(again.directory)
    assert_bits(read(again.complete), want)


def test_equal_values_in_another_array_are_written(make, model):
    """Identity decides: comparing values would need the gather that is to be saved."""
    store, parameters = make(), nnx.state(model)
    store.write(parameters, 1)
    copied = jax.tree.map(jnp.array, parameters)
    assert len(store.write(copied, 2).checksums) == len(published(parameters, model.config))


def test_what_numpy_holds_is_written_every_time(make, model):
    store = make()
    held = jax.tree.map(lambda x: np.array(x), nnx.state(model))
    store.write(held, 1)
    held["text"]["norm"]["scale"].get_value()[:] += 1  # in place: the same object
    update = store.write(held, 2)
    assert_bits(read(update.complete), published(held, model.config))


def test_the_store_keeps_no_parameters_alive(make, model):
    store = make()
    parameters = stepped(nnx.state(model))
    array = weakref.ref(parameters["text"]["norm"]["scale"].get_value())
    store.write(parameters, 1)
    assert array() is not None
    del parameters
    assert array() is None


def test_complete_holds_the_newest_of_everything_through_changes_of_what_is_frozen(make, model):
    """Vision trained, frozen, trained, text frozen: each time with the versions before discarded."""
    store, parameters = make(), nnx.state(model)
    stages = [lambda path: False, lambda path: False, is_visual, is_visual, lambda path: not is_visual(path), is_visual]
    for version, frozen in enumerate(stages, 1):
        parameters = stepped(parameters, frozen)
        update = store.write(parameters, version)
        assert_bits(read(update.complete), published(parameters, model.config))
        assert manifest.verify(update.complete) == version
        store.discard(before=version)
        assert_bits(read(update.complete), published(parameters, model.config))
        assert [path.name for path in store.directory.glob("version-*")] == [f"version-{version:08d}"]
    parameters = stepped(parameters, lambda path: path[-1] != "scale")
    assert {name.split(".")[-1] for name in store.write(parameters, 20).checksums} == {"weight"}


def test_discard_keeps_what_is_newer_and_always_the_last(make, model):
    store, parameters = make(), nnx.state(model)
    updates = []
    for version in (1, 2, 5):
        parameters = stepped(parameters, is_visual)
        updates.append(store.write(parameters, version))
    store.discard(before=2)
    assert [update.directory.exists() for update in updates] == [False, True, True]
    store.discard(before=99)
    assert [update.complete.exists() for update in updates] == [False, False, True]
    assert_bits(read(updates[-1].complete), published(parameters, model.config))


def test_versions_ascend(make, model):
    store, parameters = make(), nnx.state(model)
    update = store.write(parameters, 3)
    assert store.write(parameters, 3) == update
    for version in (2, 3):
        with pytest.raises(ValueError, match=f"version {version} comes after version 3"):
            store.write(stepped(parameters), version)
    assert manifest.verify(update.complete) == 3


# --------------------------------------------------------------------- whole or not at all


def test_a_disk_that_fills_up_leaves_the_version_before(make, model, monkeypatch):
    store, parameters = make(), nnx.state(model)
    first = store.write(parameters, 1)
    before = read(first.complete)
    write, calls = weight_files.write, []

    def full(file, tensors):
        calls.append(file)
        if len(calls) > 3:
            raise OSError(28, "No space left on device")
        return write(file, tensors)

    moved = stepped(parameters, is_visual)
    with monkeypatch.context() as patch:
        patch.setattr(weight_files, "write", full)
        with pytest.raises(
            RolloutError, match=r"version 2 .*No space left on device.*config\.rollout\.sglang\.weights"
        ):
            store.write(moved, 2)
    assert len(calls) > 3
    assert [path.name for path in store.directory.glob("*version*")] == ["version-00000001"]
    assert not list(store.directory.glob(".partial*"))
    assert_bits(read(first.complete), before)
    assert manifest.verify(first.complete) == 1
    update = store.write(moved, 2)  # all that changed since version 1, the files of the failed attempt too
    assert_bits(read(update.complete), published(moved, model.config))
    assert update.checksums and not any("visual" in name for name in update.checksums)


def test_an_error_while_gathering_leaves_nothing_half_written(make, model, monkeypatch):
    store, parameters = make(), nnx.state(model)
    with monkeypatch.context() as patch:
        patch.setattr(huggingface, "_fetch", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            store.write(parameters, 1)
    assert not list(store.directory.glob("*version*")) and not list(store.directory.glob(".partial*"))
    assert manifest.verify(store.write(parameters, 1).complete) == 1


def test_no_room_is_said_before_anything_is_written(make, model, monkeypatch):
    store, parameters = make(), nnx.state(model)
    first = store.write(parameters, 1)
    usage = shutil.disk_usage(store.directory)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=first.bytes))
    monkeypatch.setattr(weight_files, "write", lambda *_: pytest.fail("written"))
    with pytest.raises(InputError) as error:
        store.write(stepped(parameters), 2)
    for part in ("config.rollout.sglang.weights", str(store.directory), f"{first.bytes:,} bytes left", "needs"):
        assert part in str(error.value)
    assert manifest.verify(first.complete) == 1 and not list(store.directory.glob(".partial*"))


def test_what_an_earlier_process_left_is_removed_at_the_start(make, model, tmp_path):
    store = make()
    whole = store.write(nnx.state(model), 7)
    half = store.directory / ".partial-00000008" / "update"
    half.mkdir(parents=True)
    shutil.copy(next(whole.directory.glob("*.safetensors")), half)
    with pytest.raises(RolloutError, match="no whole version"):
        manifest.verify(half)
    other = store.directory / "mine.txt"
    other.write_text("not the store's")
    store._lock.close()  # as when its process is killed
    again = WeightStore(store.directory, model.config, np.float32)
    assert [path.name for path in store.directory.iterdir() if path.name[0] != "."] == ["mine.txt"]
    assert not half.exists()
    assert manifest.verify(again.write(nnx.state(model), 1).complete) == 1
    again.close()
    assert [path.name for path in store.directory.iterdir() if path.name != ".lock"] == ["mine.txt"]


def test_a_directory_has_one_store(make, model):
    store = make()
    update = store.write(nnx.state(model), 1)
    with pytest.raises(InputError, match=r"config\.rollout\.sglang\.weights = .* is in use by another run"):
        WeightStore(store.directory, model.config, np.float32)
    assert manifest.verify(update.complete) == 1


def test_a_directory_that_cannot_be_made_is_named(model, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"config\.rollout\.sglang\.weights = .*file"):
        WeightStore(tmp_path / "file" / "weights", model.config, np.float32)


def test_verify_names_file_and_tensor(make, model):
    update = make().write(nnx.state(model), 1)
    one, other = sorted(update.directory.glob("text.layers.down.kernel*"))
    *_, last = load_file(one)
    whole = one.read_bytes()
    flipped = bytearray(whole)
    flipped[-5] ^= 4
    for content, parts in (
        (bytes(flipped), (one.name, f"checksum of {last}")),
        (whole[:-5], (one.name, last, "cut off")),
        (whole[:20], (one.name,)),
        (whole.replace(b"down_proj", b"dawn_proj"), (one.name, "manifest.json")),
        (other.read_bytes(), (one.name, "manifest.json")),
        (whole.replace(b"F32", b"F16"), (one.name,)),
    ):
        one.unlink()  # not written to: in `complete` it is the same file
        one.write_bytes(content)
        with pytest.raises(RolloutError) as error:
            manifest.verify(update.directory)
        assert all(part in str(error.value) for part in parts), (parts, error.value)
    one.unlink()
    with pytest.raises(RolloutError, match=one.name):
        manifest.verify(update.directory)
    one.write_bytes(whole)
    assert manifest.verify(update.directory) == manifest.verify(update.complete) == 1
    shutil.copy(one, update.directory / "extra.safetensors")
    with pytest.raises(RolloutError, match=r"extra\.safetensors is not in manifest\.json"):
        manifest.verify(update.directory)


# --------------------------------------------------------------------- wrong names


def edited(parameters, change):
    flat = dict(nnx.to_flat_state(parameters))
    change(flat)
    return nnx.from_flat_state(list(flat.items()))


def test_wrong_names_and_shapes_never_reach_a_server(make, model):
    store, parameters = make(), nnx.state(model)
    norm, up = ("text", "norm", "scale"), ("text", "layers", "up", "kernel")
    cases = {
        r"text\.norm\.weight is no parameter of the qwen3_vl": lambda p: p.update(
            {("text", "norm", "weight"): p[norm]}
        ),
        r"text\.norm\.scale is missing, .* model\.language_model\.norm\.weight": lambda p: p.pop(norm),
        r"text\.layers\.up\.kernel has shape": lambda p: p.update({up: p[up].replace(p[up][...][:-1])}),
    }
    for message, change in cases.items():
        with pytest.raises(ValueError, match=message):
            store.write(edited(parameters, change), 1)
    assert not list(store.directory.glob("*version*")) and not list(store.directory.glob(".partial*"))


def test_another_family_is_refused(make, model, windowed_untied_checkpoint):
    store = make(config_lib.from_directory(windowed_untied_checkpoint))
    with pytest.raises(ValueError, match="is no parameter of the qwen2_5_vl"):
        store.write(nnx.state(model), 1)


# --------------------------------------------------------------------- memory, several processes


def test_the_host_holds_a_file_for_each_writer_and_one_more(make, model, monkeypatch):
    store, gathered, go, started = make(writers=2), [], threading.Event(), threading.Semaphore(0)
    real, tensors_of = weight_files.write, huggingface.published_tensors

    def counted(*arguments, **kinds):
        for name, tensor in tensors_of(*arguments, **kinds):
            gathered.append(name)
            yield name, tensor

    def slow(file, tensors):
        started.release()
        assert go.wait(60)
        return real(file, tensors)

    class Places(threading.Semaphore):
        def acquire(self):
            if not super().acquire(blocking=False):
                full.set()
                super().acquire()

    full = threading.Event()
    monkeypatch.setattr(weights, "threading", types.SimpleNamespace(Semaphore=Places))
    monkeypatch.setattr(huggingface, "published_tensors", counted)
    monkeypatch.setattr(weight_files, "write", slow)
    done = []
    thread = threading.Thread(target=lambda: done.append(store.write(nnx.state(model), 1)))
    thread.start()
    assert started.acquire(timeout=60) and started.acquire(timeout=60)
    assert full.wait(60)  # with a file in hand and no writer for it
    seen = set(gathered)
    go.set()
    thread.join()
    touched = [file.name for file in done[0].files if file.checksums.keys() & seen]
    assert len(touched) <= 3 < len(done[0].files)


SHARDED = """
from flax import nnx
from capcur_jax.devices import cluster, sharding
from capcur_jax.models import huggingface
from capcur_jax.rollout.sglang import manifest
from capcur_jax.rollout.sglang.weights import WeightStore
from ml_collections import ConfigDict
cluster.initialize()
source, directory = sys.argv[2:]
mesh = sharding.make_mesh(ConfigDict(dict(data=1, fsdp=-1, tensor=2)))
model = huggingface.load(source, mesh=mesh)
parameters = nnx.state(model)
assert any(not x.sharding.is_fully_replicated for x in jax.tree.leaves(parameters))
import capcur_jax.models.weight_files as files
write, mine = files.write, []
files.write = lambda file, tensors: mine.append(file.name) or write(file, tensors)
store = WeightStore(directory, model.config, np.float32, file_bytes=20_000)
first = store.write(parameters, 1)
flat = nnx.to_flat_state(parameters)
moved = nnx.from_flat_state([(p, x if p[0] == "visual" else x.replace(x[...] * 2)) for p, x in flat])
second = store.write(moved, 2)
print("MINE", len(mine), len(first.files) + len(second.files), any("visual" in name for name in second.checksums))
assert manifest.verify(second.complete) == 2 and manifest.verify(first.directory) == 1
if distributed.process_count() == 2:  # a disk that is full for one of them
    def full(*_):
        raise OSError(28, "No space left on device")

    from capcur_jax.errors import RolloutError
    files.write, moved = full if i == 1 else write, nnx.from_flat_state([(p, x.replace(x[...] * 2)) for p, x in flat])
    try:
        store.write(moved, 3)
        sys.exit("not noticed")
    except RolloutError as error:
        print("FAILED", error)
    assert manifest.verify(second.complete) == 2
    files.write = write
    assert len(store.write(moved, 3).checksums) == len(first.checksums)
distributed.barrier("end")
"""


@pytest.mark.parametrize("count", [1, 2])
def test_sharded_parameters_of_one_and_two_processes(checkpoint, tmp_path, count):
    """Two processes with two devices each write one version, every file written by one of them."""
    code = f"sys.argv[2:] = [{str(checkpoint)!r}, {str(tmp_path / 'weights')!r}]\n" + SHARDED
    outputs = run_processes(code, *(by_variables(free_port(), 2) if count == 2 else [{}]))
    lines = [line.split() for output in outputs for line in output.splitlines() if line.startswith("MINE")]
    assert len(lines) == count and sum(int(line[1]) for line in lines) == int(lines[0][2])
    assert all(int(line[1]) > 5 and line[3] == "False" for line in lines)
    if count == 2:
        assert "No space left on device" in outputs[1] and "another process" in outputs[0]
    want = load_file(checkpoint / "model.safetensors")
    assert_bits(read(tmp_path / "weights" / "version-00000001" / "complete"), want)
    want = {name: tensor if "visual" in name else tensor * 2 for name, tensor in want.items()}
    assert_bits(read(tmp_path / "weights" / "version-00000002" / "complete"), want)
    assert not list((tmp_path / "weights").glob(".partial*"))
