"""Meshes, and where everything lies on one: a single table of rules for both towers and the decoder.

Axes of a mesh, from the slowest links to the fastest: `data` (over hosts or TPU slices: copies of the model), `fsdp`
(parameters, gradients and optimizer state split, gathered a layer at a time), `tensor` (heads and feed-forward split).
Prompts, responses and rows of patches are split over `data` and `fsdp` together: a device row works on its own prompts,
their images and their responses, and nothing of a sample ever leaves it.

XLA partitions everything by these annotations but for what must stay on its device (Pallas kernels, gathers of a
sample's own features, the embedding's lookup), which runs inside shard_map (`local`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import mesh_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from capcur_jax.errors import InputError

AXES = ("data", "fsdp", "tensor")
ROWS = ("data", "fsdp")

# Dotted parameter path -> the mesh axes of its last dimensions (leading layer axes are never split). The first rule
# that fits counts; what none names is replicated. A dimension that its axis does not divide is replicated, too.
RULES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    (r"^text\.embed\.embedding$", ("tensor", "fsdp")),  # [V, D]
    (r"^head\.kernel$", ("fsdp", "tensor")),  # [D, V]
    (r"^text\.layers\.(q|k|v|gate|up)\.kernel$", ("fsdp", "tensor")),
    (r"^text\.layers\.(q|k|v)\.bias$", ("tensor",)),
    (r"^text\.layers\.(o|down)\.kernel$", ("tensor", "fsdp")),
    (r"^text\.layers\.(q|k|v|gate|up)\.lora_a$", ("fsdp", None)),  # [D, r]
    (r"^text\.layers\.(q|k|v|gate|up)\.lora_b$", (None, "tensor")),
    (r"^text\.layers\.(o|down)\.lora_a$", ("tensor", None)),
    (r"^text\.layers\.(o|down)\.lora_b$", (None, "fsdp")),
    # Queries, keys and values of the towers are one kernel: its columns are cut into heads only after the product.
    (r"^visual\.blocks\.attention\.qkv\.kernel$", ("fsdp", None)),
    (r"^visual\.blocks\.attention\.out\.kernel$", ("tensor", "fsdp")),
    (r"^visual\.(blocks|merger|deepstack)\.(gate|up)\.kernel$", ("fsdp", "tensor")),
    (r"^visual\.(blocks|merger|deepstack)\.(gate|up)\.bias$", ("tensor",)),
    (r"^visual\.(blocks|merger|deepstack)\.down\.kernel$", ("tensor", "fsdp")),
    (r"^visual\.patch\.kernel$", (None, "fsdp")),
    (r"^visual\.table\.embedding$", (None, "fsdp")),
)


# ---------------------------------------------------------------------- meshes


def make_mesh(settings: Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh of `config.mesh`: sizes of data, fsdp and tensor, one of which may be -1 (all devices that are left).

    Over several hosts or TPU slices `data` spans them as far as it can and the other axes stay inside (fast links).

    Raises:
        InputError: the sizes do not fit the devices; names them and the remedy.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = [int(settings[axis]) for axis in AXES]
    shown = ", ".join(f"config.mesh.{axis} = {size}" for axis, size in zip(AXES, sizes, strict=True))
    if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
        raise InputError(f"{shown}: give numbers of at least 1, and -1 (what is left) to one axis at most")
    known = int(np.prod([size for size in sizes if size != -1]))
    if -1 in sizes:
        sizes[sizes.index(-1)] = len(devices) // known
    if int(np.prod(sizes)) != len(devices):
        raise InputError(f"{shown} do not make the {len(devices)} devices that there are; their product must")
    return Mesh(_arranged(devices, sizes), AXES)


def single() -> Mesh:
    """The mesh of this process's first device."""
    return make_mesh(dict.fromkeys(AXES, 1), jax.local_devices()[:1])


