"""Attention on NVIDIA GPUs: cuDNN by way of jax.nn, and jax's Pallas kernel for segments, which cuDNN lacks there.

Axes: axes.py. 16-bit floats only (cuDNN's condition). Heads may be grouped, except for
segments: only vision towers use those, and theirs are not grouped. Scores are never held in memory. jax splits cuDNN's
calls over a mesh by itself; the Pallas kernel belongs inside shard_map.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.gpu.attention import BlockSizes, mha

_BLOCK = 128  # the Pallas kernel's sequences are multiples of it


def causal(
    q_AxTxNxH: jax.Array, k_AxTxKxH: jax.Array, v_AxTxKxH: jax.Array, *, implementation: str = "cudnn"
) -> jax.Array:
    """Each query sees the keys up to itself: [A, T, N, H]."""
    T = q_AxTxNxH.shape[1]
    # jax refuses to differentiate cuDNN's attention at odd lengths.
    q, k, v = (jnp.pad(x, ((0, 0), (0, T % 2), (0, 0), (0, 0))) for x in (q_AxTxNxH, k_AxTxKxH, v_AxTxKxH))
    return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation=implementation)[:, :T]


def segments(
    q_JxPxNxH: jax.Array, k_JxPxNxH: jax.Array, v_JxPxNxH: jax.Array, ids_JxP: jax.Array, *, interpret: bool = False
) -> jax.Array:
    """Each query sees the keys whose id (>= 0) is its own: [J, P, N, H]."""
    P, H = q_JxPxNxH.shape[1::2]
    extra = -P % _BLOCK
    q, k, v = (jnp.pad(x, ((0, 0), (0, extra), (0, 0), (0, 0))) for x in (q_JxPxNxH, k_JxPxNxH, v_JxPxNxH))
    ids = jnp.pad(ids_JxP.astype(jnp.int32), ((0, 0), (0, extra)), constant_values=-1)
    return mha(q, k, v, ids, sm_scale=H**-0.5, block_sizes=BlockSizes.get_default(), interpret=interpret)[:, :P]
