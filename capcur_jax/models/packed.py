"""Attention of packed rows by kernels that know segments alone (packed_gpu.py, packed_tpu.py).

A device row holds groups one behind the other, each as one run [prompt | response 1 | response 2 | ...]. A token sees
its group's prompt and its own response up to itself. No kernel has this mask, but two calls of one make it up (where
groups are prompts alone the first one is all):

    every prompt and every response, causal over itself
    the responses of each group, as one segment of queries, over all of their prompt

Their outputs are added in proportion to their sums of exponentials. The gradient is exact, too: a softmax's gradient
needs of its other keys only its output and its log-sum-exp, so each call's backward pass gets the merged ones.

Axes: axes.py. Rows are laid end to end here, T tokens in all, and M is segments. These functions belong inside
shard_map, with rows and kv heads split in any way.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Places(NamedTuple):
    """Where groups lie in packed rows: each as one run [prompt | response 1 | response 2 | ...], one behind the other.

    Response r of a row belongs to prompt r // (R // B) of the same row. Groups and responses lie in the order of their
    numbers; one that is absent has length 0. All int32; B and R are those of a row, R is 0 for prompts alone.
    """

    prompt_start: jax.Array  # [A, B]
    prompt_length: jax.Array  # [A, B]
    response_start: jax.Array  # [A, R]
    response_length: jax.Array  # [A, R]


class Packed(NamedTuple):
    """Packed rows: each token sees its group's prompt and its own response, up to itself."""

    places: Places
    prompt: int  # a bound on the tokens of a prompt
    response: int  # and of a response


class Spans(NamedTuple):
    """The segments of one call: the queries of segment m look at the keys of segment m. int32.

    Present ones are in the order of their tokens, and no two share a query or a key; an absent one has lengths of 0.
    """

    query_start: jax.Array  # [M]
    query_length: jax.Array  # [M]
    key_start: jax.Array  # [M]
    key_length: jax.Array  # [M]


class Limits(NamedTuple):
    """What is known of a call when it is compiled."""

    causal: bool  # queries and keys are the same tokens, and a query sees those up to itself
    apart: bool  # the keys lie before the queries; otherwise they are the same tokens
    queries: int  # of a segment, at most
    keys: int


class Kernel(NamedTuple):
    """A platform's way to compute one call.

    Outputs, log-sum-exps and gradients of tokens that no segment covers may be anything, NaN too.
    """

    forward: Callable  # (q_TxNxH, k_TxKxH, v_TxKxH, spans, limits) -> output [T, N, H], log-sum-exp [T, N] float32
    backward: Callable  # (q, k, v, output, log-sum-exp, gradient of output, spans, limits) -> gradients of q, k, v


def packed(
    kernel: Kernel, q_AxTxNxH: jax.Array, k_AxTxKxH: jax.Array, v_AxTxKxH: jax.Array, layout: Packed
) -> jax.Array:
    """Each token of a group sees its prompt and its own response up to itself: [A, T, N, H], 0 at padding."""
    A, T = q_AxTxNxH.shape[:2]
    places = layout.places
    B = places.prompt_start.shape[1]
    G = places.response_start.shape[1] // B
    base = T * jnp.arange(A, dtype=jnp.int32)[:, None]
    prompt, prompt_length = places.prompt_start + base, places.prompt_length
    response, response_length = (x.reshape(A, B, G) for x in (places.response_start + base, places.response_length))

    def in_order(of_prompt_AxB, of_response_AxBxG):
        return jnp.concatenate([of_prompt_AxB[..., None], of_response_AxBxG], axis=-1).reshape(-1)

    start, length = in_order(prompt, response), in_order(prompt_length, response_length)
    own = Spans(start, length, start, length)
    arrays = q_AxTxNxH, k_AxTxKxH, v_AxTxKxH
    alone = min(max(layout.prompt, layout.response), T)
    up_to_itself = Limits(True, False, alone, alone)
    if not G:
        return _rows(kernel, (up_to_itself,), arrays, (own,))
    responses = response_length.sum(-1)
    keys = jnp.where(responses > 0, prompt_length, 0)
    shared = Spans(*(x.reshape(-1) for x in (prompt + prompt_length, responses, prompt, keys)))
    limits = up_to_itself, Limits(False, True, min(G * layout.response, T), min(layout.prompt, T))
    return _rows(kernel, limits, arrays, (own, shared))


