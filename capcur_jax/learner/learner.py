"""The compiled steps of training: log-probs under given parameters, one micro-batch's gradient, one optimizer update.

Programs are compiled ahead of time for every declared shape and shared by all stages that differ in numbers alone. The
gradient of a mini-batch is the sum of its micro-batches' (every response row carries its weight in the whole), so how a
mini-batch is split, over micro-batches or devices, changes nothing but the order of additions.
"""

from __future__ import annotations

import functools
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from capcur_jax.devices import sharding
from capcur_jax.devices.programs import Programs
from capcur_jax.errors import InputError
from capcur_jax.learner import objectives, optimizer
from capcur_jax.learner.packing import Slab, UpdateBatch
from capcur_jax.models.logprobs import Shards, TokenLogprobs, token_logprobs
from capcur_jax.models.qwen_vl import QwenVL


class TrainState(NamedTuple):
    trained: nnx.State  # frozen parameters are no part of it: they have neither gradient nor optimizer state
    optimizer: Any
    skipped: jax.Array  # updates left out because loss or gradient was not finite


class Sums(NamedTuple):
    """What the micro-batches of an update add up to."""

    gradients: nnx.State  # float32, of the trained parameters
    metrics: dict[str, jax.Array]  # sums over response tokens; a maximum where the name ends with _max


def frozen_paths(parameters: nnx.State, pattern: str) -> set[str]:
    """The dotted paths that the regular expression finds. Raises InputError for a pattern that is of no use."""
    try:
        found = re.compile(pattern).search if pattern else lambda _: None
    except re.error as error:
        raise InputError(f"freeze = {pattern!r} is no regular expression ({error})") from None
    paths = [".".join(map(str, path)) for path, _ in nnx.to_flat_state(parameters)]
    frozen = {path for path in paths if found(path)}
    if pattern and not frozen:
        raise InputError(f"freeze = {pattern!r} finds no parameter; their names look like {paths[0]}")
    if len(frozen) == len(paths):
        raise InputError(f"freeze = {pattern!r} freezes every parameter: nothing is left to train")
    return frozen


