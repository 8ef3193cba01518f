"""The objectives in one table, and what they are made of: advantages, per-token losses, the weights that add them up.

Pure functions of arrays, no model in sight. A new objective is its loss here and its line in OBJECTIVES. Axes: axes.py.

The loss of a global mini-batch is sum_r weight_r x sum_t loss_rt, with `row_weights` from the host and the inner sum by
`masked_sum`. It therefore adds up over micro-batches, processes and devices, however the rows are split.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from capcur_jax.axes import Array, Bool, Float, Int, checked
from capcur_jax.errors import InputError
from capcur_jax.learner.packing import Responses
from capcur_jax.models.logprobs import TokenLogprobs
from capcur_jax.schedule import Stage

# The release clamps both: a log-ratio that has run away must not overflow the loss.
LOG_RATIO_CLAMP = 20.0
KL_CLAMP = 10.0

RATIO_LEVELS = ("token", "sequence")
KL_ESTIMATORS = ("k1", "k2", "k3", "k3_unbiased", "none")
SAMPLER_CORRECTIONS = ("none", "truncate", "mask")
AGGREGATIONS = ("token", "sequence", "constant")


class PolicyTerms(NamedTuple):
    """Per-token values [R, T]; outside the mask the loss is 0, no clip binds and the ratio is 1."""

    loss: jax.Array
    clipped_low: jax.Array  # True where the lower bound binds (negative advantage)
    clipped_high: jax.Array  # True where the upper bound binds (positive advantage)
    clipped_dual: jax.Array  # True where the dual clip binds (negative advantage)
    ratio: jax.Array


@checked
def group_advantages(
    rewards_BxG: Float[Array, "B G"], epsilon: float = 1e-6, normalise: bool = True
) -> Float[Array, "B G"]:
    """(r - mean) / (std + epsilon) inside each group, with the sample std (n - 1); [B, G].

    `normalise=False` is r - mean (Dr.GRPO, arXiv:2503.20783: the std weighs easy and hard prompts up). Either way a
    group of equal rewards teaches nothing and gets exactly 0: in float32 five times 0.9 would give 0.056.
    Raises InputError for a group of one.
    """
    if rewards_BxG.shape[1] < 2:
        raise InputError("a group needs at least two responses: set config.rollout.group >= 2")
    advantages = rewards_BxG - rewards_BxG.mean(axis=1, keepdims=True)
    if normalise:
        advantages = advantages / (rewards_BxG.std(axis=1, ddof=1, keepdims=True) + epsilon)
    equal = rewards_BxG.max(axis=1, keepdims=True) == rewards_BxG.min(axis=1, keepdims=True)
    return jnp.where(equal, 0.0, advantages)


@checked
def policy_terms(
    logprobs_RxT: Float[Array, "R T"],
    old_logprobs_RxT: Float[Array, "R T"],
    advantages_R: Float[Array, " R"],
    mask_RxT: Bool[Array, "R T"],
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.3,
    clip_dual: float = 3.0,
    level: str = "token",
) -> PolicyTerms:
    """PPO's clipped objective with separate bounds, and a cap on the ratio of a negative advantage (dual clip,
    arXiv:1912.09729; `clip_dual=0`: none).

    `level="token"`: each token has its own ratio policy / old. `level="sequence"`: all tokens of a row share
    s = exp(mean over the row's mask of log policy - log old), with the gradient through it (GSPO, arXiv:2507.18071,
    with bounds 3e-4 and 4e-4, no dual clip and aggregation "sequence"). The clips are static numbers.
    No gradient reaches the old log-probs; values outside the mask are never looked at. Raises InputError.
    """
    _choice("ratio level", level, RATIO_LEVELS)
    if clip_dual and clip_dual <= 1.0:
        raise InputError(f"config.objective.clip_dual={clip_dual} must be above 1, or 0 for no dual clip")
    log_ratio = _log_ratio(logprobs_RxT, jax.lax.stop_gradient(old_logprobs_RxT), mask_RxT)
    if level == "sequence":
        mean_R = log_ratio.sum(axis=1) / jnp.maximum(mask_RxT.sum(axis=1), 1)
        log_ratio = jnp.where(mask_RxT, mean_R[:, None], 0.0)
    ratio, advantage = jnp.exp(_clamp(log_ratio)), advantages_R[:, None]
    # The same as max and min over the three products, but at a tie their gradient would be half of each.
    low = mask_RxT & (advantage < 0) & (ratio < 1.0 - clip_low)
    high = mask_RxT & (advantage > 0) & (ratio > 1.0 + clip_high)
    dual = mask_RxT & (advantage < 0) & (ratio > clip_dual) & bool(clip_dual)
    used = jnp.where(low, 1.0 - clip_low, jnp.where(high, 1.0 + clip_high, jnp.where(dual, clip_dual, ratio)))
    return PolicyTerms(jnp.where(mask_RxT, -advantage * used, 0.0), low, high, dual, ratio)


@checked
def divergence(
    estimator: str,
    logprobs_RxT: Float[Array, "R T"],
    reference_logprobs_RxT: Float[Array, "R T"] | None,
    old_logprobs_RxT: Float[Array, "R T"] | None = None,
    mask_RxT: Bool[Array, "R T"] | None = None,
) -> Float[Array, "R T"]:
    """Estimate of KL(policy || reference), per sampled token; [R, T], 0 outside the mask.

    With d = log policy - log reference (http://joschu.net/blog/kl-approx.html), and the samples held fixed as a
    trainer holds them:

    - "k1": d. Its mean is the KL; as a loss its mean gradient is 0 on policy, so it only measures.
    - "k2": d^2 / 2. Its mean isn't the KL, but its mean gradient is the KL's on policy (old = policy).
    - "k3": exp(-d) + d - 1 with the release's clamps, the paper's. Its mean is the KL; as a loss its mean gradient is
      that of KL(reference || policy) (TRL #4638).
    - "k3_unbiased": policy / old x k3, differentiated through the ratio too (DeepSeek-V3.2, arXiv:2512.02556, eq. 7):
      value and gradient are the KL's, off policy as well, as long as no clamp binds.
    - "none": 0.

    Only "k3_unbiased" needs the old log-probs; "none" needs no reference. No gradient reaches either. With a mask,
    non-finite log-probs of padding reach neither value nor gradient; without one the caller has cut them out.
    Raises InputError.
    """
    _choice("KL estimator", estimator, KL_ESTIMATORS)
    if estimator == "none":
        return jnp.zeros_like(logprobs_RxT)
    mask_RxT = jnp.ones(logprobs_RxT.shape, bool) if mask_RxT is None else mask_RxT
    difference = _log_ratio(logprobs_RxT, jax.lax.stop_gradient(reference_logprobs_RxT), mask_RxT)
    if estimator == "k1":
        return difference
    if estimator == "k2":
        return difference**2 / 2
    log_ratio = _clamp(-difference)
    k3 = jnp.clip(jnp.exp(log_ratio) - log_ratio - 1.0, -KL_CLAMP, KL_CLAMP)
    if estimator == "k3":
        return k3
    return jnp.exp(_clamp(_log_ratio(logprobs_RxT, jax.lax.stop_gradient(old_logprobs_RxT), mask_RxT))) * k3


@checked
def importance_weights(
    old_logprobs_RxT: Float[Array, "R T"],
    sampler_logprobs_RxT: Float[Array, "R T"],
    mask_RxT: Bool[Array, "R T"],
    *,
    mode: str,
    cap: float,
    level: str = "token",
) -> Float[Array, "R T"]:
    """What a token's policy loss is multiplied by because the sampler isn't quite the trainer's old policy; [R, T].

    With w = old / sampler: "truncate" is min(w, cap) (TIS, https://fengyao.notion.site/off-policy-rl; TRL's
    `*_truncate`), "mask" is w inside [1 / cap, cap] and 0 outside (IcePop's two-sided band, as in verl's
    rollout_corr_helper with "lower_upper"; AReaL and TRL's `*_mask` only have the upper side), "none" is 1.
    `level="sequence"`: w is the product over the row, clamped in log space to +-20 before the exponential, for all
    tokens of the row (verl's `rollout_is="sequence"`: unbiased where the geometric mean isn't, and of high variance).
    What is masked to 0 still counts in the denominators of `row_weights`, as in IcePop and verl.
    Never differentiated; 1 outside the mask, whatever lies there. Raises InputError.
    """
    _choice("sampler correction", mode, SAMPLER_CORRECTIONS)
    _choice("level of the sampler correction", level, RATIO_LEVELS)
    if mode == "none":
        return jnp.ones(old_logprobs_RxT.shape, jnp.float32)
    if cap < 1.0:
        raise InputError(f"the cap on the sampler's importance weights is {cap}; set at least 1 in config.objective")
    log_ratio = _log_ratio(old_logprobs_RxT, sampler_logprobs_RxT, mask_RxT)
    if level == "sequence":
        log_ratio = jnp.broadcast_to(log_ratio.sum(axis=1, keepdims=True), log_ratio.shape)
    weights = jnp.exp(_clamp(log_ratio))
    if mode == "truncate":
        weights = jnp.minimum(weights, cap)
    else:  # "outside" rather than "not inside": NaN stays NaN and its update is skipped, not silently thinned
        weights = jnp.where((weights < 1.0 / cap) | (weights > cap), 0.0, weights)
    return jax.lax.stop_gradient(jnp.where(mask_RxT, weights, 1.0))


@checked
def row_weights(
    lengths_R: Int[np.ndarray, " R"],
    counted_R: Bool[np.ndarray, " R"],
    aggregation: str,
    *,
    total_tokens: int,
    total_rows: int,
    constant_length: int,
) -> Float[np.ndarray, " R"]:
    """What a row's summed token losses are multiplied by in the global mini-batch's loss; [R] float32, on the host.

    - "token": 1 / total_tokens, the paper's (DAPO; TRL "dapo", verl "token-mean").
    - "sequence": 1 / (length x total_rows) (GRPO as first written; TRL "grpo", verl "seq-mean-token-mean").
    - "constant": 1 / (constant_length x total_rows) (Dr.GRPO; TRL "dr_grpo", verl "seq-mean-token-sum-norm"); the
      constant is the longest response allowed, never that of the batch.

    Rows not counted (truncated responses that are masked out, padding rows) weigh 0. The totals are those of the
    counted rows of the whole global mini-batch, in any other process too (TRL #6369). Raises InputError.
    """
    _choice("aggregation", aggregation, AGGREGATIONS)
    lengths, rows = lengths_R.astype(np.float64), max(total_rows, 1)
    if aggregation == "token":
        weights = np.full(lengths.shape, 1.0 / max(total_tokens, 1))
    elif aggregation == "sequence":
        weights = 1.0 / (np.maximum(lengths, 1) * rows)
    elif constant_length < 1:
        raise InputError(f"the constant of aggregation 'constant' is {constant_length} tokens; set at least 1")
    else:
        weights = np.full(lengths.shape, 1.0 / (constant_length * rows))
    return np.where(counted_R, weights, 0.0).astype(np.float32)


@checked
def masked_sum(values_RxT: Float[Array, "R T"], mask_RxT: Bool[Array, "R T"]) -> Float[Array, " R"]:
    """Sum over the tokens of each row's mask; [R]. What is masked out never counts, not even NaN, nor gets gradient."""
    return jnp.where(mask_RxT, values_RxT, 0.0).sum(axis=1)


@checked
def response_mask(lengths_R: Int[Array, " R"], length: int) -> Bool[Array, "R T"]:
    """[R, T], True at response tokens. From the returned lengths, never from `!= pad` (the pad token may end a row)."""
    return jnp.arange(length)[None] < lengths_R[:, None]


def _log_ratio(logprobs: jax.Array, other: jax.Array, mask: jax.Array) -> jax.Array:
    """0 outside the mask, cut before anything non-linear: 0 x NaN further on would be the gradient of everything."""
    return jnp.where(mask, logprobs - other, 0.0)


def _clamp(log_ratio: jax.Array) -> jax.Array:
    return jnp.clip(log_ratio, -LOG_RATIO_CLAMP, LOG_RATIO_CLAMP)


def _choice(what: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise InputError(f"{what} {value!r} doesn't exist; choose one of {', '.join(choices)} in config.objective")


# ---------------------------------------------------------------------- the table

Losses = tuple[jax.Array, dict[str, jax.Array]]


def grpo_loss(responses: Responses, new: TokenLogprobs, mask_RxT: jax.Array, settings: ConfigDict) -> Losses:
    """The clipped policy loss with the group's advantages, the KL to the reference and the entropy bonus."""

    # Padding is cut out before the losses, not only after: a banned pad token has log-prob -inf, and 0 x NaN of its
    # ratio would be the gradient of everything.
    def seen(logprobs):
        return jnp.where(mask_RxT, logprobs, 0.0)

    logprobs, sampler = seen(new.logprobs), seen(responses.sampler_logprobs)
    # Where the policy has made no update since the samples it is the old one, in whatever precision: its own log-probs,
    # not those of another program, whose ratios would be 1 but for rounding (verl #6280).
    old = jax.lax.stop_gradient(logprobs)
    if responses.old_logprobs is not None:
        earlier = seen(responses.old_logprobs)
        old = earlier if responses.own is None else jnp.where(responses.own[:, None], old, earlier)
    terms = policy_terms(
        logprobs,
        old,
        responses.advantages,
        mask_RxT,
        clip_low=settings.clip_low,
        clip_high=settings.clip_high,
        clip_dual=settings.clip_dual,
        level=settings.ratio,
    )
    correction = importance_weights(
        old,
        sampler,
        mask_RxT,
        mode=settings.sampler_correction,
        cap=settings.sampler_cap,
        level=settings.sampler_level,
    )
    loss = terms.loss * correction
    difference = jnp.abs(old - sampler)
    values = {
        "entropy": new.entropy,
        "clip_fraction": terms.clipped_low | terms.clipped_high | terms.clipped_dual,
        "clip_fraction_low": terms.clipped_low,
        "clip_fraction_high": terms.clipped_high,
        "clip_fraction_dual": terms.clipped_dual,
        "logprob_difference_mean": difference,
        "logprob_difference_max": difference,
    }
    if settings.sampler_correction != "none":
        values["sampler_weight"] = correction
    if responses.reference_logprobs is not None:
        reference = seen(responses.reference_logprobs)
        values["kl"] = divergence(settings.kl_estimator, logprobs, reference, old, mask_RxT)
        loss = loss + settings.kl_coefficient * values["kl"]
    if settings.entropy_coefficient:
        loss = loss - settings.entropy_coefficient * new.entropy
    return loss, {**values, "policy_loss": terms.loss}


def sft_loss(responses: Responses, new: TokenLogprobs, mask_RxT: jax.Array, settings: ConfigDict) -> Losses:
    """The negative log-prob of the target's tokens."""
    return -new.logprobs, {"token_accuracy": new.greedy, "entropy": new.entropy}


class Objective(NamedTuple):
    """A way to learn from responses.

    loss: (responses, log-probs of their tokens under the trained policy, mask [R, T], config.objective) -> per-token
        loss [R, T] and, for the metrics, per-token values [R, T] by name. Outside the mask neither counts. The records
        have a value's mean over the tokens, or its maximum where the name ends with _max.
    sampled: True where the rows are the policy's own samples, with rewards and advantages; False where they are targets
        to imitate.
    """

    loss: Callable[[Responses, TokenLogprobs, jax.Array, ConfigDict], Losses]
    sampled: bool


OBJECTIVES: dict[str, Objective] = {
    "grpo": Objective(grpo_loss, sampled=True),
    "sft": Objective(sft_loss, sampled=False),
}


def of_stage(stage: Stage) -> Objective:
    """The stage's objective. Raises InputError where the table has none of that name."""
    if stage.objective not in OBJECTIVES:
        raise InputError(
            f"config.stages.{stage.name}.objective = {stage.objective!r}; choose one of {', '.join(OBJECTIVES)}"
        )
    return OBJECTIVES[stage.objective]
