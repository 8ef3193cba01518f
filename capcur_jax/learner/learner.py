"""The compiled steps of training: log-probs under given parameters, one micro-batch's gradient, one optimizer update.

Programs are compiled ahead of time for every declared shape and shared by all stages that differ in numbers alone. The
gradient of a mini-batch is the sum of its micro-batches' (every response row carries its weight in the whole), so how a
mini-batch is split, over micro-batches or devices, changes nothing but the order of additions.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from capcur_jax.devices import sharding
from capcur_jax.devices.programs import Programs
from capcur_jax.errors import InputError
from capcur_jax.learner import objectives, optimizer
from capcur_jax.learner.packing import UpdateBatch
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
        objective: a name in `objectives.OBJECTIVES`.
        freeze: regular expression of parameter paths that are not trained, "" for none.
        config: the run's config (`objective`, `optimizer`).
        temperature: the sampler's; every pass divides the logits by it, unless nothing is sampled.
        banned: tokens with log-prob -inf in every pass.
        mesh: where everything lies.
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
        mesh: Mesh,
    ):
        self._graph, self._mesh, self._banned = graph, mesh, banned
        self._objective, self._settings = objectives.OBJECTIVES[objective], config.objective
        self._temperature = temperature if self._objective.sampled else 1.0
        self._frozen = frozen_paths(parameters, freeze)
        self._optimizer = optimizer.make_optimizer(config.optimizer)
        trained, _ = self.split(parameters)
        abstract = jax.tree.map(sharding.shape_of, trained)
        shapes = jax.eval_shape(self._optimizer.init, abstract)
        one, of_trained = sharding.replicated(mesh), jax.tree.map(lambda leaf: leaf.sharding, abstract)
        moments = optimizer.state_sharding(shapes, of_trained, one)  # each with its parameter
        self._abstract_state = abstract, shapes, moments, one
        state, sums = TrainState(of_trained, moments, one), Sums(of_trained, one)
        self.score = Programs(self._score, out_shardings=sharding.by_rows(mesh))
        self.accumulate = Programs(self._accumulate, out_shardings=sums, donate_argnums=2)
        self.apply = Programs(self._apply, out_shardings=(state, sums, one), donate_argnums=(0, 1))
        self.start_optimizer = Programs(self._optimizer.init, out_shardings=moments)
        self.zeros = Programs(self._zeros, out_shardings=sums)

    def split(self, parameters: nnx.State) -> tuple[nnx.State, nnx.State]:
        """(trained, frozen) parts of the parameters; `nnx.merge_state` puts them together again."""
        parts: tuple[list, list] = ([], [])
        for path, leaf in nnx.to_flat_state(parameters):
            parts[".".join(map(str, path)) in self._frozen].append((path, leaf))
        return nnx.from_flat_state(parts[0]), nnx.from_flat_state(parts[1])

    def start(self, trained: nnx.State) -> TrainState:
        """A fresh optimizer around the parameters, which now belong to the state (an update donates them)."""
        # From the host: jax 0.10.2 makes a broken array of one that lies on a device, where each of several processes
        # has one device.
        skipped = jax.device_put(np.zeros((), np.int32), sharding.replicated(self._mesh))
        return TrainState(trained, self.start_optimizer(trained), skipped)

    def abstract_state(self) -> TrainState:
        """What `start` gives, by shape and place alone: for restoring into."""
        trained, shapes, places, one = self._abstract_state
        placed = jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), shapes, places)
        return TrainState(trained, placed, jax.ShapeDtypeStruct((), jnp.int32, sharding=one))

    def copy_as(self, trained: nnx.State, dtype: Any) -> nnx.State:
        """A copy that updates do not touch, in that dtype."""
        return jax.tree.map(lambda leaf: jnp.array(leaf, dtype, copy=True), trained)

    # ------------------------------------------------------------------ passes

    def _predict(self, model: QwenVL, batch: UpdateBatch) -> TokenLogprobs:
        """Of all response tokens, [R, T]; past a response's end they are anything."""
        kernel, axis = model.unembedding()
        shards = None
        if self._mesh.size > 1:
            path = "head.kernel" if axis else "text.embed.embedding"
            shards = Shards(self._mesh, P(sharding.ROWS), sharding.spec_of(self._mesh, path, kernel.shape))
        rows = batch.rows
        scored = token_logprobs(
            model.predicting(rows), kernel, rows.tokens, vocabulary_axis=axis, temperature=self._temperature,
            banned=self._banned, shards=shards,
        )  # fmt: skip

        def of_responses(x_AxW, start_AxR):
            index = jnp.minimum(start_AxR[..., None] + jnp.arange(rows.response), x_AxW.shape[1] - 1)
            A = len(x_AxW)
            return jnp.take_along_axis(x_AxW, index.reshape(A, -1), axis=1).reshape(-1, rows.response)

        of = sharding.local(self._mesh, of_responses, (P(sharding.ROWS),) * 2, P(sharding.ROWS))
        return jax.tree.map(lambda x: of(x, rows.places.response_start), scored)

    def _score(self, trained: nnx.State, frozen: nnx.State, batch: UpdateBatch) -> jax.Array:
        """Log-probs [R, T] of the response tokens."""
        return self._predict(nnx.merge(self._graph, trained, frozen), batch).logprobs

    def _loss(self, trained, frozen, batch: UpdateBatch) -> tuple[jax.Array, dict[str, jax.Array]]:
        """This micro-batch's share of the loss, and its sums."""
        new = self._predict(nnx.merge(self._graph, trained, frozen), batch)
        mask = objectives.response_mask(batch.rows.places.response_length.reshape(-1), batch.rows.response)
        loss, values = self._objective.loss(batch.responses, new, mask, self._settings)
        total = (batch.responses.weights * objectives.masked_sum(loss, mask)).sum()
        sums = {
            name: jnp.where(mask, value, 0.0).max()
            if name.endswith("_max")
            else objectives.masked_sum(value.astype(jnp.float32), mask).sum()
            for name, value in values.items()
        }
        return total, {**sums, "tokens": mask.sum().astype(jnp.float32), "loss": total}

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
