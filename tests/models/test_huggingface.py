"""Checkpoints in and out: transformers loads what we write, bits survive, and what is broken is named."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoTokenizer

from capcur_jax.models import config as config_lib
from capcur_jax.models import huggingface, weight_files
from capcur_jax.models.config import UnsupportedCheckpoint
from capcur_jax.models.qwen_vl import QwenVL
from capcur_jax.models.weight_files import CheckpointError


@pytest.fixture(params=["checkpoint", "untied_checkpoint", "windowed_checkpoint", "windowed_untied_checkpoint"])
def source(request):
    return request.getfixturevalue(request.param)


@pytest.fixture
def copy(checkpoint, tmp_path):
    """A checkpoint of one's own to break."""
    return shutil.copytree(checkpoint, tmp_path / "copy")


def loaded_by_transformers(directory) -> AutoModelForImageTextToText:
    """transformers' model of a directory; what it misses or does not expect fails."""
    model, info = AutoModelForImageTextToText.from_pretrained(str(directory), output_loading_info=True)
    assert {key: value for key, value in info.items() if value} == {}
    assert {"missing_keys", "unexpected_keys", "mismatched_keys"} <= set(info)
    return model


def stored(directory) -> dict[str, np.ndarray]:
    """Every tensor of a directory's safetensors, by published name."""
    return {k: v for file in sorted(directory.glob("*.safetensors")) for k, v in load_file(file).items()}


