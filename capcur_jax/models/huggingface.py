"""Published checkpoints <-> our parameters, by the table of names.py.

A checkpoint is a directory in the Hugging Face format: config.json, *.safetensors (with an index where sharded), the
tokenizer's files, preprocessor_config.json, chat template. What we write loads in transformers with no missing and no
unexpected key, and everything but the weights is copied unchanged from the checkpoint that training started from.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from capcur_jax.errors import InputError
from capcur_jax.models import config as config_lib
from capcur_jax.models import names as names_lib
from capcur_jax.models.config import ModelConfig
from capcur_jax.models.qwen_vl import QwenVL

SHARD_BYTES = 5 * 1000**3
WEIGHTS = ("model.safetensors", "model.safetensors.index.json")


class CheckpointError(InputError):
    """A checkpoint that can't be read; the message names the file, the tensor and what to do."""


def create(config: ModelConfig, seed: int, **kinds: Any) -> QwenVL:
    """A model with random weights."""
    return nnx.jit(lambda: QwenVL(config, rngs=nnx.Rngs(seed), **kinds))()


def _open_files(directory: Path) -> dict[str, Path]:
    """Published name -> file that holds it. Raises naming the directory or file and the remedy."""
    single, index = (directory / name for name in WEIGHTS)
    if index.is_file():
        try:
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        except (ValueError, KeyError):
            raise CheckpointError(f"{index} is not a safetensors index; copy the checkpoint again") from None
        return {name: directory / file for name, file in weight_map.items()}
    if not single.is_file():
        raise CheckpointError(
            f"{directory} holds no weights: neither {WEIGHTS[0]} nor {WEIGHTS[1]} is there. "
            "Point config.checkpoint to a Hugging Face checkpoint directory with its safetensors"
        )
    with _open(single) as file:
        return {name: single for name in file.keys()}


def _open(path: Path):
    try:
        return safe_open(path, framework="numpy")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} can't be read ({error}): it is missing or cut off; copy it again") from None


def load(directory: str | Path, *, dtype=jnp.float32, param_dtype=jnp.float32, remat: str = "none") -> QwenVL:
    """Reads a checkpoint directory into a model; parameters in `param_dtype`, computation in `dtype`.

    Raises:
        CheckpointError, UnsupportedCheckpoint: naming the file, the tensor and the remedy.
    """
    directory = Path(directory)
    config = config_lib.from_directory(directory)
    files = _open_files(directory)
    opened: dict[Path, Any] = {}

    def read(name: str, shape: tuple[int, ...]) -> np.ndarray:
        if name not in files:
            raise CheckpointError(f"{directory}: the tensor {name} is missing; the checkpoint is incomplete")
        if files[name] not in opened:
            opened[files[name]] = _open(files[name])
        try:
            tensor = opened[files[name]].get_tensor(name)
        except SafetensorError as error:
            raise CheckpointError(
                f"{files[name]}: tensor {name} can't be read ({error}); copy the file again"
            ) from None
        if tensor.shape != shape:
            raise CheckpointError(f"{files[name]}: {name} has shape {tensor.shape}, config.json asks for {shape}")
        return tensor

    model = nnx.eval_shape(lambda: QwenVL(config, dtype=dtype, param_dtype=param_dtype, remat=remat, rngs=nnx.Rngs(0)))
    graph, abstract = nnx.split(model)
    flat, table = [], names_lib.table(config)
    for path, leaf in nnx.to_flat_state(abstract):
        ours = ".".join(map(str, path))
        name = table[ours]
        if "{}" in name:
            shape = names_lib.published_shape(ours, leaf.shape[1:], config)
            value = np.stack([names_lib.to_ours(ours, read(name.format(i), shape)) for i in range(leaf.shape[0])])
        else:
            value = names_lib.to_ours(ours, read(name, names_lib.published_shape(ours, leaf.shape, config)))
        flat.append((path, leaf.replace(jnp.asarray(value, leaf.dtype))))
    return nnx.merge(graph, nnx.from_flat_state(flat))


def published_tensors(parameters: nnx.State, config: ModelConfig) -> Iterator[tuple[str, np.ndarray]]:
    """(published name, array on the host), one after the other, in our parameters' dtype."""
    table = names_lib.table(config)
    for path, leaf in nnx.to_flat_state(parameters):
        ours = ".".join(map(str, path))
        value, name = np.asarray(jax.device_get(leaf[...])), table[ours]
        if "{}" not in name:
            yield name, names_lib.to_published(ours, value, config)
            continue
        for i, one in enumerate(value):
            yield name.format(i), names_lib.to_published(ours, one, config)


def save(directory: str | Path, parameters: nnx.State, config: ModelConfig, source: str | Path, dtype=jnp.bfloat16):
    """Writes a checkpoint directory that transformers loads as it is; tokenizer and the like come from `source`.

    The directory appears whole or not at all: it is written beside its place and renamed.
    """
    directory, source = Path(directory), Path(source)
    partial = directory.with_name(f".{directory.name}.partial-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for file in sorted(source.iterdir()):
        if file.is_file() and file.suffix in (".json", ".jinja", ".txt", ".model") and file.name not in WEIGHTS:
            shutil.copyfile(file, partial / file.name)
    published = {**config.published, "dtype": jnp.dtype(dtype).name}
    published.pop("torch_dtype", None)
    (partial / "config.json").write_text(json.dumps(published, indent=2) + "\n", encoding="utf-8")

    shards: list[dict[str, np.ndarray]] = [{}]
    size = total = 0
    for name, tensor in published_tensors(parameters, config):
        tensor = tensor.astype(dtype)
        if size and size + tensor.nbytes > SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size, total = size + tensor.nbytes, total + tensor.nbytes
    if len(shards) == 1:
        save_file(shards[0], partial / WEIGHTS[0], metadata={"format": "pt"})
    else:
        names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
        for file, shard in zip(names, shards, strict=True):
            save_file(shard, partial / file, metadata={"format": "pt"})
        index = {
            "metadata": {"total_size": total},
            "weight_map": {name: file for file, shard in zip(names, shards, strict=True) for name in shard},
        }
        (partial / WEIGHTS[1]).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    # The old directory is set aside, not deleted first: a stop in the middle must not cost both.
    old = directory.with_name(f".{directory.name}.old-{os.getpid()}")
    if directory.exists():
        os.replace(directory, old)
    os.replace(partial, directory)
    shutil.rmtree(old, ignore_errors=True)