def combine_metrics(a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
    """Sums of sums, maxima of maxima."""
    return {key: jnp.maximum(a[key], b[key]) if key.endswith("_max") else a[key] + b[key] for key in a}


class Learner:
    """Steps for one objective and one set of frozen parameters.

    Args:
        graph: the model without its parameters.
        parameters: an example of them (shapes, dtypes and shardings alone are used).
        objective: "grpo" or "sft".
        freeze: regular expression of parameter paths that are not trained, "" for none.
        config: the run's config (`objective`, `optimizer`).
        temperature: the sampler's; every pass divides the logits by it.
        banned: tokens with log-prob -inf in every pass.
        mesh: where everything lies; None: on the default device.
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
        mesh: Mesh | None = None,
    ):
        self._graph, self._config, self._mesh = graph, config, mesh
        self._temperature = temperature if objective == "grpo" else 1.0
        self._banned = banned
        self._frozen = frozen_paths(parameters, freeze)
        self._optimizer = optimizer.make_optimizer(config.optimizer)
        self._losses = {"grpo": self._grpo_losses, "sft": self._sft_losses}[objective]
        trained, _ = self.split(parameters)
        abstract = jax.tree.map(self._abstract, trained)
        shapes = jax.eval_shape(self._optimizer.init, abstract)
        state = self._shardings(shapes, abstract)
        one = None if mesh is None else sharding.replicated(mesh)
        self._abstract_state = abstract, shapes, state, one
        of_trained = jax.tree.map(lambda leaf: leaf.sharding, abstract)
        sums = Sums(of_trained, one)
        rows = None if mesh is None else sharding.by_rows(mesh)

        def program(function, out, **kinds):
            return Programs(function, **kinds, **({} if mesh is None else {"out_shardings": out}))

        self.score = program(self._score, rows)
        self.accumulate = program(self._accumulate, sums, donate_argnums=2)
        self.apply = program(self._apply, (TrainState(of_trained, state, one), sums, one), donate_argnums=(0, 1))
        self.start_optimizer = program(self._optimizer.init, state)
        self.zeros = program(self._zeros, sums)

    def split(self, parameters: nnx.State) -> tuple[nnx.State, nnx.State]:
        """(trained, frozen) parts of the parameters; `nnx.merge_state` puts them together again."""
        parts: tuple[list, list] = ([], [])
        for path, leaf in nnx.to_flat_state(parameters):
            parts[".".join(map(str, path)) in self._frozen].append((path, leaf))
        return nnx.from_flat_state(parts[0]), nnx.from_flat_state(parts[1])

    def start(self, trained: nnx.State) -> TrainState:
        """A fresh optimizer around the parameters, which now belong to the state (an update donates them)."""
        skipped = jnp.zeros((), jnp.int32)
        if self._mesh is not None:
            skipped = jax.device_put(skipped, sharding.replicated(self._mesh))
        return TrainState(trained, self.start_optimizer(trained), skipped)

    def abstract_state(self) -> TrainState:
        """What `start` gives, by shape and place alone: for restoring into. Needs a mesh."""
        trained, shapes, places, one = self._abstract_state
        placed = jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), shapes, places)
        return TrainState(trained, placed, jax.ShapeDtypeStruct((), jnp.int32, sharding=one))

    def copy_as(self, trained: nnx.State, dtype: Any) -> nnx.State:
        """A copy that updates do not touch, in that dtype."""
        return jax.tree.map(lambda leaf: jnp.array(leaf, dtype, copy=True), trained)

    def _abstract(self, leaf: jax.Array) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=None if self._mesh is None else leaf.sharding)

    def _shardings(self, state: Any, trained: nnx.State) -> Any:
        """Where the optimizer state lies: each moment with its parameter."""
        if self._mesh is None:
            return None
        of_trained = jax.tree.map(lambda leaf: leaf.sharding, trained)
        return optimizer.state_sharding(state, of_trained, sharding.replicated(self._mesh))

    # ------------------------------------------------------------------ passes

    def _predict(self, model: QwenVL, batch: UpdateBatch) -> list[TokenLogprobs]:
        """Of each slab's response tokens, [R, T]. The vocabulary is walked once for all slabs."""
        hidden = model.predicting([slab.tokens for slab in batch.slabs], batch.prompts)
        B = batch.prompts.tokens.shape[0]
        # [B, G x T]: what belongs to a prompt is on its own device row, however many rows of it a slab has.
        h = jnp.concatenate([x.reshape(B, -1, x.shape[-1]) for x in hidden], axis=1)
        tokens = jnp.concatenate([slab.tokens.reshape(B, -1) for slab in batch.slabs], axis=1)
        kernel, axis = model.unembedding()
        shards = None
        if self._mesh is not None and self._mesh.size > 1:
            path = "head.kernel" if axis else "text.embed.embedding"
            shards = Shards(self._mesh, P(sharding.ROWS), sharding.spec_of(self._mesh, path, kernel.shape))
        scored = token_logprobs(
            h, kernel, tokens, vocabulary_axis=axis, temperature=self._temperature, banned=self._banned, shards=shards
        )
        parts, at = [], 0
        for slab in batch.slabs:
            width = slab.tokens.size // B
            cut = functools.partial(jax.lax.slice_in_dim, start_index=at, limit_index=at + width, axis=1)
            parts.append(jax.tree.map(lambda x, cut=cut, slab=slab: cut(x).reshape(slab.tokens.shape), scored))
            at += width
        return parts

    def _score(self, trained: nnx.State, frozen: nnx.State, batch: UpdateBatch) -> list[jax.Array]:
        """Log-probs [R, T] of each slab's response tokens."""
        return [part.logprobs for part in self._predict(nnx.merge(self._graph, trained, frozen), batch)]

    def _grpo_losses(self, slab: Slab, new: TokenLogprobs, mask: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Per-token loss [R, T] and, for the metrics, per-token values [R, T] by name."""
        settings = self._config.objective

        # Padding is cut out before the losses, not only after: a banned pad token has log-prob -inf, and 0 x NaN of its
        # ratio would be the gradient of everything.
        def seen(logprobs):
            return jnp.where(mask, logprobs, 0.0)

        logprobs, sampler = seen(new.logprobs), seen(slab.sampler_logprobs)
        old = jax.lax.stop_gradient(logprobs) if slab.old_logprobs is None else seen(slab.old_logprobs)
        terms = objectives.policy_terms(
            logprobs,
            old,
            slab.advantages,
            mask,
            clip_low=settings.clip_low,
            clip_high=settings.clip_high,
            clip_dual=settings.clip_dual,
            level=settings.ratio,
        )
        correction = objectives.importance_weights(
            old,
            sampler,
            mask,
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
        if slab.reference_logprobs is not None:
            reference = seen(slab.reference_logprobs)
            values["kl"] = objectives.divergence(settings.kl_estimator, logprobs, reference, old, mask)
            loss = loss + settings.kl_coefficient * values["kl"]
        if settings.entropy_coefficient:
            loss = loss - settings.entropy_coefficient * new.entropy
        return loss, {**values, "policy_loss": terms.loss}

    def _sft_losses(self, slab: Slab, new: TokenLogprobs, mask: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        return -new.logprobs, {"token_accuracy": new.greedy, "entropy": new.entropy}

    def _loss(self, trained, frozen, batch: UpdateBatch) -> tuple[jax.Array, dict[str, jax.Array]]:
        """This micro-batch's share of the loss, and its sums."""
        total, sums = jnp.zeros(()), None
        predicted = self._predict(nnx.merge(self._graph, trained, frozen), batch)
        for slab, new in zip(batch.slabs, predicted, strict=True):
            mask = objectives.response_mask(slab.lengths, slab.tokens.shape[1])
            loss, values = self._losses(slab, new, mask)
            total += (slab.weights * objectives.masked_sum(loss, mask)).sum()
            of_slab = {
                name: jnp.where(mask, value, 0.0).max()
                if name.endswith("_max")
                else objectives.masked_sum(value.astype(jnp.float32), mask).sum()
                for name, value in values.items()
            }
            of_slab["tokens"] = mask.sum().astype(jnp.float32)
            sums = of_slab if sums is None else combine_metrics(sums, of_slab)
        return total, {**sums, "loss": total}

    # ------------------------------------------------------------------ updates

    def _zeros(self, trained: nnx.State, frozen: nnx.State, batch: UpdateBatch) -> Sums:
        metrics = jax.eval_shape(self._loss, trained, frozen, batch)[1]
        gradients = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), trained)
        return Sums(gradients, jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), metrics))

    def _accumulate(self, trained: nnx.State, frozen: nnx.State, sums: Sums, batch: UpdateBatch) -> Sums:
        gradients, metrics = jax.grad(self._loss, has_aux=True)(trained, frozen, batch)
        added = jax.tree.map(lambda total, gradient: total + gradient.astype(jnp.float32), sums.gradients, gradients)
        return Sums(added, combine_metrics(sums.metrics, metrics))

    def _apply(
        self, state: TrainState, sums: Sums, learning_rate: jax.Array
    ) -> tuple[TrainState, Sums, dict[str, jax.Array]]:
        norm = optax.global_norm(sums.gradients)
        finite = jnp.isfinite(sums.metrics["loss"]) & jnp.isfinite(norm)
        before = optax.tree.set(state.optimizer, learning_rate=learning_rate)
        changes, after = self._optimizer.update(sums.gradients, before, state.trained)
        # A non-finite update leaves parameters and moments as they were; it is counted, not fatal.
        trained, after = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old),
            (optax.apply_updates(state.trained, changes), after),
            (state.trained, state.optimizer),
        )
        state = TrainState(trained, after, state.skipped + ~finite)
        metrics = {**sums.metrics, "grad_norm": norm, "skipped_updates": state.skipped}
        return state, jax.tree.map(jnp.zeros_like, sums), metrics


def token_means(metrics: dict[str, Any]) -> dict[str, float]:
    """An update's fetched metrics as means over its response tokens (sums over updates: see `combine_metrics`)."""
    whole = {"loss", "grad_norm", "skipped_updates", "tokens"}
    tokens = max(float(metrics["tokens"]), 1.0)
    return {
        name: float(value) if name in whole or name.endswith("_max") else float(value) / tokens
        for name, value in metrics.items()
        if name != "tokens"
    }