def bits(tensor: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(tensor).reshape(-1).view(np.uint8)


def save_again(directory, target, dtype=jnp.float32, **kinds):
    model = huggingface.load(directory, param_dtype=dtype)
    huggingface.save(target, nnx.state(model), model.config, directory, dtype=dtype, **kinds)
    return target


def edit_config(directory, **keys):
    published = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    (directory / "config.json").write_text(json.dumps({**published, **keys}), encoding="utf-8")


def alone(script: str, *arguments, **environment) -> str:
    """What a script prints in a process of its own."""
    command = [sys.executable, "-c", script, *map(str, arguments)]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


# --- there and back ---------------------------------------------------------------------------------------------------


def test_transformers_loads_what_we_write(source, tmp_path):
    ours = huggingface.load(source)
    huggingface.save(tmp_path / "out", nnx.state(ours), ours.config, source, dtype=np.float32)
    theirs = dict(loaded_by_transformers(tmp_path / "out").named_parameters())
    theirs = {weight_files.neutral(name): value for name, value in theirs.items()}
    for name, tensor in huggingface.published_tensors(nnx.state(ours), ours.config):
        np.testing.assert_array_equal(theirs.pop(weight_files.neutral(name)).detach().numpy(), tensor, err_msg=name)
    assert not theirs
    assert ("lm_head.weight" in stored(tmp_path / "out")) == (not ours.config.tied)


def test_bfloat16_survives_bit_for_bit(source, tmp_path):
    """What transformers wrote in bfloat16 comes back from our load and save unchanged, every tensor."""
    AutoModelForImageTextToText.from_pretrained(str(source), dtype=torch.bfloat16).save_pretrained(tmp_path / "a")
    for file in ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json"):
        shutil.copy(source / file, tmp_path / "a")
    before, after = stored(tmp_path / "a"), stored(save_again(tmp_path / "a", tmp_path / "b", jnp.bfloat16))
    shards = save_again(tmp_path / "b", tmp_path / "shards", jnp.bfloat16, shard_bytes=20_000)
    shards = stored(save_again(shards, tmp_path / "c", jnp.bfloat16, shard_bytes=30_000))
    assert set(before) == set(after)
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype == jnp.bfloat16
        assert tensor.shape == after[name].shape
        np.testing.assert_array_equal(bits(tensor), bits(after[name]), err_msg=name)
        np.testing.assert_array_equal(bits(tensor), bits(shards[name]), err_msg=name)
    assert {p.dtype for p in loaded_by_transformers(tmp_path / "b").parameters()} == {torch.bfloat16}


def test_float32_masters_of_bfloat16_weights_save_the_same_bits(checkpoint, tmp_path):
    """The trainer keeps float32 parameters: read from bfloat16 and written back, they lose nothing."""
    half = save_again(checkpoint, tmp_path / "half", jnp.bfloat16)
    model = huggingface.load(half)
    assert model.text.embed.embedding.dtype == jnp.float32
    huggingface.save(tmp_path / "again", nnx.state(model), model.config, half)
    before, after = stored(half), stored(tmp_path / "again")
    assert all((bits(before[name]) == bits(after[name])).all() for name in before | after)


def test_a_sharded_checkpoint_loads_on_both_sides(source, tmp_path):
    sharded = save_again(source, tmp_path / "sharded", shard_bytes=40_000)
    files = sorted(file.name for file in sharded.glob("*.safetensors"))
    assert len(files) > 2
    assert not (sharded / "model.safetensors").exists()
    index = json.loads((sharded / "model.safetensors.index.json").read_text(encoding="utf-8"))
    assert sorted(set(index["weight_map"].values())) == files
    tensors = stored(source)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    for file in files:
        names = load_file(sharded / file)
        assert all(index["weight_map"][name] == file for name in names)
        assert sum(tensor.nbytes for tensor in names.values()) <= 40_000 or len(names) == 1

    theirs = {weight_files.neutral(n): value for n, value in loaded_by_transformers(sharded).named_parameters()}
    assert set(map(weight_files.neutral, tensors)) == set(theirs)
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(theirs[weight_files.neutral(name)].detach().numpy(), tensor, err_msg=name)
    # A single file written from a sharded source leaves no index behind that would point nowhere.
    single = save_again(sharded, tmp_path / "single")
    assert not (single / "model.safetensors.index.json").exists()
    for name, tensor in stored(single).items():
        np.testing.assert_array_equal(tensor, tensors[name], err_msg=name)


def test_everything_but_the_weights_is_copied(checkpoint, tmp_path):
    out = save_again(checkpoint, tmp_path / "out", jnp.bfloat16)
    files = {file.name for file in checkpoint.iterdir()}
    assert files == {file.name for file in out.iterdir()}
    for name in files - {"config.json", "model.safetensors"}:
        assert (out / name).read_bytes() == (checkpoint / name).read_bytes(), name
    before, after = (json.loads((d / "config.json").read_text(encoding="utf-8")) for d in (checkpoint, out))
    assert (before.pop("dtype"), after.pop("dtype")) == ("float32", "bfloat16")
    assert before == after
    # An older file keeps the key that its readers know, nested ones too.
    old = {**before, "torch_dtype": "bfloat16", "text_config": {**before["text_config"], "torch_dtype": "bfloat16"}}
    written = huggingface._with_dtype(old, "float32")
    assert (written["torch_dtype"], written["text_config"]["torch_dtype"]) == ("float32", "float32")
    assert "dtype" not in written and written["vision_config"] == before["vision_config"]
    text = "<|im_start|>What shape is in the image?<think>"
    assert AutoTokenizer.from_pretrained(out)(text) == AutoTokenizer.from_pretrained(checkpoint)(text)


def test_published_names_are_all_of_transformers(source):
    model = huggingface.load(source)
    names = [name for name, _ in huggingface.published_tensors(nnx.state(model), model.config)]
    assert len(names) == len(set(names))
    assert set(names) == set(stored(source))


@pytest.mark.parametrize("old", [("model.visual.", "visual."), ("model.language_model.", "model.")])
def test_names_of_the_other_era(copy, model, old):
    """Which prefix a file has depends on the version of transformers that wrote it; both are read."""
    long, short = old
    tensors = {
        short + name.removeprefix(long) if name.startswith(long) else name: tensor
        for name, tensor in stored(copy).items()
    }
    assert set(tensors) != set(stored(copy))
    save_file(tensors, copy / "model.safetensors")
    ours = dict(huggingface.published_tensors(nnx.state(huggingface.load(copy)), model.config))
    for name, tensor in huggingface.published_tensors(nnx.state(model), model.config):
        np.testing.assert_array_equal(ours.pop(name), tensor, err_msg=name)
    assert not ours


def test_tensors_that_nobody_needs(copy, model):
    """Old checkpoints hold rotary angles, and a head though it is the embeddings; another head is not harmless."""
    tensors = stored(copy)
    embed = tensors["model.language_model.embed_tokens.weight"]
    tensors["model.language_model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(8, np.float32)
    save_file({**tensors, "lm_head.weight": embed}, copy / "model.safetensors")
    assert (huggingface.load(copy).text.embed.embedding[...] == model.text.embed.embedding[...]).all()
    save_file({**tensors, "lm_head.weight": embed[::-1].copy()}, copy / "model.safetensors")
    with pytest.raises(
        CheckpointError, match=r"model\.safetensors: lm_head\.weight differs from .*embed_tokens\.weight"
    ):
        huggingface.load(copy)


# --- many devices, little memory --------------------------------------------------------------------------------------

SHARDED = """
import os, sys
from pathlib import Path
import jax, numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec as P
from safetensors.numpy import load_file
from capcur_jax.devices import sharding
from capcur_jax.models import huggingface

source, out = map(Path, sys.argv[1:])
plain, published = huggingface.load(source), load_file(source / "model.safetensors")
read, pread = [], os.pread
os.pread = lambda *arguments: read.append(arguments[1]) or pread(*arguments)
for number, sizes in enumerate(((2, 4), (3, 2))):
    devices = np.array(jax.devices()[: sizes[0] * sizes[1]]).reshape(sizes)
    mesh = jax.sharding.Mesh(devices, ("first", "last"))

    def place(mesh, path, shape):
        axes = [None] * len(shape)
        for side, axis in ((0, "first"), (-1, "last")):
            if len(shape) > 1 and shape[side] % mesh.shape[axis] == 0:
                axes[side] = axis
        return NamedSharding(mesh, P(*axes))

    read.clear()
    sharding.of_parameter = place
    model = huggingface.load(source, mesh=mesh)
    assert sum(read) == sum(tensor.nbytes for tensor in published.values())
    split = 0
    for (path, ours), (_, theirs) in zip(nnx.to_flat_state(nnx.state(model)), nnx.to_flat_state(nnx.state(plain))):
        ours, theirs = ours[...], np.asarray(theirs[...])
        assert ours.sharding == place(mesh, path, ours.shape) and len(ours.addressable_shards) == devices.size
        for shard in ours.addressable_shards:
            assert shard.data.shape == ours.sharding.shard_shape(ours.shape)
            np.testing.assert_array_equal(np.asarray(shard.data), theirs[shard.index], err_msg=str(path))
        split += not ours.is_fully_replicated
    assert split > 20
    again = out / str(number)
    huggingface.save(again, nnx.state(model), model.config, source, dtype=np.float32, shard_bytes=40_000)
    saved = {name: tensor for file in again.glob("*.safetensors") for name, tensor in load_file(file).items()}
    assert set(saved) == set(published)
    assert all((saved[name] == published[name]).all() for name in saved)
"""


def test_any_mesh_reads_and_writes_the_same(checkpoint, tmp_path):
    """8 devices, two meshes, one of them with split layers: each device holds its shard, each byte is read once."""
    alone(SHARDED, checkpoint, tmp_path, JAX_NUM_CPU_DEVICES="8")


MEMORY = """
import sys
import jax, jax.numpy as jnp
from flax import nnx
from capcur_jax.models import huggingface

def kernel(field):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(field))

small, large, out = sys.argv[1:]
huggingface.load(small)
before = kernel("VmRSS")
model = huggingface.load(large)
loaded = kernel("VmHWM")
huggingface.save(out, nnx.state(model), model.config, large, shard_bytes=20_000_000)
parameters = sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(model)))
print(parameters, loaded - before, kernel("VmHWM") - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's account of a process is read from /proc")
def test_peak_memory_is_the_parameters_and_one_file(checkpoint, tmp_path):
    """bfloat16 files, float32 parameters: no second copy of the largest stack (50 MB), neither way."""
    skeleton = shutil.copytree(checkpoint, tmp_path / "skeleton", ignore=shutil.ignore_patterns("*.safetensors"))
    published = json.loads((skeleton / "config.json").read_text(encoding="utf-8"))
    text = {**published["text_config"], "hidden_size": 1024, "intermediate_size": 4096}
    edit_config(skeleton, text_config=text, vision_config={**published["vision_config"], "out_hidden_size": 1024})
    config = config_lib.from_directory(skeleton)
    abstract = nnx.state(nnx.eval_shape(lambda: QwenVL(config, rngs=nnx.Rngs(0))))
    filled = [(path, leaf.replace(np.ones(leaf.shape, jnp.bfloat16))) for path, leaf in nnx.to_flat_state(abstract)]
    huggingface.save(tmp_path / "large", nnx.from_flat_state(filled), config, skeleton, shard_bytes=20_000_000)
    files = [file.stat().st_size for file in (tmp_path / "large").glob("*.safetensors")]
    assert len(files) > 3
    printed = alone(MEMORY, checkpoint, tmp_path / "large", tmp_path / "out").split()
    parameters, loaded, saved = map(int, printed)
    assert parameters > 150_000_000
    assert parameters < loaded < parameters + max(files)
    # And what writing itself takes: 11 to 13 MB were seen, a second copy of the largest stack would be 50.
    assert saved < parameters + max(files) + 25_000_000


# --- what can't be read -----------------------------------------------------------------------------------------------


def test_no_weights(copy):
    (copy / "model.safetensors").unlink()
    with pytest.raises(
        CheckpointError, match=rf"{copy} holds no weights: neither model\.safetensors nor .*index\.json"
    ):
        huggingface.load(copy)


@pytest.mark.parametrize("kept", [0, 5, 2000, -10], ids=["empty", "in the length", "in the header", "in the tensors"])
def test_a_truncated_file(copy, kept):
    file = copy / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    what = r": the tensor model\.[\w.]+" if kept < 0 else ""
    message = rf"{file}{what} can't be read \(.*\): it is missing or cut off; copy it again"
    with pytest.raises(CheckpointError, match=message):
        huggingface.load(copy)


def test_a_file_that_is_none(copy):
    """What a clone without git-lfs leaves in the file's place."""
    file = copy / "model.safetensors"
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 135\n", encoding="utf-8")
    with pytest.raises(CheckpointError, match=rf"{file} can't be read \(\d+ bytes, no whole header\)"):
        huggingface.load(copy)


def test_a_file_cut_off_while_it_is_read(copy):
    file = copy / "model.safetensors"
    last = max(weight_files.find(copy).values(), key=lambda tensor: tensor.start)
    file.write_bytes(file.read_bytes()[:-1])
    with weight_files.Reader() as reader:
        reader.open([last])
        with pytest.raises(CheckpointError, match=rf"{file}: the tensor {last.name} was cut off while it was read"):
            reader.rows(last, 0, last.matrix[0])


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, jnp.bfloat16])
def test_a_number_that_is_none_ends_the_load(copy, value, dtype):
    """One NaN in one tensor made every update of a run a skipped one, up to a "finished" run."""
    tensors = {name: np.array(tensor, dtype) for name, tensor in stored(copy).items()}
    name = next(name for name in tensors if "layers.1.mlp.up_proj" in name)
    tensors[name][3, 5] = value
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"model\.safetensors: the tensor {name} holds NaN or infin.*rows 0 to"):
        huggingface.load(copy)


