"""Advantages and losses: pure functions of arrays, no model in sight.

Axes: B prompts, G responses a prompt, R = B x G rows, T response tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

# The release clamps both: a log-ratio that has run away must not overflow the loss.
LOG_RATIO_CLAMP = 20.0
KL_CLAMP = 10.0


class PolicyTerms(NamedTuple):
    """Per-token values [R, T]; what is averaged over the mask is up to the caller."""

    loss: jax.Array
    clipped: jax.Array  # True where the clip binds
    ratio: jax.Array


def group_advantages(rewards_BxG: jax.Array, epsilon: float = 1e-6) -> jax.Array:
    """(r - mean) / (std + epsilon) inside each group, with the sample std (n - 1); [B, G].

    A group of equal rewards teaches nothing and gets exactly 0: in float32 five times 0.9 would give 0.056.
    """
    if rewards_BxG.shape[1] < 2:
        raise ValueError("a group needs at least two responses: set config.rollout.group >= 2")
    mean = rewards_BxG.mean(axis=1, keepdims=True)
    std = rewards_BxG.std(axis=1, ddof=1, keepdims=True)
    equal = rewards_BxG.max(axis=1, keepdims=True) == rewards_BxG.min(axis=1, keepdims=True)
    return jnp.where(equal, 0.0, (rewards_BxG - mean) / (std + epsilon))


def policy_loss(
    logprobs_RxT: jax.Array,
    old_logprobs_RxT: jax.Array,
    advantages_R: jax.Array,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.3,
    clip_dual: float = 3.0,
) -> PolicyTerms:
    """PPO's clipped objective with separate bounds, and a floor on what a negative advantage may cost (dual clip)."""
    log_ratio = jnp.clip(logprobs_RxT - old_logprobs_RxT, -LOG_RATIO_CLAMP, LOG_RATIO_CLAMP)
    ratio, advantage = jnp.exp(log_ratio), advantages_R[:, None]
    unclipped = -advantage * ratio
    bounded = -advantage * jnp.clip(ratio, 1.0 - clip_low, 1.0 + clip_high)
    pessimistic = jnp.maximum(unclipped, bounded)
    dual = jnp.minimum(pessimistic, -advantage * clip_dual)
    loss = jnp.where(advantage < 0, dual, pessimistic)
    clipped = (bounded > unclipped) | ((advantage < 0) & (dual < pessimistic))
    return PolicyTerms(loss, clipped, ratio)


def k3_divergence(logprobs_RxT: jax.Array, reference_logprobs_RxT: jax.Array) -> jax.Array:
    """Schulman's k3 estimate of KL(policy || reference), per token, clamped as in the release; [R, T].

    As a loss its gradient is biased (TRL #4638); the paper uses it, so it is the default here.
    """
    log_ratio = jnp.clip(reference_logprobs_RxT - logprobs_RxT, -LOG_RATIO_CLAMP, LOG_RATIO_CLAMP)
    return jnp.clip(jnp.exp(log_ratio) - log_ratio - 1.0, -KL_CLAMP, KL_CLAMP)


def token_mean(values_RxT: jax.Array, mask_RxT: jax.Array, tokens: jax.Array | float | None = None) -> jax.Array:
    """Sum over the mask divided by `tokens`, the response tokens of the whole global mini-batch (default: the mask's).

    Masked values never count, not even when they are not finite.
    """
    total = mask_RxT.sum() if tokens is None else tokens
    return jnp.where(mask_RxT, values_RxT, 0.0).sum() / jnp.maximum(total, 1)


def response_mask(lengths_R: jax.Array, length: int) -> jax.Array:
    """[R, T], True at response tokens. From the returned lengths, never from `!= pad` (the pad token may end a row)."""
    return jnp.arange(length)[None] < lengths_R[:, None]
