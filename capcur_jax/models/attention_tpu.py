"""Attention of prompt rows on TPUs: jax's splash kernel, which holds no scores in memory and skips blocks that a static
mask empties.

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
    mask = masks.CausalMask((q.shape[1], q.shape[1]))
    q = q * np.asarray(q.shape[-1] ** -0.5, q.dtype)
    q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q, k, v))
    return jnp.swapaxes(jax.vmap(_kernel(mask, q.shape[1], block, interpret))(q, k, v), 1, 2)[:, :T]


def _pad(x_AxTxNxH: jax.Array, block: int) -> jax.Array:
    return jnp.pad(x_AxTxNxH, ((0, 0), (0, -x_AxTxNxH.shape[1] % block), (0, 0), (0, 0)))


@functools.lru_cache(maxsize=64)
def _kernel(mask: masks.Mask, heads: int, block: int, interpret: bool) -> splash.SplashAttentionKernel:
    """Cached: reading a long mask takes seconds. The result stays in numpy, free of any device."""
    sizes = splash.BlockSizes(*[block] * 8)
    with jax.ensure_compile_time_eval():
        kernel = splash.make_splash_mha_single_device(
            masks.MultiHeadMask([mask] * heads), block_sizes=sizes, interpret=interpret
        )
        return jax.tree.map(np.asarray, kernel)