def test_what_is_not_finite_is_not_written(copy, checkpoint, model):
    flat = dict(nnx.to_flat_state(nnx.state(model)))
    (path,) = [path for path in flat if path[0] == "text" and path[-2:] == ("down", "kernel")]
    flat[path] = flat[path].replace(flat[path][...].at[1, 2, 3].set(jnp.nan))
    before = stored(copy)
    with pytest.raises(CheckpointError, match=r"copy was not written: the tensor \S*layers\.1\.mlp\.down_proj\.weight"):
        huggingface.save(copy, nnx.from_flat_state(list(flat.items())), model.config, checkpoint)
    assert all((bits(before[name]) == bits(tensor)).all() for name, tensor in stored(copy).items())


def test_a_missing_tensor(copy):
    tensors = load_file(copy / "model.safetensors")
    del tensors["model.visual.blocks.1.attn.qkv.bias"]
    save_file(tensors, copy / "model.safetensors")
    with pytest.raises(
        CheckpointError, match=r"model\.safetensors: the tensor model\.visual\.blocks\.1\.attn\.qkv\.bias is miss"
    ):
        huggingface.load(copy)


def test_a_tensor_too_many(copy):
    """Weights of a deeper model than config.json describes don't load as a shallow one."""
    published = json.loads((copy / "config.json").read_text(encoding="utf-8"))
    edit_config(copy, text_config={**published["text_config"], "num_hidden_layers": 2})
    message = (
        r"model\.safetensors: the tensor model\.language_model\.layers\.2\.\S+ is not part of the qwen3_vl that config"
    )
    with pytest.raises(CheckpointError, match=message):
        huggingface.load(copy)


