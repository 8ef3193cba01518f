"""The compiled steps of training: log-probs under given parameters, and one update. Programs are compiled ahead of time
for every declared shape and shared by all stages that differ in numbers alone."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from ml_collections import ConfigDict

from capcur_jax import objectives
from capcur_jax.data.packing import UpdateBatch
from capcur_jax.errors import InputError
from capcur_jax.models.logprobs import TokenLogprobs, token_logprobs
from capcur_jax.models.qwen_vl import QwenVL
from capcur_jax.programs import Programs


class TrainState(NamedTuple):
    parameters: nnx.State
    optimizer: Any
    skipped: jax.Array  # updates left out because loss or gradient was not finite


def frozen_labels(parameters: nnx.State, pattern: str) -> nnx.State:
    """ "frozen" for every parameter whose dotted path the regular expression finds, "trained" for the others."""
    try:
        found = re.compile(pattern).search if pattern else lambda _: None
    except re.error as error:
        raise InputError(f"freeze = {pattern!r} is no regular expression ({error})") from None
    paths = [".".join(map(str, path)) for path, _ in nnx.to_flat_state(parameters)]
    if pattern and not any(map(found, paths)):
        raise InputError(f"freeze = {pattern!r} finds no parameter; their names look like {paths[0]}")
    if pattern and all(map(found, paths)):
        raise InputError(f"freeze = {pattern!r} freezes every parameter: nothing is left to train")
    return jax.tree.unflatten(jax.tree.structure(parameters), ["frozen" if found(p) else "trained" for p in paths])


def make_optimizer(config: ConfigDict, labels: nnx.State) -> optax.GradientTransformation:
    """AdamW behind a global-norm clip; the learning rate is set at each step; frozen parameters carry no state."""

    def adamw(learning_rate):
        return optax.adamw(
            learning_rate, b1=config.beta1, b2=config.beta2, eps=config.epsilon, weight_decay=config.weight_decay
        )

    trained = optax.chain(
        optax.clip_by_global_norm(config.max_gradient_norm), optax.inject_hyperparams(adamw)(learning_rate=0.0)
    )
    return optax.multi_transform({"trained": trained, "frozen": optax.set_to_zero()}, labels)


class Learner:
    """Steps for one objective and one set of frozen parameters.

    Args:
        graph: the model without its parameters.
        parameters: an example of them (shapes alone are used).
        objective: "grpo" or "sft".
        freeze: regular expression of parameter paths that are not trained, "" for none.
        config: the run's config (`objective`, `optimizer`).
        temperature: the sampler's; every pass divides the logits by it.
        banned: tokens with log-prob -inf in every pass.
    """

    def __init__(
        self,
        graph: nnx.GraphDef,
        parameters: nnx.State,
        *,
        objective: str,
        freeze: str,
        config: ConfigDict,
        temperature: float,
        banned: tuple[int, ...],
    ):
        self._graph, self._config = graph, config
        self._temperature = temperature if objective == "grpo" else 1.0
        self._banned = banned
        self._labels = frozen_labels(parameters, freeze)
        self._optimizer = make_optimizer(config.optimizer, self._labels)
        self._loss = {"grpo": self._grpo_loss, "sft": self._sft_loss}[objective]
        self.score = Programs(self._score)
        self.update = Programs(self._update, donate_argnums=0)
        self._start = jax.jit(self._optimizer.init)

    def start(self, parameters: nnx.State) -> TrainState:
        """A fresh optimizer around the parameters, which now belong to the state (an update donates them)."""
        return TrainState(parameters, self._start(parameters), jnp.zeros((), jnp.int32))

    def _predict(self, parameters: nnx.State, batch: UpdateBatch) -> TokenLogprobs:
        """Of the response tokens, [R, T]."""
        model: QwenVL = nnx.merge(self._graph, parameters)
        h_RxTxD = model.predicting(batch.tokens, batch.prompts)
        kernel, axis = model.unembedding()
        return token_logprobs(
            h_RxTxD, kernel, batch.tokens, vocabulary_axis=axis, temperature=self._temperature, banned=self._banned
        )

    def _score(self, parameters: nnx.State, batch: UpdateBatch) -> jax.Array:
        """Log-probs [R, T] of the response tokens."""
        return self._predict(parameters, batch).logprobs

    def _grpo_loss(self, parameters: nnx.State, batch: UpdateBatch) -> tuple[jax.Array, dict[str, jax.Array]]:
        settings = self._config.objective
        new = self._predict(parameters, batch)
        mask = objectives.response_mask(batch.lengths, batch.tokens.shape[1])

        # Padding is cut out before the losses, not only after: a banned pad token has log-prob -inf, and 0 x NaN of its
        # ratio would be the gradient of everything.
        def seen(logprobs):
            return jnp.where(mask, logprobs, 0.0)

        logprobs = seen(new.logprobs)
        old = jax.lax.stop_gradient(logprobs) if batch.old_logprobs is None else seen(batch.old_logprobs)
        terms = objectives.policy_loss(
            logprobs,
            old,
            batch.advantages,
            clip_low=settings.clip_low,
            clip_high=settings.clip_high,
            clip_dual=settings.clip_dual,
        )
        loss = objectives.token_mean(terms.loss, mask)
        difference = jnp.abs(old - seen(batch.sampler_logprobs))
        metrics = {
            "policy_loss": loss,
            "entropy": objectives.token_mean(new.entropy, mask),
            "clip_fraction": objectives.token_mean(terms.clipped, mask),
            "logprob_difference_mean": objectives.token_mean(difference, mask),
            "logprob_difference_max": difference.max(),
        }
        if batch.reference_logprobs is not None:
            divergence = objectives.k3_divergence(logprobs, seen(batch.reference_logprobs))
            metrics["kl"] = objectives.token_mean(divergence, mask)
            loss = loss + settings.kl_coefficient * metrics["kl"]
        return loss, metrics

    def _sft_loss(self, parameters: nnx.State, batch: UpdateBatch) -> tuple[jax.Array, dict[str, jax.Array]]:
        new = self._predict(parameters, batch)
        mask = objectives.response_mask(batch.lengths, batch.tokens.shape[1])
        return objectives.token_mean(-new.logprobs, mask), {
            "token_accuracy": objectives.token_mean(new.greedy, mask),
            "entropy": objectives.token_mean(new.entropy, mask),
        }

    def _update(
        self, state: TrainState, batch: UpdateBatch, learning_rate: jax.Array
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        def loss_of(parameters):
            # A stopped gradient spares the backward pass of what is frozen; the optimizer alone would not.
            stopped = jax.tree.map(
                lambda leaf, label: jax.lax.stop_gradient(leaf) if label == "frozen" else leaf, parameters, self._labels
            )
            return self._loss(stopped, batch)

        (loss, metrics), gradients = jax.value_and_grad(loss_of, has_aux=True)(state.parameters)
        norm = optax.global_norm(gradients)
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        optimizer = optax.tree.set(state.optimizer, learning_rate=learning_rate)
        changes, optimizer = self._optimizer.update(gradients, optimizer, state.parameters)
        # A non-finite update leaves parameters and moments as they were; it is counted, not fatal.
        parameters, optimizer = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old),
            (optax.apply_updates(state.parameters, changes), optimizer),
            (state.parameters, state.optimizer),
        )
        state = TrainState(parameters, optimizer, state.skipped + ~finite)
        return state, {**metrics, "loss": loss, "grad_norm": norm, "skipped_updates": state.skipped}