def segments(
    kernel: Kernel,
    q_JxPxNxH: jax.Array,
    k_JxPxNxH: jax.Array,
    v_JxPxNxH: jax.Array,
    starts: jax.Array,
    lengths: jax.Array,
    longest: int,
) -> jax.Array:
    """Each patch sees all patches of its segment: [J, P, N, H], 0 at padding.

    Args:
      starts: [J, I] int32, where the segments of a row begin, in their order.
      lengths: [J, I] int32, patches; 0 where there is none.
      longest: patches that a segment has at most.
    """
    J, P = q_JxPxNxH.shape[:2]
    start, length = (starts + P * jnp.arange(J, dtype=jnp.int32)[:, None]).reshape(-1), lengths.reshape(-1)
    limits = (Limits(False, False, min(longest, P), min(longest, P)),)
    return _rows(kernel, limits, (q_JxPxNxH, k_JxPxNxH, v_JxPxNxH), (Spans(start, length, start, length),))


def members(start_M: jax.Array, length_M: jax.Array, tokens: int) -> jax.Array:
    """Which of T tokens lie in which segments: bool [T, M]."""
    token = jnp.arange(tokens, dtype=jnp.int32)[:, None]
    return (token >= start_M) & (token < start_M + length_M)


def _rows(kernel: Kernel, limits: tuple[Limits, ...], arrays, spans: tuple[Spans, ...]) -> jax.Array:
    shape = arrays[0].shape
    return _attention(kernel, limits, *(x.reshape(-1, *x.shape[2:]) for x in arrays), spans).reshape(shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attention(kernel: Kernel, limits: tuple[Limits, ...], q_TxNxH, k_TxKxH, v_TxKxH, spans: tuple[Spans, ...]):
    return _forward(kernel, limits, q_TxNxH, k_TxKxH, v_TxKxH, spans)[0]


def _forward(kernel, limits, q_TxNxH, k_TxKxH, v_TxKxH, spans):
    T = q_TxNxH.shape[0]
    outs, sums = [], []
    for span, limit in zip(spans, limits, strict=True):
        out, logsumexp = kernel.forward(q_TxNxH, k_TxKxH, v_TxKxH, span, limit)
        inside = members(span.query_start, span.query_length, T).any(-1)
        outs.append(jnp.where(inside[:, None, None], out, 0).astype(jnp.float32))
        sums.append(jnp.where(inside[:, None], logsumexp, -jnp.inf))
    total = jax.nn.logsumexp(jnp.stack(sums), axis=0)
    total = jnp.where(total > -jnp.inf, total, 0)  # padding
    merged = sum(jnp.exp(one - total)[..., None] * out for one, out in zip(sums, outs, strict=True))
    out = jnp.asarray(merged).astype(q_TxNxH.dtype)
    return out, (q_TxNxH, k_TxKxH, v_TxKxH, spans, out, total)


def _backward(kernel, limits, residuals, gradient_TxNxH):
    q, k, v, spans, out, total = residuals
    T = q.shape[0]
    found = []
    for span, limit in zip(spans, limits, strict=True):
        gradients = kernel.backward(q, k, v, out, total, gradient_TxNxH, span, limit)
        query = members(span.query_start, span.query_length, T).any(-1)
        key = members(span.key_start, span.key_length, T).any(-1)
        masks = (query, key, key)
        found.append([jnp.where(m[:, None, None], x, 0) for m, x in zip(masks, gradients, strict=True)])
    summed = [sum(x.astype(jnp.float32) for x in xs) for xs in zip(*found, strict=True)]
    nothing = jax.tree.map(lambda x: np.zeros(x.shape, jax.dtypes.float0), spans)
    return (*(x.astype(like.dtype) for x, like in zip(summed, (q, k, v), strict=True)), nothing)


_attention.defvjp(_forward, _backward)
