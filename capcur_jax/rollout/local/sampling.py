"""Choosing tokens: temperature, top-k, top-p, and a draw that takes one number a row."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from capcur_jax.axes import Array, Float, Int, Key, checked
from capcur_jax.rollout.engine import Sampling

_BLOCK = 64  # of the vocabulary, see `draw`


def allowed(logits_CxV: jax.Array, sampling: Sampling) -> jax.Array:
    """Logits with everything outside the `top_k` likeliest, then outside the smallest set of mass `top_p` of these, at
    -inf. The likeliest token always stays, and so do ties with the last one that does."""
    if sampling.top_p == 1 and not 0 < sampling.top_k < logits_CxV.shape[-1]:
        return logits_CxV
    order = jnp.sort(logits_CxV, axis=-1, descending=True)
    if sampling.top_k:
        order = jnp.where(jnp.arange(order.shape[-1]) < sampling.top_k, order, -jnp.inf)
    shares = jax.nn.softmax(order, axis=-1)
    kept = jnp.sum((jnp.cumsum(shares, axis=-1) - shares < sampling.top_p) & (shares > 0), axis=-1, keepdims=True)
    threshold = jnp.take_along_axis(order, kept - 1, axis=-1)
    return jnp.where(logits_CxV >= threshold, logits_CxV, -jnp.inf)


def draw(logits_CxV: jax.Array, uniform_C: jax.Array) -> jax.Array:
    """Tokens [C] with the probabilities of the logits: where the cumulated mass passes `uniform` in [0, 1) of it.

    One number for a row where Gumbel's way takes one for each logit, in two steps (a block of the vocabulary, then a
    token of it) because a long prefix sum is slow. A token of probability 0 is never drawn.
    """
    C, V = logits_CxV.shape
    mass = jnp.exp(logits_CxV - logits_CxV.max(-1, keepdims=True))
    mass = jnp.pad(mass, ((0, 0), (0, -V % _BLOCK))).reshape(C, -1, _BLOCK)
    until = jnp.cumsum(mass.sum(-1), axis=-1)
    target = uniform_C[:, None] * until[:, -1:]
    block = jnp.sum(until <= target, axis=-1, keepdims=True)
    before = jnp.where(block > 0, jnp.take_along_axis(until, jnp.maximum(block - 1, 0), axis=-1), 0.0)
    inside = jnp.take_along_axis(mass, block[:, :, None], axis=1)[:, 0]
    at = jnp.sum(before + jnp.cumsum(inside, axis=-1) <= target, axis=-1)
    # The block's tokens summed one by one may stay a rounding below its sum: then it is the last that has any mass.
    last = _BLOCK - 1 - jnp.argmax(inside[:, ::-1] > 0, axis=-1)
    return block[:, 0] * _BLOCK + jnp.minimum(at, last)


@checked
def sample_tokens(
    logits_CxV: Float[Array, "C V"], keys_C: Key[Array, " C"], sampling: Sampling
) -> tuple[Int[Array, " C"], Float[Array, " C"]]:
    """Tokens [C] and their log-probs [C] over the full softmax (not renormalised for top-p and top-k, as servers report
    it); each row draws with its own key."""
    scaled = logits_CxV / sampling.temperature if sampling.temperature else logits_CxV
    if sampling.temperature == 0:
        tokens = jnp.argmax(scaled, axis=-1)
    else:
        tokens = draw(allowed(scaled, sampling), jax.vmap(jax.random.uniform)(keys_C))
    chosen = jnp.take_along_axis(scaled, tokens[:, None], axis=-1)[:, 0]
    return tokens.astype(jnp.int32), chosen - jax.nn.logsumexp(scaled, axis=-1)