def test_a_tensor_that_is_there_twice(copy):
    tensors = stored(copy)
    save_file(
        {**tensors, "visual.pos_embed.weight": tensors["model.visual.pos_embed.weight"]}, copy / "model.safetensors"
    )
    with pytest.raises(CheckpointError, match=r"the tensor (model\.)?visual\.pos_embed\.weight is there already, as"):
        huggingface.load(copy)


@pytest.mark.parametrize("dtype", [np.int8, jnp.float8_e4m3fn], ids=["I8", "F8_E4M3"])
def test_quantized_weights(copy, dtype, request):
    name, kind = "model.language_model.layers.1.mlp.up_proj.weight", request.node.callspec.id
    tensors = stored(copy)
    save_file({**tensors, name: np.ones(tensors[name].shape, dtype)}, copy / "model.safetensors")
    with pytest.raises(
        CheckpointError, match=rf"model\.safetensors: {name} holds {kind}: quantized checkpoints \(fp8, "
    ):
        huggingface.load(copy)
    edit_config(copy, quantization_config={"quant_method": "fp8"})
    with pytest.raises(CheckpointError, match=rf"{copy}/config\.json has a quantization_config: quantized checkpoints"):
        huggingface.load(copy)


def test_a_tensor_of_another_shape(copy):
    name = "model.language_model.layers.2.mlp.down_proj.weight"
    tensors = load_file(copy / "model.safetensors")
    tensors[name] = np.ascontiguousarray(tensors[name].T)
    save_file(tensors, copy / "model.safetensors")
    message = rf"model\.safetensors: {name} has shape \(48, 32\), config\.json asks for \(32, 48\)"
    with pytest.raises(CheckpointError, match=message):
        huggingface.load(copy)


