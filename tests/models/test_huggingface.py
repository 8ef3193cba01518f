"""Checkpoints in and out: transformers loads what we write, bits survive, and what is broken is named."""

from __future__ import annotations

import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from safetensors.numpy import load_file, save_file
from transformers import AutoTokenizer, Qwen3VLForConditionalGeneration

from capcur_jax.models import huggingface
from capcur_jax.models.config import UnsupportedCheckpoint
from capcur_jax.models.huggingface import CheckpointError


@pytest.fixture(params=["checkpoint", "untied_checkpoint"])
def source(request):
    return request.getfixturevalue(request.param)


@pytest.fixture
def copy(checkpoint, tmp_path):
    """A checkpoint of one's own to break."""
    return shutil.copytree(checkpoint, tmp_path / "copy")


def loaded_by_transformers(directory) -> Qwen3VLForConditionalGeneration:
    """transformers' model of a directory; what it misses or does not expect fails."""
    model, info = Qwen3VLForConditionalGeneration.from_pretrained(str(directory), output_loading_info=True)
    assert {key: value for key, value in info.items() if value} == {}
    assert {"missing_keys", "unexpected_keys", "mismatched_keys"} <= set(info)
    return model


def stored(directory) -> dict[str, np.ndarray]:
    """Every tensor of a directory's safetensors, by published name."""
    return {k: v for file in sorted(directory.glob("*.safetensors")) for k, v in load_file(file).items()}


def bits(tensor: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(tensor).reshape(-1).view(np.uint8)


def save_again(directory, target, dtype=jnp.float32):
    model = huggingface.load(directory, param_dtype=dtype)
    huggingface.save(target, nnx.state(model), model.config, directory, dtype=dtype)
    return target


# --- there and back ---------------------------------------------------------------------------------------------------


def test_transformers_loads_what_we_write(source, tmp_path):
    ours = huggingface.load(source)
    huggingface.save(tmp_path / "out", nnx.state(ours), ours.config, source, dtype=np.float32)
    theirs = dict(loaded_by_transformers(tmp_path / "out").named_parameters())
    for name, tensor in huggingface.published_tensors(nnx.state(ours), ours.config):
        np.testing.assert_array_equal(theirs.pop(name).detach().numpy(), tensor, err_msg=name)
    assert not theirs
    assert ("lm_head.weight" in stored(tmp_path / "out")) == (not ours.config.tied)


def test_bfloat16_survives_bit_for_bit(source, tmp_path):
    """What transformers wrote in bfloat16 comes back from our load and save unchanged, every tensor."""
    Qwen3VLForConditionalGeneration.from_pretrained(str(source), dtype=torch.bfloat16).save_pretrained(tmp_path / "a")
    for file in ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json"):
        shutil.copy(source / file, tmp_path / "a")
    before, after = stored(tmp_path / "a"), stored(save_again(tmp_path / "a", tmp_path / "b", jnp.bfloat16))
    assert set(before) == set(after)
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype == jnp.bfloat16
        assert tensor.shape == after[name].shape
        np.testing.assert_array_equal(bits(tensor), bits(after[name]), err_msg=name)
    assert {p.dtype for p in loaded_by_transformers(tmp_path / "b").parameters()} == {torch.bfloat16}


def test_float32_masters_of_bfloat16_weights_save_the_same_bits(checkpoint, tmp_path):
    """The trainer keeps float32 parameters: read from bfloat16 and written back, they lose nothing."""
    half = save_again(checkpoint, tmp_path / "half", jnp.bfloat16)
    model = huggingface.load(half)
    assert model.text.embed.embedding.dtype == jnp.float32
    huggingface.save(tmp_path / "again", nnx.state(model), model.config, half)
    before, after = stored(half), stored(tmp_path / "again")
    assert all((bits(before[name]) == bits(after[name])).all() for name in before | after)


def test_a_sharded_checkpoint_loads_on_both_sides(source, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface, "SHARD_BYTES", 40_000)
    sharded = save_again(source, tmp_path / "sharded")
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

    theirs = dict(loaded_by_transformers(sharded).named_parameters())
    assert set(tensors) == set(theirs)
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(theirs[name].detach().numpy(), tensor, err_msg=name)
    # A single file written from a sharded source leaves no index behind that would point nowhere.
    monkeypatch.undo()
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
    text = "<|im_start|>What shape is in the image?<think>"
    assert AutoTokenizer.from_pretrained(out)(text) == AutoTokenizer.from_pretrained(checkpoint)(text)


def test_published_names_are_all_of_transformers(source):
    model = huggingface.load(source)
    names = [name for name, _ in huggingface.published_tensors(nnx.state(model), model.config)]
    assert len(names) == len(set(names))
    assert set(names) == set(stored(source))


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
    with pytest.raises(CheckpointError, match=rf"{file} can't be read \(.*\): it is missing or cut off; copy it again"):
        huggingface.load(copy)


def test_a_missing_tensor(copy):
    tensors = load_file(copy / "model.safetensors")
    del tensors["model.visual.blocks.1.attn.qkv.bias"]
    save_file(tensors, copy / "model.safetensors")
    with pytest.raises(CheckpointError, match=rf"{copy}: the tensor model\.visual\.blocks\.1\.attn\.qkv\.bias is miss"):
        huggingface.load(copy)


def test_a_tensor_of_another_shape(copy):
    name = "model.language_model.layers.2.mlp.down_proj.weight"
    tensors = load_file(copy / "model.safetensors")
    tensors[name] = np.ascontiguousarray(tensors[name].T)
    save_file(tensors, copy / "model.safetensors")
    message = rf"model\.safetensors: {name} has shape \(48, 32\), config\.json asks for \(32, 48\)"
    with pytest.raises(CheckpointError, match=message):
        huggingface.load(copy)


def test_broken_shards(copy, monkeypatch):
    monkeypatch.setattr(huggingface, "SHARD_BYTES", 40_000)
    sharded = save_again(copy, copy.with_name("sharded"))
    gone = sorted(sharded.glob("*.safetensors"))[1]
    gone.unlink()
    with pytest.raises(CheckpointError, match=rf"{gone} can't be read"):
        huggingface.load(sharded)
    index = sharded / "model.safetensors.index.json"
    for content in ('{"weight_map": {', "{}"):
        index.write_text(content, encoding="utf-8")
        with pytest.raises(CheckpointError, match=rf"{index} is not a safetensors index; copy the checkpoint again"):
            huggingface.load(sharded)


def test_another_architecture(copy):
    published = json.loads((copy / "config.json").read_text(encoding="utf-8"))
    (copy / "config.json").write_text(json.dumps({**published, "model_type": "qwen2_5_vl"}), encoding="utf-8")
    with pytest.raises(UnsupportedCheckpoint, match=rf"{copy}/config\.json: model_type 'qwen2_5_vl' is not supported"):
        huggingface.load(copy)


def test_a_broken_config(copy):
    (copy / "config.json").write_text('{"model_type": "qwen3_vl",', encoding="utf-8")
    with pytest.raises(UnsupportedCheckpoint, match=rf"{copy}/config\.json is not valid JSON .*copy the file again"):
        huggingface.load(copy)


# --- a save that fails ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("failing", ["save_file", "published_tensors", "os.replace"])
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
