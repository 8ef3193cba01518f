"""Keys and values in pages, and attention over them: decoding reads what a response has, not what it could have.

A page holds S places of one layer. A row's tokens lie in the pages of its table, one page behind the other: the first
ones may be those of a prompt that several responses share. Nothing here decides who has which page (rollout/local/).

Which code attends is decided here: `reference`, plain XLA, serves float32 and CPUs; 16-bit floats on an accelerator
take the kernel that jax keeps for the platform that the program is lowered for.

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
from jax.experimental.pallas.ops.tpu.paged_attention import paged_attention as tpu_kernel
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from capcur_jax.devices import sharding

Layer = tuple[jax.Array, jax.Array]  # a layer's keys and values [K, pages, S, H]
Pages = tuple[Layer, ...]  # arrays for each layer: no loop ever cuts one out of a larger one
SPEC = P("tensor", sharding.ROWS)  # of an array of pages
_BLOCK_TOKENS = 256  # that a kernel reads of a row at a time
# A GPU's kernel splits a row's pages where there are few rows, or they would not fill the card; what its splits give is
# written and read once more.
_SPLITS, _PROGRAMS = 8, 1024
_STEPS = 4  # of the places that plain XLA looks at
_MASKED = np.float32(np.finfo(np.float32).min)


class Tables(NamedTuple):
    """Where the tokens of C rows lie."""

    pages: jax.Array  # [C, pages of a row] int32, each among those of the row's device row
    own: bool = False  # row c has page c alone, of as many pages as rows: nothing needs to be looked up


def empty(depth: int, shape: tuple[int, int, int, int], dtype) -> Pages:
    """Pages [K, pages, S, H] of so many layers, with nothing in them."""
    return tuple((jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for _ in range(depth))


# ---------------------------------------------------------------------- writing


def write(
    mesh: Mesh, layer: Layer, k_CxKxH: jax.Array, v_CxKxH: jax.Array, tables: Tables, at_C: jax.Array, live_C: jax.Array
) -> Layer:
    """A layer's pages with what each live row has for its place `at` [C]. They are changed where they lie."""

    def here(layer, new, table_CxM, at, live):
        size = layer[0].shape[2]
        own = jnp.arange(len(at))
        if not tables.own:
            own = jnp.take_along_axis(table_CxM, at[:, None] // size, axis=1)[:, 0]
        index = own * size + at % size
        both = zip(layer, new, strict=True)
        return tuple(_set(pages, index, live, jnp.swapaxes(x, 0, 1), axes=2) for pages, x in both)

    rows, heads = P(sharding.ROWS), P(sharding.ROWS, "tensor")
    specs = (SPEC, SPEC), (heads, heads), rows, rows, rows
    return sharding.local(mesh, here, specs, (SPEC, SPEC))(layer, (k_CxKxH, v_CxKxH), tables.pages, at_C, live_C)


def fill(layer: Layer, k_TxKxH: jax.Array, v_TxKxH: jax.Array, start_D: jax.Array, page_D: jax.Array) -> Layer:
    """On one device: pages `page` [D], all different, with the tokens from `start` [D] on. Past the last page: none.

    Behind the last token anything is copied: nobody looks there before a response has written to it.
    """
    _, count, size, _ = layer[0].shape
    places = jnp.minimum(start_D[:, None] + jnp.arange(size), len(k_TxKxH) - 1)
    both = zip(layer, (k_TxKxH, v_TxKxH), strict=True)
    return tuple(_set(pages, page_D, page_D < count, jnp.moveaxis(x[places], 2, 0), axes=1) for pages, x in both)


def _set(pages_KxPxSxH: jax.Array, index: jax.Array, real: jax.Array, new: jax.Array, axes: int) -> jax.Array:
    """With `new` [K, indices, ...] at places that count along the `axes` behind K, of all heads alike."""
    # One index for heads and places: with two of them XLA for a TPU wants another order of axes than the kernel does,
    # and turns all pages to and fro for every token.
    shape, K = pages_KxPxSxH.shape, len(pages_KxPxSxH)
    flat = pages_KxPxSxH.reshape(-1, *shape[1 + axes :])
    heads, number = np.arange(K)[:, None], jnp.arange(K * len(index)).reshape(K, -1)
    # What is not real goes behind the end, which is nowhere, each to a place of its own.
    found = jnp.where(real, heads * (len(flat) // K) + index, len(flat) + number)
    new = new.astype(flat.dtype).reshape(-1, *flat.shape[1:])
    return flat.at[found.reshape(-1)].set(new, mode="drop", unique_indices=True).reshape(shape)


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
        kernels = {} if implementation == "xla" else _kernels(q)
        if not kernels:
            return plain(q, layer, table, lengths)
        return jax.lax.platform_dependent(q, layer, table, lengths, default=plain, **kernels)

    rows, heads = P(sharding.ROWS), P(sharding.ROWS, "tensor")
    attended = sharding.local(mesh, here, (heads, (SPEC, SPEC), rows, rows), heads)
    return attended(q_CxNxH, layer, tables.pages, lengths_C)


def _kernels(q_CxNxH: jax.Array) -> dict[str, Callable]:
    """By platform, those that take such queries."""
    dim = q_CxNxH.shape[-1]
    if q_CxNxH.dtype.itemsize != 2:
        return {}
    takes = {"cuda": dim >= 16 and dim & (dim - 1) == 0, "tpu": dim % 128 == 0}
    return {name: kernel for name, kernel in (("cuda", on_gpu), ("tpu", on_tpu)) if takes[name]}


def reference(
    q_CxNxH: jax.Array, layer: Layer, table_CxM: jax.Array, lengths_C: jax.Array, *, own: bool = False
) -> jax.Array:
    """`attend` on one device in plain XLA. It looks at as many places of all rows as the longest row has, in steps, and
    makes a copy of them unless `own`."""
    C, N, H = q_CxNxH.shape
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
    return gpu_kernel.paged_attention(
        _scaled(q_CxNxH), keys, values, _padded(table_CxM, block * splits), lengths_C,
        pages_per_compute_block=block, k_splits=splits, interpret=interpret,
    )  # fmt: skip


def on_tpu(q_CxNxH, layer: Layer, table_CxM, lengths_C) -> jax.Array:
    """The same by jax's Mosaic kernel, likewise."""
    keys, values = layer
    block = max(1, _BLOCK_TOKENS // keys.shape[2])
    return tpu_kernel(
        _scaled(q_CxNxH), keys, values, lengths_C, _padded(table_CxM, block), pages_per_compute_block=block
    )  # fmt: skip


def _padded(table_CxM: jax.Array, multiple: int) -> jax.Array:
    return jnp.pad(table_CxM, ((0, 0), (0, -table_CxM.shape[1] % multiple)))


def _scaled(q_CxNxH: jax.Array) -> jax.Array:
    return q_CxNxH * np.asarray(q_CxNxH.shape[-1] ** -0.5, q_CxNxH.dtype)