def test_broken_shards(copy):
    sharded = save_again(copy, copy.with_name("sharded"), shard_bytes=40_000)
    first, gone = sorted(sharded.glob("*.safetensors"))[:2]
    name, content = next(iter(load_file(gone))), gone.read_bytes()
    gone.unlink()
    message = rf"{gone}, which should hold model\.\S+, can't be read \(No such file or directory\)"
    with pytest.raises(CheckpointError, match=message):
        huggingface.load(sharded)
    gone.write_bytes(first.read_bytes())
    with pytest.raises(CheckpointError, match=rf"{gone}: the tensor \S+ is there already, as \S+ of {first.name}"):
        huggingface.load(sharded)
    gone.write_bytes(content)
    save_file({k: v for k, v in load_file(gone).items() if k != name}, gone)
    with pytest.raises(
        CheckpointError, match=rf"{gone}: the tensor {name} is missing, though model.*index\.json lists it"
    ):
        huggingface.load(sharded)
    shutil.copyfile(copy / "model.safetensors", sharded / "model.safetensors")
    with pytest.raises(CheckpointError, match=rf"{sharded} holds both model\.safetensors and model.*index\.json"):
        huggingface.load(sharded)
    (sharded / "model.safetensors").unlink()
    index = sharded / "model.safetensors.index.json"
    for content in ('{"weight_map": {', "{}"):
        index.write_text(content, encoding="utf-8")
        with pytest.raises(CheckpointError, match=rf"{index} is not a safetensors index; copy the checkpoint again"):
            huggingface.load(sharded)


