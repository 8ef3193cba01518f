"""Published checkpoints <-> our parameters, by the table of names.py.

A checkpoint is a directory in the Hugging Face format: config.json, *.safetensors (with an index where sharded), the
tokenizer's files, preprocessor_config.json, chat template. What we write loads in transformers with no missing and no
unexpected key, and everything but the weights is copied unchanged from the checkpoint that training started from.
"""

from __future__ import annotations

import functools
import glob
import itertools
import json
import math
import os
import shutil
from collections.abc import Callable, Container, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import psutil
from flax import nnx
from jax.sharding import Mesh

from capcur_jax.devices import sharding
from capcur_jax.files import sync_to_disk
from capcur_jax.models import config as config_lib
from capcur_jax.models import lora as lora_lib
from capcur_jax.models import names as names_lib
from capcur_jax.models import weight_files
from capcur_jax.models.config import ModelConfig
from capcur_jax.models.lora import LoRA
from capcur_jax.models.qwen_vl import QwenVL
from capcur_jax.models.weight_files import WEIGHTS, CheckpointError, Part, Reader, Tensor

SHARD_BYTES = 4 * 1000**3  # as the published Qwen checkpoints
UNQUANTIZED = (
    "quantized checkpoints (fp8, AWQ, GPTQ, bitsandbytes) are not supported; point config.checkpoint to the model's "
    "bfloat16 release"
)


def create(
    config: ModelConfig,
    seed: int,
    *,
    mesh: Mesh | None = None,
    **kinds: Any,
) -> QwenVL:
    """A model with random weights, the same on any mesh; `mesh` and `kinds` as in `load`."""
    mesh = mesh or sharding.single()
    graph, parameters = nnx.split(nnx.jit(lambda: QwenVL(config, mesh=mesh, rngs=nnx.Rngs(seed), **kinds))())
    placed = [  # from the host, see learner.Learner.start
        (
            path,
            leaf.replace(
                jax.device_put(np.asarray(leaf[...]), sharding.of_parameter(mesh, ".".join(path), leaf.shape))
            ),
        )
        for path, leaf in nnx.to_flat_state(parameters)
    ]
    return nnx.merge(graph, nnx.from_flat_state(placed))


def load(
    directory: str | Path,
    *,
    mesh: Mesh | None = None,
    dtype=jnp.float32,
    param_dtype=jnp.float32,
    remat: str = "none",
    attention: str = "auto",
    lora: LoRA | None = None,
    seed: int = 0,
) -> QwenVL:
    """Reads a checkpoint directory into a model; parameters in `param_dtype`, computation in `dtype`.

    Parameter after parameter is read from the files straight into the shards of this process's devices: on the host
    there are at most two parameters at a time (where the devices are the host, the parameters and nothing else).

    Args:
        mesh: what the parameters lie on, as sharding.RULES say; None: one device.
        remat, attention: see `layers.REMAT` and `attention.attend`.
        lora: the low-rank factors that the model gets beside what the files hold.
        seed: of these.

    Raises:
        CheckpointError, UnsupportedCheckpoint: naming the file, the tensor and the remedy, before anything is read.
    """
    directory = Path(directory)
    config = config_lib.from_directory(directory)
    if "quantization_config" in config.published:
        raise CheckpointError(f"{directory / 'config.json'} has a quantization_config: {UNQUANTIZED}")
    mesh = mesh or sharding.single()
    kinds = dict(dtype=dtype, param_dtype=param_dtype, remat=remat, attention=attention, lora=lora, mesh=mesh)
    model = nnx.eval_shape(lambda: QwenVL(config, rngs=nnx.Rngs(0), **kinds))
    graph, abstract = nnx.split(model)
    leaves = [(".".join(path), path, leaf) for path, leaf in nnx.to_flat_state(abstract)]
    stored = weight_files.find(directory)
    listing = next(directory / name for name in WEIGHTS if (directory / name).is_file())
    sources = {
        ours: _take(stored, ours, leaf.shape, config, listing)
        for ours, _, leaf in leaves
        if not lora_lib.is_factor(ours)
    }
    flat = []
    with weight_files.Reader() as reader:
        _check_rest(stored, sources, config, reader)
        for ours, path, leaf in leaves:
            place = sharding.of_parameter(mesh, ours, leaf.shape)
            if ours in sources:
                value = _read(reader, sources[ours], ours, leaf, _stacked(names_lib.table(config)[ours]), place)
            else:
                value = lora_lib.start(ours, leaf.shape, leaf.dtype, seed, place)
            # The one before is on its devices: only now does the host let go of it.
            jax.block_until_ready([last[...] for _, last in flat[-1:]])
            flat.append((path, leaf.replace(value)))
    return nnx.merge(graph, nnx.from_flat_state(flat))


