"""Keys and values in pages, and attention over them: decoding reads what a response has, not what it could have.

A page holds S places of one layer. A row's tokens lie in the pages of its table, one page behind the other: the first
ones may be those of a prompt that several responses share. Nothing here decides who has which page (rollout/local/).

A layer's pages have one of two forms, in which a platform's kernel reads them and a token is written without moving any
other: (keys, values) of [K, pages, S, H] each, or on a TPU one array [pages, S, 2 K, H] in which each head's keys stand
before its values. Which code attends is decided here: `reference`, plain XLA, serves float32 and CPUs; 16-bit floats on
an accelerator take the kernel that jax keeps for the platform that the program is lowered for.

Axes: axes.py; a device row has as many pages as another, and a table counts those of its own.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.gpu import paged_attention as gpu_kernel
from jax.experimental.pallas.ops.tpu.ragged_paged_attention import ragged_paged_attention as tpu_kernel
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from capcur_jax.devices import sharding

Layer = tuple[jax.Array, ...]  # a layer's pages in one of both forms
Pages = tuple[Layer, ...]  # an array for each layer: no loop ever cuts one out of a larger one
_BLOCK_TOKENS = 256  # that a GPU's kernel reads at a time
# A GPU's kernel splits a row's pages where there are few rows, or they would not fill the card; what its splits give is
# written and read once more.
_SPLITS, _PROGRAMS = 8, 1024
_TPU_BLOCK, _TPU_QUERIES = 512, 32  # tokens and rows of a block of a TPU's kernel
_STEPS = 4  # of the places that plain XLA looks at
_MASKED = np.float32(np.finfo(np.float32).min)


class Tables(NamedTuple):
    """Where the tokens of C rows lie."""

    pages: jax.Array  # [C, pages of a row] int32, each among those of the row's device row
    own: bool = False  # row c has page c alone, of as many pages as rows: nothing needs to be looked up


class Shape(NamedTuple):
    """Of a layer's pages, those of all device rows."""

    heads: int  # K
    pages: int
    size: int  # S
    dim: int  # H
    paired: bool  # keys and values in one array

    def empty(self, depth: int, dtype) -> Pages:
        """Pages of so many layers, with nothing in them."""
        K, pages, S, H = self[:4]
        shape, arrays = ((pages, S, 2 * K, H), 1) if self.paired else ((K, pages, S, H), 2)
        return tuple(tuple(jnp.zeros(shape, dtype) for _ in range(arrays)) for _ in range(depth))


def paired_on(mesh: Mesh) -> bool:
    """Whether the mesh's platform wants keys and values in one array."""
    return mesh.devices.flat[0].platform == "tpu"


def spec(paired: bool) -> P:
    """How an array of pages lies on a mesh."""
    return P(sharding.ROWS, None, "tensor") if paired else P("tensor", sharding.ROWS)


def _specs(layer: Layer) -> Layer:
    return (spec(len(layer) == 1),) * len(layer)


def _pairs(k: jax.Array, v: jax.Array) -> jax.Array:
    """[..., K, H] each -> [..., 2 K, H]."""
    return jnp.stack([k, v], axis=-2).reshape(*k.shape[:-2], -1, k.shape[-1])


# ---------------------------------------------------------------------- writing


