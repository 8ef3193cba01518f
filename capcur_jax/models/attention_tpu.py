"""Attention of prompt rows on TPUs: jax's splash kernel, which holds no scores in memory and skips blocks that
causality empties.

Axes: axes.py. Grouped heads and sequences of any length; a kernel is called for each row (vmap). Under a mesh this
belongs inside shard_map, with rows and kv heads split in any way.
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
    T, N, H = q_AxTxNxH.shape[1:]
    block = block_of(T)
    q = q_AxTxNxH * np.asarray(H**-0.5, q_AxTxNxH.dtype)
    padding = (0, 0), (0, -T % block), (0, 0), (0, 0)
    q, k, v = (jnp.swapaxes(jnp.pad(x, padding), 1, 2) for x in (q, k_AxTxKxH, v_AxTxKxH))
    out = jax.vmap(_kernel(q.shape[2], N, block, interpret))(q, k, v)
    return jnp.swapaxes(out, 1, 2)[:, :T]


@functools.lru_cache(maxsize=64)
def _kernel(tokens: int, heads: int, block: int, interpret: bool) -> splash.SplashAttentionKernel:
    """Cached: reading a long mask takes seconds. The result stays in numpy, free of any device."""
    sizes, mask = splash.BlockSizes(*[block] * 8), masks.CausalMask((tokens, tokens))
    with jax.ensure_compile_time_eval():
        kernel = splash.make_splash_mha_single_device(
            masks.MultiHeadMask([mask] * heads), block_sizes=sizes, interpret=interpret
        )
        return jax.tree.map(np.asarray, kernel)
