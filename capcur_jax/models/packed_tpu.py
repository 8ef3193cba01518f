"""Packed rows on TPUs: jax's splash kernels, which visit only blocks that hold something to see.

Which blocks those are is found on the device, of the segments of the batch. splash's own entry points take maps that
are known before, or masks of all tokens by all tokens; so its three kernels are called here one by one, as they must be
for the merged gradient (packed.py), too. They are private and may change with jax: `refusal` says so, and attention
then takes another way.

Axes: axes.py; T tokens of rows laid end to end, M segments. Belongs inside shard_map.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_mask_info import MaskInfo

from capcur_jax.models import packed as packed_lib
from capcur_jax.models.packed import Kernel, Limits, Packed, Spans

_KERNELS = ("_splash_attention_forward", "_splash_attention_bwd_dq", "_splash_attention_bwd_dkv")
_NOT_A_KEY, _NOT_A_QUERY = -1, -2  # segment ids that equal no other


def packed(
    q_AxTxNxH: jax.Array,
    k_AxTxKxH: jax.Array,
    v_AxTxKxH: jax.Array,
    layout: Packed,
    *,
    interpret: bool = False,
) -> jax.Array:
    """Each token of a group sees its prompt and its own response up to itself: [A, T, N, H], 0 at padding."""
    return packed_lib.packed(_kernel(interpret), q_AxTxNxH, k_AxTxKxH, v_AxTxKxH, layout)


def segments(
    q_JxPxNxH: jax.Array,
    k_JxPxNxH: jax.Array,
    v_JxPxNxH: jax.Array,
    starts: jax.Array,
    lengths: jax.Array,
    longest: int,
    *,
    interpret: bool = False,
) -> jax.Array:
    """Each patch sees its segment, as tables [J, I] say (packed.segments): [J, P, N, H], 0 at padding."""
    return packed_lib.segments(_kernel(interpret), q_JxPxNxH, k_JxPxNxH, v_JxPxNxH, starts, lengths, longest)


def refusal() -> str:
    """Why splash cannot serve packed rows; "" if it can."""
    return "" if all(hasattr(splash, name) for name in _KERNELS) else f"jax {jax.__version__} has no {_KERNELS}"


@functools.cache
def _kernel(interpret: bool) -> Kernel:
    return Kernel(functools.partial(_forward, interpret), functools.partial(_backward, interpret))


# ---------------------------------------------------------------------- which blocks are visited


def block_of(tokens: int) -> int:
    """Tokens of a block: the most that pad T by an eighth at most (or the fewest)."""
    return next((b for b in (512, 384, 256) if -tokens % b <= tokens // 8), 128)


def widths(limits: Limits, block: int) -> tuple[int, int]:
    """Blocks that a block of queries looks at, at most, and blocks of queries that look at a block of keys."""

    def spanned(tokens: int) -> int:
        """Blocks that tokens with one neighbour outside can lie in, that neighbour's block included."""
        return -(-(tokens - 1) // block) + 1

    if limits.apart:
        # The prompt of the group that a block begins in, and the block itself, where other groups begin.
        return spanned(limits.keys) + 1, spanned(limits.keys + limits.queries)
    one = spanned(limits.queries)
    return (one, one) if limits.causal else (2 * one - 1,) * 2


def seen(spans: Spans, causal: bool, tokens: int, block: int) -> jax.Array:
    """Which blocks of queries see anything of which blocks of keys: bool [blocks, blocks]."""

    def touched(start_M, length_M):
        first = np.arange(0, tokens, block)[:, None]
        return ((start_M < first + block) & (start_M + length_M > first) & (length_M > 0)).astype(jnp.float32)

    both = touched(spans.query_start, spans.query_length) @ touched(spans.key_start, spans.key_length).T > 0
    return both & np.tril(np.ones(both.shape, bool)) if causal else both


def block_map(seen_blocks: jax.Array, width: int) -> tuple[jax.Array, jax.Array]:
    """For each row the numbers of its first `width` blocks, and whether there are so many: int32 [rows, width] each.

    Behind the last one it stays: nothing new is fetched there.
    """
    count = seen_blocks.sum(-1, dtype=jnp.int32)[:, None]
    order = jnp.arange(width, dtype=jnp.int32)
    wanted = jnp.minimum(order, jnp.maximum(count - 1, 0))
    found = (jnp.cumsum(seen_blocks, axis=-1, dtype=jnp.int32)[:, None] == wanted[..., None] + 1) & seen_blocks[:, None]
    return jnp.argmax(found, axis=-1).astype(jnp.int32), (order < count).astype(jnp.int32)


def _maps(spans: Spans, limits: Limits, tokens: int, block: int) -> tuple[MaskInfo, MaskInfo]:
    """Splash's maps: of a query's blocks (forward, queries' gradient) and of a key's (keys' and values' gradient)."""
    blocks = seen(spans, limits.causal, tokens, block)
    of_queries, of_keys = (min(width, blocks.shape[0]) for width in widths(limits, block))
    index = jnp.arange(tokens, dtype=jnp.int32) if limits.causal else None
    forward = [x[None] for x in block_map(blocks, of_queries)]
    backward = [x.T[None] for x in block_map(blocks.T, of_keys)]
    return tuple(
        MaskInfo(data_next=data, mask_next=None, block_mask=there, partial_mask_blocks=None, q_sequence=index)
        for data, there in (forward, backward)
    )


def _up_to_itself(query: jax.Array, key: jax.Array) -> jax.Array:
    return key <= query


def _ids(spans: Spans, tokens: int) -> splash.SegmentIds:
    def of(start_M, length_M, nobody):
        member = packed_lib.members(start_M, length_M, tokens)
        return jnp.where(member.any(-1), jnp.argmax(member, axis=-1), nobody).astype(jnp.int32)

    query = of(spans.query_start, spans.query_length, _NOT_A_QUERY)
    return splash.SegmentIds(q=query, kv=of(spans.key_start, spans.key_length, _NOT_A_KEY))


# ---------------------------------------------------------------------- the kernels


def _heads_first(x_TxNxH: jax.Array, block: int) -> jax.Array:
    padded = jnp.pad(x_TxNxH, ((0, -x_TxNxH.shape[0] % block),) + ((0, 0),) * (x_TxNxH.ndim - 1))
    return jnp.swapaxes(padded, 0, 1)


def _scaled(q_TxNxH: jax.Array) -> jax.Array:
    return q_TxNxH * np.asarray(q_TxNxH.shape[-1] ** -0.5, q_TxNxH.dtype)


def _forward(interpret: bool, q_TxNxH, k_TxKxH, v_TxKxH, spans: Spans, limits: Limits):
    T = q_TxNxH.shape[0]
    block = block_of(T)
    q, k, v = (_heads_first(x, block) for x in (_scaled(q_TxNxH), k_TxKxH, v_TxKxH))
    out, (logsumexp,) = splash._splash_attention_forward(
        _maps(spans, limits, q.shape[1], block)[0],
        q,
        k,
        v,
        _ids(spans, q.shape[1]),
        None,
        mask_value=splash.DEFAULT_MASK_VALUE,
        is_mqa=False,
        block_sizes=splash.BlockSizes(block, block),
        residual_checkpoint_name=None,
        save_residuals=True,
        mask_function=_up_to_itself if limits.causal else None,
        interpret=interpret,
    )
    return jnp.swapaxes(out, 0, 1)[:T], logsumexp.T[:T]


def _backward(
    interpret: bool, q_TxNxH, k_TxKxH, v_TxKxH, out_TxNxH, logsumexp_TxN, gradient_TxNxH, spans: Spans, limits: Limits
):
    T = q_TxNxH.shape[0]
    block = block_of(T)
    mean_TxN = jnp.einsum("tnh,tnh->tn", out_TxNxH.astype(jnp.float32), gradient_TxNxH.astype(jnp.float32))
    arrays = _scaled(q_TxNxH), k_TxKxH, v_TxKxH, logsumexp_TxN, gradient_TxNxH, mean_TxN
    q, k, v, logsumexp, gradient, mean = (_heads_first(x, block) for x in arrays)
    of_queries, of_keys = _maps(spans, limits, q.shape[1], block)
    operands = q, k, v, _ids(spans, q.shape[1]), None, logsumexp, gradient, mean
    layout = splash.QKVLayout.HEAD_DIM_MINOR
    common = {
        "bq": block,
        "bkv": block,
        "is_mqa": False,
        "mask_value": splash.DEFAULT_MASK_VALUE,
        "attn_logits_soft_cap": None,
        "q_layout": layout,
        "k_layout": layout,
        "v_layout": layout,
        "mask_function": _up_to_itself if limits.causal else None,
        "interpret": interpret,
    }
    _, of_k, of_v = splash._splash_attention_bwd_dkv(
        *operands, bkv_compute=block, use_fused_bwd_kernel=False, mask_info=of_keys, **common
    )
    of_q = splash._splash_attention_bwd_dq(*operands, mask_info=of_queries, **common)
    of_q, of_k, of_v = (jnp.swapaxes(x, 0, 1)[:T] for x in (of_q, of_k, of_v))
    return _scaled(of_q), of_k, of_v
