"""Packed rows on NVIDIA GPUs: cuDNN's attention of ragged segments (Hopper or newer, 16-bit floats).

jax.nn does not offer it: jax 0.10.2 scales the offsets of keys by the heads of queries, which is wrong for grouped
heads (fixed by jax #39521), and gives no gradient of a log-sum-exp. So the primitives below it are bound here, with our
own offsets. They are private and may change with jax: `refusal` says so, and attention then takes another way.

Axes: axes.py; T tokens of rows laid end to end, M segments. Belongs inside shard_map.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax._src.cudnn import fused_attention_stablehlo as cudnn

from capcur_jax.models import packed as packed_lib
from capcur_jax.models.packed import Kernel, Limits, Packed, Spans

_MOST_HEAD = 128  # the longest heads that cuDNN differentiates on every such card
_CAPABILITY = 9.0  # Hopper's
_STATISTICS = 2**28  # bytes that a call's take at most, unless those of two segments a piece take more
_PRIMITIVES = ("_dot_product_attention_fwd_p", "_dot_product_attention_bwd_p")


def packed(
    q_AxTxNxH: jax.Array,
    k_AxTxKxH: jax.Array,
    v_AxTxKxH: jax.Array,
    layout: Packed,
    *,
    implementation: str = "cudnn",
) -> jax.Array:
    """Each token of a group sees its prompt and its own response up to itself: [A, T, N, H], 0 at padding.

    `implementation`: "cudnn", or "xla" for the same calls in plain XLA, of any float type.
    """
    return packed_lib.packed(_KERNELS[implementation], q_AxTxNxH, k_AxTxKxH, v_AxTxKxH, layout)


def segments(
    q_JxPxNxH: jax.Array,
    k_JxPxNxH: jax.Array,
    v_JxPxNxH: jax.Array,
    starts: jax.Array,
    lengths: jax.Array,
    longest: int,
    *,
    implementation: str = "cudnn",
) -> jax.Array:
    """Each patch sees its segment, as tables [J, I] say (packed.segments): [J, P, N, H], 0 at padding."""
    return packed_lib.segments(_KERNELS[implementation], q_JxPxNxH, k_JxPxNxH, v_JxPxNxH, starts, lengths, longest)


def refusal(tokens: int, heads: int, head: int) -> str:
    """Why cuDNN cannot serve rows of so many tokens in all on a device, with these heads; "" if it can."""
    if not all(hasattr(cudnn, name) for name in _PRIMITIVES):
        return f"jax {jax.__version__} has no {' and '.join(_PRIMITIVES)}"
    here = jax.local_devices() if jax.default_backend() == "gpu" else []
    if old := [device.device_kind for device in here if float(device.compute_capability) < _CAPABILITY]:
        return f"cuDNN's packed segments need a Hopper card or a newer one, not {old[0]}"
    if head % 8 or head > _MOST_HEAD:
        return f"cuDNN takes heads of a multiple of 8 up to {_MOST_HEAD}, not of {head}"
    if tokens * heads * head >= 2**31:
        return f"{tokens} tokens x {heads} heads x {head} are beyond cuDNN's 32-bit offsets"
    return ""


class _Tables(NamedTuple):
    """What cuDNN reads of segments: lengths in tokens, offsets in numbers from the arrays' beginnings.

    XLA cuts arrays of T tokens into `pieces` and lets cuDNN believe in as many segments a piece as all have together.
    Offsets count through, so pieces mean nothing, but that statistics and workspace are as long as one is.
    """

    query_lengths: jax.Array  # [pieces, M / pieces]
    key_lengths: jax.Array
    query_offsets: jax.Array  # [pieces, M / pieces + 1]; all offsets lie one behind the other, the end's after the last
    key_offsets: jax.Array


def pieces(tokens: int, longest: int) -> int:
    """Into how many equal pieces T tokens can be cut of which none is shorter than a segment."""
    return next(n for n in range(max(tokens // longest, 1), 0, -1) if tokens % n == 0)


def _tables(spans: Spans, cut: int, query_width: int, key_width: int) -> _Tables:
    M = spans.query_start.shape[0]
    each = max(-(-M // cut), 2)  # jax takes a single one for no segments at all

    def lengths(length_M):
        return jnp.pad(length_M, (0, cut * each - M)).reshape(cut, each)

    def offsets(start_M, length_M, width):
        # An absent segment lies behind the last present one: cuDNN's offsets never fall.
        ends = jax.lax.cummax(jnp.where(length_M > 0, start_M + length_M, 0))
        start_M = jnp.where(length_M > 0, start_M, jnp.pad(ends, (1, 0))[:-1])
        rest = jnp.broadcast_to(ends[-1], (cut * (each + 1) - M,))
        return (jnp.concatenate([start_M, rest]) * width).astype(jnp.int32).reshape(cut, each + 1)

    return _Tables(
        lengths(spans.query_length),
        lengths(spans.key_length),
        offsets(spans.query_start, spans.query_length, query_width),
        offsets(spans.key_start, spans.key_length, key_width),
    )


def _at_once(compute: Callable, q_TxNxH, spans: Spans, limits: Limits, keys: tuple[bool, ...]) -> tuple:
    """`compute(spans)`, of so many segments at once that their statistics stay small.

    They are float32 [segments, N, longest], whether segments are there or not, and rows of patches may have room for
    thousands of images. XLA's way is no way out: its scores take as much for every patch.

    Args:
        compute: gives arrays of T tokens; those that no segment covers may be anything.
        keys: of each array, whether its tokens are keys; else they are queries.
    """
    (T, N, _), M = q_TxNxH.shape, spans.query_start.shape[0]
    cut = pieces(T, max(limits.queries, limits.keys))
    parts = -(-M // (cut * max(2, _STATISTICS // (4 * T * N))))
    if parts == 1:
        return compute(spans)
    each = -(-M // parts)
    tables = Spans(*(jnp.pad(x, (0, parts * each - M)).reshape(parts, each) for x in spans))

    def step(found: tuple, part: Spans) -> tuple[tuple, None]:
        def with_part() -> tuple:
            query = packed_lib.members(part.query_start, part.query_length, T).any(-1)
            key = packed_lib.members(part.key_start, part.key_length, T).any(-1)
            masks = (key if of_key else query for of_key in keys)
            new = zip(masks, compute(part), found, strict=True)
            return tuple(jnp.where(m.reshape(T, *[1] * (x.ndim - 1)), x, before) for m, x, before in new)

        # The tables' ends are mostly empty.
        return jax.lax.cond(part.query_length.any(), with_part, lambda: found), None

    blank = jax.eval_shape(compute, jax.tree.map(lambda x: x[0], tables))
    return jax.lax.scan(step, tuple(jnp.zeros(x.shape, x.dtype) for x in blank), tables)[0]


def _cut(q_TxNxH, k_TxKxH, v_TxKxH, spans: Spans, limits: Limits):
    T, N, H = q_TxNxH.shape
    cut = pieces(T, max(limits.queries, limits.keys))
    tables = _tables(spans, cut, N * H, k_TxKxH.shape[1] * H)
    return [x.reshape(cut, T // cut, *x.shape[1:]) for x in (q_TxNxH, k_TxKxH, v_TxKxH)], tables


def _forward(call: Callable, q_TxNxH, k_TxKxH, v_TxKxH, spans: Spans, limits: Limits):
    T = q_TxNxH.shape[0]

    def compute(spans: Spans) -> tuple[jax.Array, jax.Array]:
        arrays, tables = _cut(q_TxNxH, k_TxKxH, v_TxKxH, spans, limits)
        out, statistics_MxNxT = call(*arrays, tables, limits.causal)
        member = packed_lib.members(spans.query_start, spans.query_length, T)
        segment = jnp.argmax(member, axis=-1)
        place = jnp.arange(T) - spans.query_start[segment]
        rows = statistics_MxNxT.swapaxes(1, 2)
        return out.reshape(q_TxNxH.shape), rows[segment, jnp.clip(place, 0, rows.shape[1] - 1)]

    return _at_once(compute, q_TxNxH, spans, limits, keys=(False, False))


def _backward(call: Callable, q_TxNxH, k_TxKxH, v_TxKxH, out_TxNxH, logsumexp_TxN, gradient_TxNxH, spans, limits):
    def compute(spans: Spans) -> tuple:
        arrays, tables = _cut(q_TxNxH, k_TxKxH, v_TxKxH, spans, limits)
        cut, longest = arrays[0].shape[:2]
        M = tables.query_lengths.size
        start = jnp.pad(spans.query_start, (0, M - spans.query_start.shape[0]))
        place = jnp.arange(longest)
        index = jnp.clip(start[:, None] + place, 0, q_TxNxH.shape[0] - 1)
        inside = place < tables.query_lengths.reshape(M, 1)
        statistics_MxNxT = jnp.where(inside[..., None], logsumexp_TxN[index], 0).swapaxes(1, 2)
        out, gradient = (x.reshape(cut, longest, *x.shape[1:]) for x in (out_TxNxH, gradient_TxNxH))
        found = call(*arrays, tables, limits.causal, statistics_MxNxT, out, gradient)
        return tuple(x.reshape(like.shape) for x, like in zip(found, (q_TxNxH, k_TxKxH, v_TxKxH), strict=True))

    return _at_once(compute, q_TxNxH, spans, limits, keys=(False, True, True))


# ---------------------------------------------------------------------- cuDNN


def _cudnn_options(head: int, causal: bool) -> dict:
    return {
        "scale": head**-0.5,
        "seed": 42,  # of a dropout that there is not
        "dropout_rate": 0.0,
        "variadic_args": (False, False),  # no bias, no gradient of one
        "mask_type": cudnn.MaskType.PADDING_CAUSAL if causal else cudnn.MaskType.PADDING,
        "layout": cudnn.AttentionLayout.BTNH.value,
        "sliding_window_length": None,
    }


def _cudnn_operands(q, k, v, tables: _Tables) -> list:
    bias, pages = jnp.zeros((0,), q.dtype), [jnp.zeros((0,), jnp.int32)] * 2
    return [q, k, v, bias, *tables, *pages]


def _cudnn_forward(q, k, v, tables: _Tables, causal: bool):
    options = _cudnn_options(q.shape[-1], causal)
    operands = _cudnn_operands(q, k, v, tables)
    return cudnn._dot_product_attention_fwd_p.bind(*operands, is_training=True, **options)


def _cudnn_backward(q, k, v, tables: _Tables, causal: bool, statistics_MxNxT, out, gradient):
    options = _cudnn_options(q.shape[-1], causal)
    operands = _cudnn_operands(q, k, v, tables)
    gradient = gradient.astype(q.dtype)
    return cudnn._dot_product_attention_bwd_p.bind(*operands, statistics_MxNxT, out, gradient, **options)


# ---------------------------------------------------------------------- the same in plain XLA


def _xla_segments(q, k, v, tables: _Tables, causal: bool):
    """Indices into the tokens [M, T] and whether they count, of queries and keys; scores [M, K, G, T, S]."""
    M, T = tables.query_lengths.size, q.shape[1]

    def of(lengths, offsets, width):
        index = offsets.reshape(-1)[:M, None] // width + jnp.arange(T)
        return index, jnp.arange(T) < lengths.reshape(M, 1)

    query = of(tables.query_lengths, tables.query_offsets, np.prod(q.shape[2:]))
    key = of(tables.key_lengths, tables.key_offsets, np.prod(k.shape[2:]))
    seen = query[1][:, :, None] & key[1][:, None, :]
    if causal:
        seen &= np.tril(np.ones((T, T), bool))
    q, k, v = _taken(q, query), _taken(k, key), _taken(v, key)
    q = q.reshape(M, T, k.shape[2], -1, q.shape[-1])
    scores = jnp.einsum("mtkgh,mskh->mkgts", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    return query, key, q, k, v, jnp.where(seen[:, None, None], scores, -jnp.inf)


def _taken(x, place):
    """Rows [M, T, heads, H] of the tokens of segments, 0 behind their ends."""
    index, inside = place
    tokens = x.reshape(-1, *x.shape[2:])
    return jnp.where(inside[..., None, None], tokens[jnp.where(inside, index, 0)], 0)


def _put(rows, place, like):
    """The inverse: tokens that no segment covers are NaN, since cuDNN leaves what was there before."""
    index, inside = place
    tokens = like.shape[0] * like.shape[1]
    empty = jnp.full((tokens, *like.shape[2:]), jnp.nan, like.dtype)
    rows = rows.reshape(*rows.shape[:2], *like.shape[2:]).astype(like.dtype)
    return empty.at[jnp.where(inside, index, tokens)].set(rows, mode="drop").reshape(like.shape)


def _xla_forward(q, k, v, tables: _Tables, causal: bool):
    query, _, _, _, values, scores = _xla_segments(q, k, v, tables, causal)
    statistics = jax.nn.logsumexp(scores, axis=-1)
    weights = jnp.exp(scores - jnp.where(statistics > -jnp.inf, statistics, 0)[..., None]).astype(v.dtype)
    out = jnp.einsum("mkgts,mskh->mtkgh", weights, values)
    return _put(out, query, q), statistics.reshape(statistics.shape[0], q.shape[2], -1)


def _xla_backward(q, k, v, tables: _Tables, causal: bool, statistics_MxNxT, out, gradient):
    query, key, queries, keys, values, scores = _xla_segments(q, k, v, tables, causal)
    M, T, K, G, H = queries.shape
    out, gradient = (_taken(x, query).reshape(M, T, K, G, H).astype(jnp.float32) for x in (out, gradient))
    weights = jnp.exp(scores - statistics_MxNxT.reshape(M, K, G, T, 1))
    of_weights = jnp.einsum("mtkgh,mskh->mkgts", gradient, values)
    mean = jnp.einsum("mtkgh,mtkgh->mkgt", gradient, out)
    of_scores = weights * (of_weights - mean[..., None]) * H**-0.5
    return (
        _put(jnp.einsum("mkgts,mskh->mtkgh", of_scores, keys), query, q),
        _put(jnp.einsum("mkgts,mtkgh->mskh", of_scores, queries), key, k),
        _put(jnp.einsum("mkgts,mtkgh->mskh", weights, gradient), key, v),
    )


def _kernel(forward: Callable, backward: Callable) -> Kernel:
    return Kernel(functools.partial(_forward, forward), functools.partial(_backward, backward))


_KERNELS = {"cudnn": _kernel(_cudnn_forward, _cudnn_backward), "xla": _kernel(_xla_forward, _xla_backward)}