def write(
    mesh: Mesh, layer: Layer, k_CxKxH: jax.Array, v_CxKxH: jax.Array, tables: Tables, at_C: jax.Array, live_C: jax.Array
) -> Layer:
    """A layer's pages with what each live row has for its place `at` [C]. They are changed where they lie."""

    def here(layer, k, v, table_CxM, at, live):
        count, size = (layer[0].shape[:2]) if len(layer) == 1 else layer[0].shape[1:3]
        number = jnp.arange(len(k))
        own = number if tables.own else jnp.take_along_axis(table_CxM, at[:, None] // size, axis=1)[:, 0]
        # A row that is not live writes behind the last page, which is nowhere.
        where = jnp.where(live, own, count + number), at % size
        drop = dict(mode="drop", unique_indices=True)
        if len(layer) == 1:
            return (layer[0].at[where].set(_pairs(k, v).astype(layer[0].dtype), **drop),)
        new = (jnp.swapaxes(x, 0, 1).astype(pages.dtype) for x, pages in zip((k, v), layer, strict=True))
        return tuple(pages.at[:, *where].set(x, **drop) for x, pages in zip(new, layer, strict=True))

    rows, heads = P(sharding.ROWS), P(sharding.ROWS, "tensor")
    written = sharding.local(mesh, here, (_specs(layer), heads, heads, rows, rows, rows), _specs(layer))
    return written(layer, k_CxKxH, v_CxKxH, tables.pages, at_C, live_C)


def fill(layer: Layer, k_TxKxH: jax.Array, v_TxKxH: jax.Array, start_D: jax.Array, page_D: jax.Array) -> Layer:
    """On one device: pages `page` [D], all different, with the tokens from `start` [D] on. Past the last page: none.

    Behind the last token anything is copied: nobody looks there before a response has written to it.
    """
    size = layer[0].shape[1 if len(layer) == 1 else 2]
    places = jnp.minimum(start_D[:, None] + jnp.arange(size), len(k_TxKxH) - 1)
    k, v = (x[places].astype(layer[0].dtype) for x in (k_TxKxH, v_TxKxH))
    drop = dict(mode="drop", unique_indices=True)
    if len(layer) == 1:
        return (layer[0].at[page_D].set(_pairs(k, v), **drop),)
    both = zip((k, v), layer, strict=True)
    return tuple(pages.at[:, page_D].set(jnp.moveaxis(x, 2, 0), **drop) for x, pages in both)


# ---------------------------------------------------------------------- attention


def attend(
    q_CxNxH: jax.Array,
    layer: Layer,
    tables: Tables,
    lengths_C: jax.Array,
    mesh: Mesh,
    implementation: str = "auto",
) -> jax.Array:
    """Softmax attention [C, N, H] of one query a row over the first `lengths` [C] tokens of its table.

    A row of length 0 gets anything. `implementation`: as in attention.attend.
    """

    def here(q, layer, table, lengths):
        plain = functools.partial(reference, own=tables.own)
        kernels = {} if implementation == "xla" else _kernels(q, layer)
        if not kernels:
            return plain(q, layer, table, lengths)
        return jax.lax.platform_dependent(q, layer, table, lengths, default=plain, **kernels)

    rows, heads = P(sharding.ROWS), P(sharding.ROWS, "tensor")
    attended = sharding.local(mesh, here, (heads, _specs(layer), rows, rows), heads)
    return attended(q_CxNxH, layer, tables.pages, lengths_C)


def _kernels(q_CxNxH: jax.Array, layer: Layer) -> dict[str, Callable]:
    """By platform, one that takes such queries and pages of that form."""
    dim = q_CxNxH.shape[-1]
    if q_CxNxH.dtype.itemsize != 2:
        return {}
    if len(layer) == 1:
        return {"tpu": on_tpu} if dim % 128 == 0 else {}
    return {"cuda": on_gpu} if dim >= 16 and dim & (dim - 1) == 0 else {}


def reference(
    q_CxNxH: jax.Array, layer: Layer, table_CxM: jax.Array, lengths_C: jax.Array, *, own: bool = False
) -> jax.Array:
    """`attend` on one device in plain XLA. It looks at as many places of all rows as the longest row has, in steps, and
    makes a copy of them unless `own`."""
    C, N, H = q_CxNxH.shape
    if len(layer) == 1:
        layer = tuple(jnp.moveaxis(layer[0][:, :, i::2], 2, 0) for i in range(2))
    K, _, size, _ = layer[0].shape
    M = table_CxM.shape[1]
    q = _scaled(q_CxNxH).reshape(C, K, N // K, H)

    def over(places: int) -> jax.Array:
        """Of the first places of each row."""
        if own:
            keys, values = (x[:, :, :places] for x in layer)
        else:
            keys, values = (x[:, table_CxM[:, : -(-places // size)]].reshape(K, C, -1, H) for x in layer)
        scores = jnp.einsum("ckmh,kcsh->kcms", q, keys, preferred_element_type=jnp.float32)
        scores = jnp.where((jnp.arange(keys.shape[2]) < lengths_C[:, None])[:, None], scores, _MASKED)
        weights = jax.nn.softmax(scores, axis=-1).astype(values.dtype)
        return jnp.einsum("kcms,kcsh->ckmh", weights, values).reshape(C, N, H)

    steps = sorted({min(-(-M * size * n // (_STEPS * 8)) * 8, M * size) for n in range(1, _STEPS + 1)})
    number = sum((lengths_C.max() > places).astype(jnp.int32) for places in steps[:-1])
    return jax.lax.switch(number, [functools.partial(over, places) for places in steps])


def on_gpu(q_CxNxH, layer: Layer, table_CxM, lengths_C, *, interpret: bool = False) -> jax.Array:
    """The same by jax's Triton kernel. It reads the pages that a row has something in."""
    keys, values = layer
    block, splits = max(1, _BLOCK_TOKENS // keys.shape[2]), 1
    while splits < _SPLITS and splits * len(q_CxNxH) * keys.shape[0] < _PROGRAMS:
        splits *= 2
    table = jnp.pad(table_CxM, ((0, 0), (0, -table_CxM.shape[1] % (block * splits))))
    return gpu_kernel.paged_attention(
        _scaled(q_CxNxH), keys, values, table, lengths_C,
        pages_per_compute_block=block, k_splits=splits, interpret=interpret,
    )  # fmt: skip


def on_tpu(q_CxNxH, layer: Layer, table_CxM, lengths_C) -> jax.Array:
    """The same by jax's Mosaic kernel, likewise; a row of length 0 looks at one token."""
    rows, block = jnp.arange(len(q_CxNxH) + 1, dtype=jnp.int32), max(1, _TPU_BLOCK // layer[0].shape[1])
    # Left to itself the kernel asks the devices that are here for its blocks.
    return tpu_kernel(
        q_CxNxH, layer[0], jnp.maximum(lengths_C, 1), table_CxM, rows, rows[-1:],
        sm_scale=q_CxNxH.shape[-1] ** -0.5, num_kv_pages_per_block=min(block, table_CxM.shape[1]),
        num_queries_per_block=min(_TPU_QUERIES, len(q_CxNxH)),
    )  # fmt: skip


def _scaled(q_CxNxH: jax.Array) -> jax.Array:
    return q_CxNxH * np.asarray(q_CxNxH.shape[-1] ** -0.5, q_CxNxH.dtype)
