"""Attention as the layouts of this project need it.

Legend (everywhere in models/): B prompts, G responses a prompt, R rows (B x G or B), T query tokens, S key tokens,
P patches, N heads, K kv heads, M = N / K query heads a kv head, H head dim, D width, L layers, V vocabulary.
Scores and softmax are float32; grouped heads are never repeated in memory.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

_MASKED = np.float32(np.finfo(np.float32).min)


class Prefix(NamedTuple):
    """Keys and values that the G rows of a group share (their prompt): computed once, never repeated."""

    keys_BxSxKxH: jax.Array
    values_BxSxKxH: jax.Array
    mask_BxS: jax.Array  # True where a prompt token is


def causal_mask(length: int) -> np.ndarray:
    """[1, T, T], True where a query may look. Rows are padded on the right, so causality hides padding too."""
    return np.tril(np.ones((1, length, length), bool))


def attend(
    q_RxTxNxH: jax.Array,
    k_RxSxKxH: jax.Array,
    v_RxSxKxH: jax.Array,
    mask: jax.Array | np.ndarray,
    prefix: Prefix | None = None,
) -> jax.Array:
    """Softmax attention of each row over [its group's prefix | its own keys]; returns [R, T, N, H].

    `mask` broadcasts to [R, T, S] and speaks of the own keys alone. Row r belongs to prompt r // G.
    A query with nothing to look at (padding) gets finite values that nobody reads.
    """
    R, T, N, H = q_RxTxNxH.shape
    K = k_RxSxKxH.shape[2]
    q = (q_RxTxNxH * np.asarray(H**-0.5, q_RxTxNxH.dtype)).reshape(R, T, K, N // K, H)
    scores = jnp.einsum("rtkmh,rskh->rkmts", q, k_RxSxKxH, preferred_element_type=jnp.float32)
    scores = jnp.where(jnp.asarray(mask)[:, None, None], scores, _MASKED)
    if prefix is None:
        weights = jax.nn.softmax(scores, axis=-1).astype(v_RxSxKxH.dtype)
        return jnp.einsum("rkmts,rskh->rtkmh", weights, v_RxSxKxH).reshape(R, T, N, H)

    B, S0 = prefix.mask_BxS.shape
    grouped = q.reshape(B, R // B, T, K, N // K, H)
    shared = jnp.einsum("bgtkmh,bskh->bgkmts", grouped, prefix.keys_BxSxKxH, preferred_element_type=jnp.float32)
    shared = jnp.where(prefix.mask_BxS[:, None, None, None, None], shared, _MASKED)
    scores = jnp.concatenate([shared.reshape(R, K, N // K, T, S0), scores], axis=-1)
    weights = jax.nn.softmax(scores, axis=-1).astype(v_RxSxKxH.dtype)
    of_prompt = weights[..., :S0].reshape(B, R // B, K, N // K, T, S0)
    out = jnp.einsum("rkmts,rskh->rtkmh", weights[..., S0:], v_RxSxKxH)
    out += jnp.einsum("bgkmts,bskh->bgtkmh", of_prompt, prefix.values_BxSxKxH).reshape(out.shape)
    return out.reshape(R, T, N, H)