def _take(
    stored: dict[str, Tensor], path: str, shape: tuple[int, ...], config: ModelConfig, listing: Path
) -> list[Tensor]:
    """Takes the published tensors of a parameter out of `stored`: one, or one for each layer."""
    template = names_lib.table(config)[path]
    wanted = names_lib.published_shape(path, shape[_stacked(template) :], config)
    tensors = []
    for _, name in _names(template, shape):
        tensor = stored.pop(weight_files.neutral(name), None)
        if tensor is None:
            raise CheckpointError(
                f"{listing}: the tensor {name} is missing; the checkpoint is incomplete or not the {config.family} "
                "that config.json describes: copy it again"
            )
        if tensor.kind not in weight_files.FLOATS:
            raise CheckpointError(f"{tensor.file}: {tensor.name} holds {tensor.kind}: {UNQUANTIZED}")
        if tensor.shape != wanted:
            raise CheckpointError(
                f"{tensor.file}: {tensor.name} has shape {tensor.shape}, config.json asks for {wanted}; the two do not "
                "belong together: copy the checkpoint again"
            )
        tensors.append(tensor)
    return tensors


def _check_rest(stored: dict[str, Tensor], taken: dict[str, list[Tensor]], config: ModelConfig, reader: Reader) -> None:
    """Tensors that the model does not use must be known to be so: a head equal to the embeddings, rotary angles."""
    for name, tensor in stored.items():
        if name == "lm_head.weight" and config.tied:
            (embed,) = taken["text.embed.embedding"]
            if not reader.equal(embed, tensor):
                raise CheckpointError(
                    f"{tensor.file}: {name} differs from {embed.name}, though config.json ties the two; set "
                    "tie_word_embeddings in config.json to false"
                )
        elif not name.endswith("rotary_emb.inv_freq"):
            raise CheckpointError(
                f"{tensor.file}: the tensor {tensor.name} is not part of the {config.family} that config.json "
                "describes; the two do not belong together: copy the checkpoint again"
            )


def _read(reader: Reader, tensors: list[Tensor], path: str, leaf: nnx.Variable, stacked: bool, place) -> jax.Array:
    """A parameter on its devices. A shard that several devices hold is read once."""
    shape = leaf.shape
    indices = place.addressable_devices_indices_map(shape).values()
    shards = {bounds: _empty([b - a for a, b in bounds], leaf.dtype) for bounds in (_bounds(i, shape) for i in indices)}
    transposed = path.endswith(".kernel")
    wanted: list[tuple[Tensor, list[Part]]] = [(tensor, []) for tensor in tensors]
    for bounds, shard in shards.items():
        layers = bounds[0] if stacked else (0, 1)
        for layer in range(*layers):
            target = shard[layer - layers[0]] if stacked else shard
            sides = bounds[stacked:]
            if len(sides) == 1:
                sides, target = ((0, 1), *sides), target[None]
            wanted[layer][1].append(Part(*(sides[::-1] if transposed else sides), target))
    reader.copy([(tensor, parts) for tensor, parts in wanted if parts], transposed)
    return jax.make_array_from_callback(shape, place, lambda index: shards[_bounds(index, shape)])


