"""Attention on TPUs: jax's splash kernel, which holds no scores in memory and skips blocks that a static mask empties.

Axes: axes.py. Grouped heads and sequences of any length; a kernel is called for each row (vmap). Under a
mesh these functions belong inside shard_map, with rows and kv heads split in any way.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

_LANES = 128  # a block's length is a multiple of it


def causal(q_AxTxNxH: jax.Array, k_AxTxKxH: jax.Array, v_AxTxKxH: jax.Array, *, interpret: bool = False) -> jax.Array:
    """Each query sees the keys up to itself: [A, T, N, H]."""
    T = q_AxTxNxH.shape[1]
    block = _block(T)
    q, k, v = (_pad(x, block) for x in (q_AxTxNxH, k_AxTxKxH, v_AxTxKxH))
    return _splash(q, k, v, masks.CausalMask((q.shape[1], q.shape[1])), None, block, interpret)[:, :T]


def extend(
    q_RxTxNxH: jax.Array,
    k_RxTxKxH: jax.Array,
    v_RxTxKxH: jax.Array,
    keys_BxSxKxH: jax.Array,
    values_BxSxKxH: jax.Array,
    lengths_B: jax.Array,
    *,
    interpret: bool = False,
) -> jax.Array:
    """Each query sees its prompt's first `lengths_B` keys and its row's own up to itself: [R, T, N, H].

    One call a prompt: the queries of its G rows, one row after the other, against [prompt | own keys of every row]. The
    static mask leaves the blocks of other rows empty, so nothing is computed for them and no prompt is repeated.
    """
    R, T, N, H = q_RxTxNxH.shape
    B, S = keys_BxSxKxH.shape[:2]
    G, block = R // B, _block(min(S, T))
    # Every row padded by itself: blocks then never straddle two rows, and all diagonal blocks are the same one.
    q, k, v = (_pad(x, block) for x in (q_RxTxNxH, k_RxTxKxH, v_RxTxKxH))
    prompt_keys, prompt_values = (_pad(x, block) for x in (keys_BxSxKxH, values_BxSxKxH))
    width, prompt = q.shape[1], prompt_keys.shape[1]
    q, k, v = (x.reshape(B, G * width, *x.shape[2:]) for x in (q, k, v))
    k, v = jnp.concatenate([prompt_keys, k], axis=1), jnp.concatenate([prompt_values, v], axis=1)
    real = jnp.arange(prompt) < lengths_B[:, None]
    ids = splash.SegmentIds(
        q=jnp.ones((B, G * width), jnp.int32),
        kv=jnp.concatenate([real, jnp.ones((B, G * width), bool)], axis=1).astype(jnp.int32),
    )
    out = _splash(q, k, v, _GroupMask(prompt, G, width), ids, block, interpret)
    return out.reshape(R, width, N, H)[:, :T]


def segments(
    q_JxPxNxH: jax.Array, k_JxPxKxH: jax.Array, v_JxPxKxH: jax.Array, ids_JxP: jax.Array, *, interpret: bool = False
) -> jax.Array:
    """Each query sees the keys whose id (>= 0) is its own: [J, P, N, H]."""
    P = q_JxPxNxH.shape[1]
    block = _block(P)
    q, k, v = (_pad(x, block) for x in (q_JxPxNxH, k_JxPxKxH, v_JxPxKxH))
    ids = _pad(ids_JxP.astype(jnp.int32), block, -1)
    mask = masks.FullMask((q.shape[1], q.shape[1]))
    return _splash(q, k, v, mask, splash.SegmentIds(q=ids, kv=ids), block, interpret)[:, :P]


@dataclasses.dataclass(frozen=True)
class _GroupMask(masks.Mask):
    """Queries [rows x width] against keys [prompt | rows x width]: all of the prompt, and the own row up to itself."""

    prompt: int
    rows: int
    width: int

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows * self.width, self.prompt + self.rows * self.width

    def __getitem__(self, index: tuple[slice, slice]) -> np.ndarray:
        query, key = (np.arange(n)[part] for n, part in zip(self.shape, index, strict=True))
        query, own = query[:, None], key[None] - self.prompt
        return (own < 0) | ((own <= query) & (own // self.width == query // self.width))


def _block(length: int) -> int:
    """The longest block that pads the length by an eighth at most (or the shortest block)."""
    return next((b for b in (512, 384, 256) if -length % b <= length // 8), _LANES)


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
