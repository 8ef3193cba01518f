"""Attention on NVIDIA GPUs: cuDNN by way of jax.nn, and jax's Pallas kernel for segments, which cuDNN lacks there.

Legend: models/attention.py. 16-bit floats only (cuDNN's condition), grouped heads (but for segments, which vision towers
alone use: they have none). Scores are never held in memory.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.gpu.attention import BlockSizes, mha

_BLOCK = 128  # the Pallas kernel's sequences are multiples of it


def causal(
    q_RxTxNxH: jax.Array, k_RxTxKxH: jax.Array, v_RxTxKxH: jax.Array, *, implementation: str = "cudnn"
) -> jax.Array:
    """Each query sees the keys up to itself: [R, T, N, H]."""
    return jax.nn.dot_product_attention(
        q_RxTxNxH, k_RxTxKxH, v_RxTxKxH, is_causal=True, implementation=implementation
    )


def extend(
    q_RxTxNxH: jax.Array,
    k_RxTxKxH: jax.Array,
    v_RxTxKxH: jax.Array,
    keys_BxSxKxH: jax.Array,
    values_BxSxKxH: jax.Array,
    lengths_B: jax.Array,
    *,
    implementation: str = "cudnn",
) -> jax.Array:
    """Each query sees its prompt's first `lengths_B` keys and its row's own up to itself: [R, T, N, H].

    Every row is written right behind its own copy of its prompt: causality is then the whole mask. Any other mask would
    be a bias of T x (S + T) a row for cuDNN, which reads and differentiates all of it, and adding up two calls (prompt,
    own) needs gradients by the log-sum-exp that jax doesn't have. The price is a copy of the prompt's keys a row and
    queries of zero in front of each row.
    """
    B, S = keys_BxSxKxH.shape[:2]
    R, T = q_RxTxNxH.shape[:2]

    def behind(own, prompt, length):
        return jax.lax.dynamic_update_slice_in_dim(jnp.pad(prompt, ((0, T), (0, 0), (0, 0))), own, length, 0)

    def per_row(function, *in_axes):
        return jax.vmap(jax.vmap(function, in_axes=in_axes))

    rows = lambda x: x.reshape(B, R // B, *x.shape[1:])  # noqa: E731
    k = per_row(behind, 0, None, None)(rows(k_RxTxKxH), keys_BxSxKxH, lengths_B)
    v = per_row(behind, 0, None, None)(rows(v_RxTxKxH), values_BxSxKxH, lengths_B)
    nobody = jnp.zeros((B, S, *q_RxTxNxH.shape[2:]), q_RxTxNxH.dtype)
    q = per_row(behind, 0, None, None)(rows(q_RxTxNxH), nobody, lengths_B)
    q, k, v = (x.reshape(R, S + T, *x.shape[3:]) for x in (q, k, v))
    out = rows(causal(q, k, v, implementation=implementation))
    cut = lambda x, length: jax.lax.dynamic_slice_in_dim(x, length, T, 0)  # noqa: E731
    return per_row(cut, 0, None)(out, lengths_B).reshape(q_RxTxNxH.shape)


def segments(
    q_RxPxNxH: jax.Array, k_RxPxNxH: jax.Array, v_RxPxNxH: jax.Array, ids_RxP: jax.Array, *, interpret: bool = False
) -> jax.Array:
    """Each query sees the keys whose id (>= 0) is its own: [R, P, N, H]."""
    P, H = q_RxPxNxH.shape[1::2]
    extra = -P % _BLOCK
    q, k, v = (jnp.pad(x, ((0, 0), (0, extra), (0, 0), (0, 0))) for x in (q_RxPxNxH, k_RxPxNxH, v_RxPxNxH))
    ids = jnp.pad(ids_RxP.astype(jnp.int32), ((0, 0), (0, extra)), constant_values=-1)
    return mha(q, k, v, ids, sm_scale=H**-0.5, block_sizes=BlockSizes.get_default(), interpret=interpret)[:, :P]