def _bounds(index: tuple[slice, ...], shape: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    return tuple(side.indices(size)[:2] for side, size in zip(index, shape, strict=True))


def _empty(shape: list[int], dtype) -> np.ndarray:
    """Memory that a CPU device takes over as it is: JAX copies what does not start at a multiple of 64 bytes."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    memory = np.empty(size + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + size].view(dtype).reshape(shape)


def published_tensors(
    parameters: nnx.State,
    config: ModelConfig,
    dtype=None,
    lora: LoRA | None = None,
    *,
    only: Container[str] | None = None,
    mine: Callable[[str], bool] | None = None,
) -> Iterator[tuple[str, np.ndarray | None]]:
    """(published name, array on the host), one after the other, in `dtype` (None: our parameters').

    A stacked parameter leaves its devices layer by layer; on the host there is one of its layers at a time. A kernel
    that `lora` adapts comes with its factors merged into it.

    Args:
        only: our paths of the parameters to go through; None: all.
        mine: whether this process wants the tensor of that published name; the array of another is None, and this
            process has taken part in gathering it. None: it wants all. Every process goes through all of them.
    """
    table = names_lib.table(config)
    for ours, (value, *factors) in sources(parameters, lora).items():
        if only is not None and ours not in only:
            continue
        value, *factors = sharding.on_devices((value, *factors))
        change = (*factors, lora.scale) if factors else None
        for layer, name in _names(table[ours], value.shape):
            host = _fetch(value, layer, ours.endswith(".kernel"), dtype, change, mine is None or mine(name))
            yield name, host if host is None else names_lib.to_published(ours, host, config)


def sources(parameters: nnx.State, lora: LoRA | None = None) -> dict[str, tuple[jax.Array | np.ndarray, ...]]:
    """Path of each published parameter -> the arrays that it is made of: itself, and the factors merged into it."""
    values, factors = _by_path(parameters)
    if bool(factors) != bool(lora and lora.rank):
        raise ValueError(f"lora = {lora} is not what the parameters were made with ({len(factors)} LoRA factors)")
    found = {}
    for path, leaf in values.items():
        root = path.removesuffix(".kernel")
        adapted = "ab" if f"{root}.lora_a" in factors else ""
        found[path] = (leaf[...], *(factors[f"{root}.lora_{side}"][...] for side in adapted))
    return found


def published_shapes(path: str, shape: tuple[int, ...], config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of each published tensor of our parameter of that shape, in `published_tensors`' order."""
    template = names_lib.table(config)[path]
    one = names_lib.published_shape(path, shape[_stacked(template) :], config)
    return {name: one for _, name in _names(template, shape)}


def _by_path(parameters: nnx.State) -> tuple[dict[str, nnx.Variable], dict[str, nnx.Variable]]:
    """The published parameters, and the low-rank factors, each by its dotted path."""
    every = {".".join(path): leaf for path, leaf in nnx.to_flat_state(parameters)}
    factors = {path: leaf for path, leaf in every.items() if lora_lib.is_factor(path)}
    return {path: leaf for path, leaf in every.items() if path not in factors}, factors


def _stacked(template: str) -> bool:
    return "{}" in template


def _names(template: str, shape: tuple[int, ...]) -> list[tuple[int | None, str]]:
    """(layer, published name) of each published tensor of a parameter; layer None: the whole parameter."""
    return [(i, template.format(i)) for i in range(shape[0])] if _stacked(template) else [(None, template)]


def _fetch(
    value: jax.Array | np.ndarray, layer: int | None, transposed: bool, dtype, change=None, mine: bool = True
) -> np.ndarray | None:
    """One layer (None: all) on the host in our shape; `transposed`: so that turning it around copies nothing.

    `change`: the (A, B, scale) to merge into it. None where it isn't `mine`; the devices have then done their part.
    """
    dtype = jnp.dtype(dtype or value.dtype)
    if change is None and (
        isinstance(value, np.ndarray)
        or (value.is_fully_replicated and all(device.platform == "cpu" for device in value.devices()))
    ):
        if not mine:
            return None
        host = np.asarray(value)  # the devices' own memory
        host = host if layer is None else host[layer]
        return weight_files.transposed(host, dtype).T if transposed else host.astype(dtype, copy=False)
    whole = value.sharding if isinstance(value, jax.Array) and not value.is_fully_addressable else None
    if whole is not None:  # of several processes: every one of them gets all of the layer
        whole = sharding.replicated(whole.mesh)
    one = _one_layer(value, layer, change, transposed, dtype, whole)
    if not mine:
        jax.block_until_ready(one)  # it must be gone before the next one takes its memory
        return None
    host = np.asarray(one)
    return host.T if transposed else host


@functools.partial(jax.jit, static_argnames=("transposed", "dtype", "place"))
def _one_layer(value: jax.Array, layer: jax.Array | None, change, transposed: bool, dtype, place) -> jax.Array:
    one = value if layer is None else value[layer]
    if place is not None:
        one = jax.lax.with_sharding_constraint(one, place)
    if change is not None:
        a, b, scale = change
        one = lora_lib.merge(one, a[layer], b[layer], scale)
    one = one.astype(dtype)
    return one.T if transposed else one


def save(
    directory: str | Path,
    parameters: nnx.State,
    config: ModelConfig,
    source: str | Path,
    dtype=jnp.bfloat16,
    shard_bytes: int = SHARD_BYTES,
    lora: LoRA | None = None,
) -> None:
    """Writes a checkpoint directory that transformers loads as it is; tokenizer and the like come from `source`.

    The directory appears whole or not at all: it is written beside its place and renamed. The weights go to files of at
    most `shard_bytes` (a tensor larger than that has a file to itself); the host holds one file's tensors at a time.
    Low-rank factors are merged into their kernels in float32; `lora` is what the model was made with. Of several
    processes all call this; the first one writes.

    Raises:
        CheckpointError: a tensor holds NaN or infinities; what lay in `directory` stays.
    """
    directory, source = Path(directory), Path(source)
    if jax.process_index():
        for _ in published_tensors(parameters, config, dtype, lora, mine=lambda name: False):
            pass  # its shards were needed
        return
    _clean(directory, "partial")
    partial = directory.with_name(f".{directory.name}.partial-{os.getpid()}")
    partial.mkdir(parents=True)
    for file in sorted(source.iterdir()):
        if file.is_file() and file.suffix in (".json", ".jinja", ".txt", ".model") and file.name not in WEIGHTS:
            shutil.copyfile(file, partial / file.name)
    published = _with_dtype(config.published, jnp.dtype(dtype).name)
    if not {"dtype", "torch_dtype"} & set(published):
        published["dtype"] = jnp.dtype(dtype).name
    (partial / "config.json").write_text(json.dumps(published, indent=2) + "\n", encoding="utf-8")

    shards, total = _shards(parameters, config, jnp.dtype(dtype).itemsize, shard_bytes)
    tensors = weight_files.sound(published_tensors(parameters, config, dtype, lora), directory)
    for file, names in shards.items():
        weight_files.write(partial / file, dict(itertools.islice(tensors, len(names))))
    if len(shards) > 1:
        weight_map = {name: file for file, names in shards.items() for name in names}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (partial / WEIGHTS[1]).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    for written in (*partial.iterdir(), partial):
        sync_to_disk(written)  # a machine that fails after the renames must not leave empty files in their place
    # The old directory is set aside, not deleted first: a stop in the middle must not cost both.
    if directory.exists():
        os.replace(directory, directory.with_name(f".{directory.name}.old-{os.getpid()}"))
    os.replace(partial, directory)
    _clean(directory, "old")


def _with_dtype(published: dict[str, Any], dtype: str) -> dict[str, Any]:
    """A config.json with `dtype` wherever it names one, under the key that its readers know."""
    return {
        key: dtype
        if key in ("dtype", "torch_dtype")
        else _with_dtype(value, dtype)
        if key.endswith("_config") and isinstance(value, dict)
        else value
        for key, value in published.items()
    }


def _shards(
    parameters: nnx.State, config: ModelConfig, itemsize: int, shard_bytes: int
) -> tuple[dict[str, list[str]], int]:
    """File name -> published names in it, in `published_tensors`' order, and the bytes of all tensors."""
    shards: list[list[str]] = [[]]
    size = total = 0
    for path, leaf in _by_path(parameters)[0].items():
        names = _names(names_lib.table(config)[path], leaf.shape)
        for _, name in names:
            bytes_ = leaf.size // len(names) * itemsize
            if size and size + bytes_ > shard_bytes:
                shards.append([])
                size = 0
            shards[-1].append(name)
            size, total = size + bytes_, total + bytes_
    if len(shards) == 1:
        return {WEIGHTS[0]: shards[0]}, total
    return {f"model-{i:05d}-of-{len(shards):05d}.safetensors": names for i, names in enumerate(shards, 1)}, total


def _clean(directory: Path, kind: str) -> None:
    """Deletes what a stopped save of this directory left beside it: ours, and those of processes that are no more."""
    for left in directory.parent.glob(f".{glob.escape(directory.name)}.{kind}-*"):
        process = left.name.rpartition("-")[2]
        if process.isdecimal() and (int(process) == os.getpid() or not psutil.pid_exists(int(process))):
            shutil.rmtree(left, ignore_errors=True)
