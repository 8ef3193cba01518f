"""Attention of prompt rows on NVIDIA GPUs: cuDNN by way of jax.nn.

Axes: axes.py. 16-bit floats only (cuDNN's condition). Heads may be grouped. Scores are never held in memory.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def causal(
    q_AxTxNxH: jax.Array, k_AxTxKxH: jax.Array, v_AxTxKxH: jax.Array, *, implementation: str = "cudnn"
) -> jax.Array:
    """Each query sees the keys up to itself: [A, T, N, H]."""
    T = q_AxTxNxH.shape[1]
    # jax refuses to differentiate cuDNN's attention at odd lengths.
    q, k, v = (jnp.pad(x, ((0, 0), (0, T % 2), (0, 0), (0, 0))) for x in (q_AxTxNxH, k_AxTxKxH, v_AxTxKxH))
    return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation=implementation)[:, :T]
