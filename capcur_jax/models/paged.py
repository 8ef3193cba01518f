"""Keys and values in pages, and attention over them: decoding reads what a response has, not what it could have.

A page holds S places of one layer. A row's tokens lie in the pages of its table, one page behind the other: the first
ones may be those of a prompt that several responses share. Nothing here decides who has which page (rollout/local/).

Which code computes it is decided here: `reference`, plain XLA, serves float32 and CPUs; 16-bit floats on an accelerator
take the kernel that jax keeps for the platform that the program is lowered for. Axes: axes.py; a device row has as many
pages as another, and a table counts those of its own.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.gpu import paged_attention as gpu_kernel
from jax.experimental.pallas.ops.tpu.paged_attention import paged_attention as tpu_kernel
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from capcur_jax.devices import sharding

SPEC = P("tensor", sharding.ROWS)  # of a layer's pages
_BLOCK_TOKENS = 256  # that a kernel's block reads of a table at a time
_SPLITS = 8  # of a row's pages on a GPU, which work side by side: few rows alone would not fill it
_MASKED = np.float32(np.finfo(np.float32).min)


class Pages(NamedTuple):
    """Keys and values of every layer, an array for each: no loop ever cuts a layer out of a larger one."""

    keys: tuple[jax.Array, ...]  # of each layer [K, pages, S, H]
    values: tuple[jax.Array, ...]


class Tables(NamedTuple):
    """Where the tokens of C rows lie."""

    pages: jax.Array  # [C, pages of a row] int32, each among those of the row's device row
    own: bool = False  # row c has page c alone, of as many pages as rows: nothing needs to be looked up


def empty(depth: int, shape: tuple[int, int, int, int], dtype) -> Pages:
    """Pages [K, pages, S, H] of so many layers, with nothing in them."""
    return Pages(*(tuple(jnp.zeros(shape, dtype) for _ in range(depth)) for _ in range(2)))


def write(mesh: Mesh, pages: jax.Array, x_CxKxH: jax.Array, tables: Tables, at_C: jax.Array, live_C: jax.Array):
    """A layer's pages with what each live row has for its place `at` [C]. They are changed where they lie."""

    def here(pages, x, table_CxM, at, live):
        size, number = pages.shape[2], jnp.arange(len(x))
        own = number if tables.own else jnp.take_along_axis(table_CxM, at[:, None] // size, axis=1)[:, 0]
        return _set(pages, own * size + at % size, live, jnp.swapaxes(x, 0, 1), axes=2)

    rows = P(sharding.ROWS)
    specs = (SPEC, P(sharding.ROWS, "tensor"), rows, rows, rows)
    return sharding.local(mesh, here, specs, SPEC)(pages, x_CxKxH, tables.pages, at_C, live_C)


def put(pages_KxPxSxH: jax.Array, new_KxDxSxH: jax.Array, page_D: jax.Array) -> jax.Array:
    """Pages of one device with D whole ones put in; one whose number is past the last is put nowhere."""
    return _set(pages_KxPxSxH, page_D, page_D < pages_KxPxSxH.shape[1], new_KxDxSxH, axes=1)


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


def attend(
    q_CxNxH: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    tables: Tables,
    lengths_C: jax.Array,
    mesh: Mesh,
    implementation: str = "auto",
) -> jax.Array:
    """Softmax attention [C, N, H] of one query a row over the first `lengths` [C] tokens of its table.

    A row of length 0 gets anything. `implementation`: as in attention.attend.
    """

    def here(q, keys, values, table, lengths):
        plain = functools.partial(reference, own=tables.own)
        if implementation == "xla" or q.dtype.itemsize != 2:
            return plain(q, keys, values, table, lengths)
        return jax.lax.platform_dependent(q, keys, values, table, lengths, default=plain, cuda=on_gpu, tpu=on_tpu)

    rows, heads = P(sharding.ROWS), P(sharding.ROWS, "tensor")
    attended = sharding.local(mesh, here, (heads, SPEC, SPEC, rows, rows), heads)
    return attended(q_CxNxH, keys, values, tables.pages, lengths_C)


def reference(q_CxNxH, keys_KxPxSxH, values_KxPxSxH, table_CxM, lengths_C, *, own: bool = False) -> jax.Array:
    """`attend` on one device in plain XLA: it makes a copy of all places of the rows' tables, unless `own`."""
    C, N, H = q_CxNxH.shape
    K = keys_KxPxSxH.shape[0]

    def of_rows(x):
        return x if own else x[:, table_CxM].reshape(K, C, -1, H)

    keys, values = of_rows(keys_KxPxSxH), of_rows(values_KxPxSxH)
    q = (q_CxNxH * np.asarray(H**-0.5, q_CxNxH.dtype)).reshape(C, K, N // K, H)
    scores = jnp.einsum("ckmh,kcsh->kcms", q, keys, preferred_element_type=jnp.float32)
    scores = jnp.where((jnp.arange(keys.shape[2]) < lengths_C[:, None])[:, None], scores, _MASKED)
    weights = jax.nn.softmax(scores, axis=-1).astype(values.dtype)
    return jnp.einsum("kcms,kcsh->ckmh", weights, values).reshape(C, N, H)


def on_gpu(q_CxNxH, keys_KxPxSxH, values_KxPxSxH, table_CxM, lengths_C, *, interpret: bool = False) -> jax.Array:
    """The same by jax's Triton kernel. It reads the pages that a row has something in."""
    block = max(1, _BLOCK_TOKENS // keys_KxPxSxH.shape[2])
    table = _padded(table_CxM, block * _SPLITS)
    return gpu_kernel.paged_attention(
        _scaled(q_CxNxH), keys_KxPxSxH, values_KxPxSxH, table, lengths_C,
        pages_per_compute_block=block, k_splits=_SPLITS, interpret=interpret,
    )  # fmt: skip


def on_tpu(q_CxNxH, keys_KxPxSxH, values_KxPxSxH, table_CxM, lengths_C) -> jax.Array:
    """The same by jax's Mosaic kernel, likewise."""
    block = max(1, _BLOCK_TOKENS // keys_KxPxSxH.shape[2])
    return tpu_kernel(
        _scaled(q_CxNxH), keys_KxPxSxH, values_KxPxSxH, lengths_C, _padded(table_CxM, block),
        pages_per_compute_block=block,
    )  # fmt: skip


def _padded(table_CxM: jax.Array, multiple: int) -> jax.Array:
    return jnp.pad(table_CxM, ((0, 0), (0, -table_CxM.shape[1] % multiple)))


def _scaled(q_CxNxH: jax.Array) -> jax.Array:
    return q_CxNxH * np.asarray(q_CxNxH.shape[-1] ** -0.5, q_CxNxH.dtype)
