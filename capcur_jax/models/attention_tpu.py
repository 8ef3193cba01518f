"""Attention on TPUs: jax's splash kernel, which holds no scores in memory and skips blocks that a static mask empties.

Axes: axes.py. Grouped heads and sequences of any length; a kernel is called for each row (vmap). Under a
mesh these functions belong inside shard_map, with rows and kv heads split in any way.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

from capcur_jax.models.packed_tpu import block_of


def causal(q_AxTxNxH: jax.Array, k_AxTxKxH: jax.Array, v_AxTxKxH: jax.Array, *, interpret: bool = False) -> jax.Array:
    """Each query sees the keys up to itself: [A, T, N, H]."""
    T = q_AxTxNxH.shape[1]
    block = block_of(T)
    q, k, v = (_pad(x, block) for x in (q_AxTxNxH, k_AxTxKxH, v_AxTxKxH))
    return _splash(q, k, v, masks.CausalMask((q.shape[1], q.shape[1])), None, block, interpret)[:, :T]


def segments(
    q_JxPxNxH: jax.Array, k_JxPxKxH: jax.Array, v_JxPxKxH: jax.Array, ids_JxP: jax.Array, *, interpret: bool = False
) -> jax.Array:
    """Each query sees the keys whose id (>= 0) is its own: [J, P, N, H]."""
    P = q_JxPxNxH.shape[1]
    block = block_of(P)
    q, k, v = (_pad(x, block) for x in (q_JxPxNxH, k_JxPxKxH, v_JxPxKxH))
    ids = _pad(ids_JxP.astype(jnp.int32), block, -1)
    mask = masks.FullMask((q.shape[1], q.shape[1]))
    return _splash(q, k, v, mask, splash.SegmentIds(q=ids, kv=ids), block, interpret)[:, :P]


def _pad(x_AxTx: jax.Array, block: int, value: int = 0) -> jax.Array:
    padding = [(0, 0)] * x_AxTx.ndim
    padding[1] = (0, -x_AxTx.shape[1] % block)
    return jnp.pad(x_AxTx, padding, constant_values=value)


def _splash(q_AxTxNxH, k_AxSxKxH, v_AxSxKxH, mask, ids, block: int, interpret: bool) -> jax.Array:
    N, H = q_AxTxNxH.shape[2:]
    q = q_AxTxNxH * np.asarray(H**-0.5, q_AxTxNxH.dtype)
    q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q, k_AxSxKxH, v_AxSxKxH))
    return jnp.swapaxes(jax.vmap(_kernel(mask, N, block, interpret))(q, k, v, ids), 1, 2)


@functools.lru_cache(maxsize=64)
def _kernel(mask: masks.Mask, heads: int, block: int, interpret: bool) -> splash.SplashAttentionKernel:
    """Cached: reading a long mask takes seconds. The result stays in numpy, free of any device."""
    sizes = splash.BlockSizes(*[block] * 8)
    with jax.ensure_compile_time_eval():
        kernel = splash.make_splash_mha_single_device(
            masks.MultiHeadMask([mask] * heads), block_sizes=sizes, interpret=interpret
        )
        return jax.tree.map(np.asarray, kernel)