def test_another_architecture(copy):
    edit_config(copy, model_type="llava")
    with pytest.raises(UnsupportedCheckpoint, match=rf"{copy}/config\.json: model_type 'llava' is not supported"):
        huggingface.load(copy)


def test_a_broken_config(copy):
    (copy / "config.json").write_text('{"model_type": "qwen3_vl",', encoding="utf-8")
    with pytest.raises(UnsupportedCheckpoint, match=rf"{copy}/config\.json is not valid JSON .*copy the file again"):
        huggingface.load(copy)


# --- a save that fails ------------------------------------------------------------------------------------------------


def test_a_stop_between_the_two_renames_keeps_the_old_weights(copy, monkeypatch):
    before, model, rename = stored(copy), huggingface.load(copy), os.replace

    def fail(source, target):
        if target == copy:
            raise OSError("killed")
        rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr("capcur_jax.models.huggingface.os.replace", fail)
        with pytest.raises(OSError, match="killed"):
            huggingface.save(copy, nnx.state(model), model.config, copy)
    (old,) = copy.parent.glob(".copy.old-*")
    after = stored(old)
    assert set(after) == set(before) and all((bits(after[name]) == bits(before[name])).all() for name in before)


@pytest.mark.parametrize("failing", ["weight_files.write", "published_tensors", "os.replace"])
def test_a_failed_save_leaves_the_old_directory(copy, untied_model, monkeypatch, failing):
    def fail(*_, **__):
        raise OSError("no space left on device")

    before = {file.name: file.read_bytes() for file in copy.iterdir()}
    model = huggingface.load(copy)
    with monkeypatch.context() as patch:
        patch.setattr(f"capcur_jax.models.huggingface.{failing}", fail)
        with pytest.raises(OSError, match="no space left"):
            huggingface.save(copy, nnx.state(model), model.config, copy)
    assert {file.name: file.read_bytes() for file in copy.iterdir()} == before
    # The next one succeeds and leaves nothing beside it.
    huggingface.save(copy, nnx.state(model), model.config, copy)
    assert stored(copy)["model.visual.pos_embed.weight"].dtype == jnp.bfloat16
    assert [path.name for path in copy.parent.iterdir()] == ["copy"]


def test_a_new_checkpoint_replaces_all_of_the_old_one(copy):
    (copy / "left-over.json").write_text("{}", encoding="utf-8")
    source = copy.with_name("source")
    shutil.copytree(copy, source)
    (source / "left-over.json").unlink()
    assert not (save_again(source, copy) / "left-over.json").exists()


def test_what_a_killed_save_left_is_cleaned(copy, model):
    """A process that is no more left half a checkpoint and an old one; what a living process writes is its own."""
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    for name in (
        f".copy.partial-{dead.pid}",
        f".copy.old-{dead.pid}",
        f".copy.partial-{os.getppid()}",
        ".copy.partial-x",
    ):
        (copy.parent / name).mkdir()
    huggingface.save(copy, nnx.state(model), model.config, copy)
    left = {path.name for path in copy.parent.iterdir()}
    assert left == {"copy", f".copy.partial-{os.getppid()}", ".copy.partial-x"}
