"""Log-probabilities of tokens under the model, the same function for every pass that needs them.

Holds float32 logits [tokens, vocabulary]: fine for a small vocabulary or short rows, not yet for the 8B run's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class TokenLogprobs(NamedTuple):
    logprobs: jax.Array  # [...] of the given tokens
    entropy: jax.Array  # [...] of the whole distribution, in nats


def ban(logits: jax.Array, banned: Sequence[int]) -> jax.Array:
    """Logits with -inf at tokens that may not be sampled: in every pass, or sampler and trainer would disagree."""
    if not banned:
        return logits
    allowed = np.ones(logits.shape[-1], bool)
    allowed[list(banned)] = False
    return jnp.where(allowed, logits, -jnp.inf)


def token_logprobs(
    logits: jax.Array, tokens: jax.Array, temperature: float = 1.0, banned: Sequence[int] = ()
) -> TokenLogprobs:
    """Log-probs of `tokens` [...] under softmax(logits [..., V] / temperature) with banned tokens left out.

    Every pass (sampler, old, reference, policy) divides by the same temperature (TRL #3029).
    """
    scaled = ban(logits.astype(jnp.float32) / temperature, banned)
    logprobs = scaled - jax.nn.logsumexp(scaled, axis=-1, keepdims=True)
    chosen = jnp.take_along_axis(logprobs, tokens[..., None], axis=-1)[..., 0]
    # A banned token adds nothing to the entropy. Its -inf is replaced before the product: 0 x -inf is NaN, and a
    # `where` around the product would keep that NaN in the gradient.
    entropy = -(jnp.exp(logprobs) * jnp.where(jnp.isneginf(logprobs), 0.0, logprobs)).sum(-1)
    return TokenLogprobs(chosen, entropy)
