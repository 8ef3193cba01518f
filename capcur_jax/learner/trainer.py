"""From graded groups to optimizer updates: mini-batches, micro-batches of declared shape, their passes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from capcur_jax.devices import sharding
from capcur_jax.errors import InputError
from capcur_jax.learner.learner import Learner, Sums, TrainState, token_means
from capcur_jax.learner.packing import UpdateBatch


class Offload(NamedTuple):
    """Keeps a tree of arrays in pinned host memory while nothing reads it."""

    shardings: Any  # on the devices

    def to_device(self, tree: Any) -> Any:
        return jax.device_put(tree, self.shardings)

    def to_host(self, tree: Any) -> Any:
        return jax.device_put(tree, jax.tree.map(lambda s: s.with_memory_kind("pinned_host"), self.shardings))

    @classmethod
    def of(cls, memory: str, tree: Any, key: str) -> Offload | None:
        """None for memory = "device". Raises InputError."""
        if memory not in ("device", "pinned_host"):
            raise InputError(f"{key} = {memory!r}; choose one of device, pinned_host")
        offloaded = memory == "pinned_host" and tree is not None
        return cls(jax.tree.map(lambda leaf: leaf.sharding, tree)) if offloaded else None


@dataclasses.dataclass
class Trainer:
    """A stage's state, and the updates that move it."""

    learner: Learner
    mesh: Mesh
    state: TrainState
    frozen: nnx.State
    sums: Sums | None = None  # zeros, made in the warm-up
    reference: nnx.State | None = None  # what is trained, as the stage found it; frozen parameters are the policy's own
    offload: Offload | None = None  # of the optimizer state; None: it stays on the devices
    offload_reference: Offload | None = None
    _away: Offload | None = None  # how to get back what `leave` took from the devices
    _frozen: nnx.State | None = None  # on the host: it never changes, so it is taken there once

    def parameters(self) -> nnx.State:
        """All of them, as the engine reads and an export writes them."""
        return nnx.merge_state(self.state.trained, self.frozen)

    def leave(self) -> None:
        """Everything goes to pinned host memory: the devices are the rollout engine's for a while."""
        moved = self.state, self.sums, self.reference
        self._away = Offload(jax.tree.map(lambda leaf: leaf.sharding, (moved, self.frozen)))
        (self.state, self.sums, self.reference), frozen = self._away.to_host((moved, self._frozen or self.frozen))
        self.frozen = self._frozen = self._frozen or frozen

    @property
    def away(self) -> bool:
        """Whether it has left the devices."""
        return self._away is not None

    def enter(self) -> None:
        """It comes back from there."""
        if self._away:
            whole = (self.state, self.sums, self.reference), self.frozen
            (self.state, self.sums, self.reference), self.frozen = self._away.to_device(whole)
            self._away = None

    def to_host(self) -> None:
        """What is offloaded leaves the devices."""
        if self.offload:
            self.state = self.state._replace(optimizer=self.offload.to_host(self.state.optimizer))
        if self.offload_reference:
            self.reference = self.offload_reference.to_host(self.reference)

    def on_devices(self, state: TrainState) -> TrainState:
        return state._replace(optimizer=self.offload.to_device(state.optimizer)) if self.offload else state

    def reference_on_devices(self) -> nnx.State | None:
        return self.offload_reference.to_device(self.reference) if self.offload_reference else self.reference

    def step(
        self, minibatches: Sequence[Sequence[UpdateBatch]], old: bool, rates: Sequence[float]
    ) -> list[dict[str, jax.Array]]:
        """One update for each mini-batch, dispatched; returns their metrics, still on the devices.

        Reference and old log-probs come first, from the parameters before any of these updates.
        """
        scored = self._scored(minibatches, old)
        results = []
        for mini, rate in zip(minibatches, rates, strict=True):
            for batch in mini:
                placed = _with(sharding.put(self.mesh, batch), next(scored, {}))
                self.sums = self.learner.accumulate(self.state.trained, self.frozen, self.sums, placed)
            state = self.on_devices(self.state)
            self.state, self.sums, metrics = self.learner.apply(state, self.sums, np.float32(rate))
            if self.offload:
                self.state = self.state._replace(optimizer=self.offload.to_host(self.state.optimizer))
            results.append(metrics)
        return results

    def _scored(self, minibatches: Sequence[Sequence[UpdateBatch]], old: bool) -> Iterator[dict[str, list[jax.Array]]]:
        """Log-probs of other passes for each micro-batch, by field. Patches are put on the devices once more for the
        gradient: those of a whole step at once would take gigabytes."""
        policies: dict[str, nnx.State] = {}
        if self.reference is not None:
            policies["reference_logprobs"] = self.reference_on_devices()
        if old:
            policies["old_logprobs"] = self.state.trained
        if not policies:
            return iter(())
        scores = []
        for mini in minibatches:
            for batch in mini:
                placed = sharding.put(self.mesh, batch)
                scores.append({f: self.learner.score(p, self.frozen, placed) for f, p in policies.items()})
        return iter(scores)


def _with(batch: UpdateBatch, fields: dict[str, list[jax.Array]]) -> UpdateBatch:
    """The batch with more log-probs, a list over its slabs for each field."""
    slabs = [
        dataclasses.replace(slab, **{name: values[i] for name, values in fields.items()})
        for i, slab in enumerate(batch.slabs)
    ]
    return dataclasses.replace(batch, slabs=tuple(slabs))


def combined(updates: Sequence[dict[str, np.ndarray]]) -> dict[str, float]:
    """A step's record from its updates' fetched metrics: token means over all of them, means of losses and norms."""
    # What a skipped update summed up is not finite; it must not hide the others.
    finite = [u for u in updates if np.isfinite(u["loss"]) and np.isfinite(u["grad_norm"])] or updates
    total = finite[0]
    for metrics in finite[1:]:
        total = {k: np.maximum(total[k], v) if k.endswith("_max") else total[k] + v for k, v in metrics.items()}
    record = token_means(total)
    for name in ("loss", "grad_norm"):
        record[name] /= len(finite)
    record["trained_tokens"] = int(sum(u["tokens"] for u in updates))
    record["skipped_updates"] = int(updates[-1]["skipped_updates"])
    return record
