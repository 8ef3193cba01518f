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
    # jax refuses to differentiate cuDNN's attention at odd lengths; response rows have one token less than a bucket.
    q, k, v = (jnp.pad(x, ((0, 0), (0, T % 2), (0, 0), (0, 0))) for x in (q_AxTxNxH, k_AxTxKxH, v_AxTxKxH))
    return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation=implementation)[:, :T]


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

    def behind(own_TxNxH, prompt_SxNxH, length):
        return jax.lax.dynamic_update_slice_in_dim(
            jnp.pad(prompt_SxNxH, ((0, T), (0, 0), (0, 0))), own_TxNxH, length, 0
        )

    def each_row(own_RxTxNxH, prompt_BxSxNxH):
        own_BxGxTxNxH = own_RxTxNxH.reshape(B, R // B, T, *own_RxTxNxH.shape[2:])
        whole = jax.vmap(jax.vmap(behind, in_axes=(0, None, None)))(own_BxGxTxNxH, prompt_BxSxNxH, lengths_B)
        return whole.reshape(R, S + T, *own_RxTxNxH.shape[2:])

    nobody = jnp.zeros((B, S, *q_RxTxNxH.shape[2:]), q_RxTxNxH.dtype)
    q, k, v = each_row(q_RxTxNxH, nobody), each_row(k_RxTxKxH, keys_BxSxKxH), each_row(v_RxTxKxH, values_BxSxKxH)
    out = causal(q, k, v, implementation=implementation)
    start_R = jnp.repeat(lengths_B, R // B, total_repeat_length=R)
    return jax.vmap(lambda row, start: jax.lax.dynamic_slice_in_dim(row, start, T, 0))(out, start_R)


def segments(
    q_JxPxNxH: jax.Array, k_JxPxNxH: jax.Array, v_JxPxNxH: jax.Array, ids_JxP: jax.Array, *, interpret: bool = False
) -> jax.Array:
    """Each query sees the keys whose id (>= 0) is its own: [J, P, N, H]."""
    P, H = q_JxPxNxH.shape[1::2]
    extra = -P % _BLOCK
    q, k, v = (jnp.pad(x, ((0, 0), (0, extra), (0, 0), (0, 0))) for x in (q_JxPxNxH, k_JxPxNxH, v_JxPxNxH))
    ids = jnp.pad(ids_JxP.astype(jnp.int32), ((0, 0), (0, extra)), constant_values=-1)
    return mha(q, k, v, ids, sm_scale=H**-0.5, block_sizes=BlockSizes.get_default(), interpret=interpret)[:, :P]