def _arranged(devices: list[jax.Device], sizes: list[int]) -> np.ndarray:
    """The devices in the mesh's shape, neighbours on fast links."""
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    hosts = len({device.process_index for device in devices})
    granules = slices if slices > 1 else hosts
    tpu = devices[0].platform == "tpu"
    if granules > 1 and sizes[0] % granules == 0 and (slices > 1 or not tpu):
        inner = (sizes[0] // granules, *sizes[1:])
        return mesh_utils.create_hybrid_device_mesh(
            inner, (granules, 1, 1), devices, process_is_granule=slices == 1, allow_split_physical_axes=True
        )
    if tpu:
        return mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    return np.array(sorted(devices, key=lambda device: (device.process_index, device.id))).reshape(sizes)


def row_shards(mesh: Mesh) -> int:
    """Parts into which prompts are split: each device row (all its `tensor` devices together) has one."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def local_row_shards(mesh: Mesh) -> int:
    """Those of them that this process feeds.

    Raises:
        InputError: the processes' shares differ, or a device row spans two of them.
    """
    if jax.process_count() == 1:
        return row_shards(mesh)
    rows = mesh.devices.reshape(-1, mesh.shape["tensor"])
    owners = [{device.process_index for device in row} for row in rows]
    mine = sum(owner == {jax.process_index()} for owner in owners)
    if any(len(owner) > 1 for owner in owners) or mine * jax.process_count() != len(rows):
        raise InputError(
            f"config.mesh: each of the {jax.process_count()} processes must have as many whole device rows as the "
            f"others; the mesh is {dict(mesh.shape)}: lower config.mesh.tensor to at most a host's devices"
        )
    return mine


# ---------------------------------------------------------------------- parameters and batches


def spec_of(mesh: Mesh, path: str, shape: Sequence[int]) -> P:
    """The partition of a parameter by its dotted path."""
    axes = next((axes for pattern, axes in RULES if re.search(pattern, path)), ())
    entries: list[str | None] = [None] * (len(shape) - len(axes)) + list(axes)
    return P(
        *(axis if axis and size % mesh.shape[axis] == 0 else None for axis, size in zip(entries, shape, strict=True))
    )


def of_parameter(mesh: Mesh, path: str, shape: Sequence[int]) -> NamedSharding:
    """Where a parameter lies; what `huggingface.load` asks for."""
    return NamedSharding(mesh, spec_of(mesh, path, shape))


def unsplit(mesh: Mesh, path: str, shape: Sequence[int]) -> NamedSharding:
    """Of a parameter that device rows do not split: whole on each, over `tensor` alone."""
    return NamedSharding(mesh, P(*(axis if axis == "tensor" else None for axis in spec_of(mesh, path, shape))))


def on_devices(tree: Any) -> Any:
    """The arrays in their devices' own memory; those that are there already, and numpy's, stay as they are."""

    def put(leaf):
        if not isinstance(leaf, jax.Array):
            return leaf
        own = next(iter(leaf.sharding.device_set)).default_memory().kind
        return leaf if leaf.sharding.memory_kind == own else jax.device_put(leaf, leaf.sharding.with_memory_kind(own))

    return jax.tree.map(put, tree)


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, P())


def by_rows(mesh: Mesh) -> NamedSharding:
    """Of arrays whose leading axis is prompts, responses or rows of patches."""
    return NamedSharding(mesh, P(ROWS))


def put(mesh: Mesh, batch: Any) -> Any:
    """This process's rows of a batch (numpy) -> global arrays split over device rows."""
    sharding = by_rows(mesh)
    if jax.process_count() == 1:
        return jax.device_put(batch, sharding)
    return jax.tree.map(lambda leaf: jax.make_array_from_process_local_data(sharding, leaf), batch)


def abstract(mesh: Mesh, batch: Any) -> Any:
    """The batch as `put` would place it, by shape alone; for compiling."""
    sharding, share = by_rows(mesh), row_shards(mesh) // local_row_shards(mesh)
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct((leaf.shape[0] * share, *leaf.shape[1:]), leaf.dtype, sharding=sharding),
        batch,
    )


def fetch_rows(array: jax.Array) -> np.ndarray:
    """This process's rows of a global array that `put`'s rows led to."""
    if array.is_fully_addressable:
        return np.asarray(array)
    shards = {shard.index[0].start or 0: shard.data for shard in array.addressable_shards}
    return np.concatenate([np.asarray(shards[start]) for start in sorted(shards)])


def shape_of(leaf: jax.Array, dtype: Any = None) -> jax.ShapeDtypeStruct:
    """An array by shape, dtype (or another one) and place."""
    return jax.ShapeDtypeStruct(leaf.shape, dtype or leaf.dtype, sharding=leaf.sharding)


def described(mesh: Mesh, parameters: nnx.State) -> list[dict[str, str]]:
    """A line for each parameter: where its dimensions lie."""
    lines = []
    for path, leaf in nnx.to_flat_state(parameters):
        spec = spec_of(mesh, ".".join(map(str, path)), leaf.shape)
        shards = int(np.prod([mesh.shape[axis] for axis in spec if axis]))
        lines.append(
            {
                "parameter": ".".join(map(str, path)),
                "shape": " x ".join(map(str, leaf.shape)),
                "split over": ", ".join(str(axis or "-") for axis in spec),
                "MiB a device": f"{leaf.size * leaf.dtype.itemsize / shards / 2**20:.2f}",
            }
        )
    return lines


# ---------------------------------------------------------------------- inside a model


def constrain(mesh: Mesh, x: jax.Array, *axes: Any, leading: int = 0) -> jax.Array:
    """`x` split by rows on its first axis, after `leading` whole ones, and by `axes` on the next ones."""
    if mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P(*[None] * leading, ROWS, *axes)))


def local(mesh: Mesh, function: Callable, in_specs: Any, out_specs: Any) -> Callable:
    """The function on each device's own part of its arguments."""
    if mesh.size == 1:
        return function
    # Unchecked: Pallas kernels and custom derivatives do not say over which axes their results vary.
    return jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def lookup(mesh: Mesh, embedding_VxD: jax.Array, tokens_AxT: jax.Array, spec: P | None = None) -> jax.Array:
    """Rows of the embedding [A, T, D]. `spec`: how it lies, where that is not as RULES say.

    Left to itself XLA gathers the table. Here the tokens travel instead: each device looks up its own columns of its
    own part of the vocabulary for all rows of its fsdp group, and an all-to-all gives every row back whole.
    """
    if mesh.size == 1:
        return embedding_VxD[tokens_AxT]
    spec = spec_of(mesh, "text.embed.embedding", embedding_VxD.shape) if spec is None else spec
    vocabulary, width = spec

    def part(table, tokens):
        if width:
            tokens = jax.lax.all_gather(tokens, width, axis=0, tiled=True)
        if vocabulary:
            ids = tokens - jax.lax.axis_index(vocabulary) * table.shape[0]
            inside = (ids >= 0) & (ids < table.shape[0])
            found = jnp.where(inside[..., None], table[jnp.where(inside, ids, 0)], 0)
            found = jax.lax.psum(found, vocabulary)
        else:
            found = table[tokens]
        return jax.lax.all_to_all(found, width, split_axis=0, concat_axis=2, tiled=True) if width else found

    return local(mesh, part, (spec, P(ROWS)), P(ROWS))(embedding_VxD, tokens_AxT)


def take(mesh: Mesh, features_FxD: jax.Array, index: jax.Array) -> jax.Array:
    """Features by an index that counts among those of its own device row."""
    return local(mesh, lambda features, index: features[index], (P(ROWS), P(ROWS)), P(ROWS))(features_FxD, index)
