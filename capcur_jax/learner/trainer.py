"""A run's parameters and what moves them: a stage's state, where it lies, its passes and optimizer updates."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict

from capcur_jax.checkpoints.checkpointing import Checkpoints
from capcur_jax.devices import sharding
from capcur_jax.learner.learner import Learner, Sums, TrainState, token_means
from capcur_jax.learner.minibatches import Micro
from capcur_jax.learner.packing import UpdateBatch
from capcur_jax.learner.residence import AT_HOME, Offload, Residence
from capcur_jax.models.config import dtype_of


@dataclasses.dataclass
class Trainer:
    """The parameters of a run, and the updates that move them; before the first stage nothing else (`holding`)."""

    learner: Learner | None
    mesh: Mesh
    state: TrainState
    frozen: nnx.State
    sums: Sums | None = None  # zeros, made in the warm-up
    reference: nnx.State | None = None  # what is trained, as the stage found it; frozen parameters are the policy's own
    optimizer_home: Residence = AT_HOME  # of the optimizer state
    reference_home: Residence = AT_HOME
    _away: Offload | None = None  # how to get back what `leave` took from the devices
    _frozen: nnx.State | None = None  # on the host: it never changes, so it is taken there once

    @classmethod
    def holding(cls, parameters: nnx.State, mesh: Mesh) -> Trainer:
        """Parameters that no stage trains yet."""
        return cls(None, mesh, TrainState(parameters, None, None), nnx.State({}))

    def parameters(self) -> nnx.State:
        """All of them, as the engine reads and an export writes them."""
        return nnx.merge_state(self.state.trained, self.frozen)

    # ------------------------------------------------------------------ a stage begins

    def begin(self, learner: Learner, config: ConfigDict, referred: bool) -> None:
        """A stage's fresh state: the present parameters and a new optimizer; `referred`: and a copy of what is trained
        as its reference policy. Raises InputError for a memory that does not exist."""
        trained, frozen = learner.split(sharding.on_devices(self._let_go()))
        dtype = dtype_of(config.reference.dtype, "config.reference.dtype")
        # Updates donate what they are given, so the stage's start is copied.
        reference = learner.copy_as(trained, dtype) if referred else None
        self._take(learner, learner.start(trained), frozen, reference, config)

    def restore(
        self, learner: Learner, config: ConfigDict, referred: bool, store: Checkpoints, name: str, number: int
    ) -> None:
        """The state of the stage `name` that checkpoint `number` holds, instead. Raises InputError."""
        frozen = learner.split(self._let_go())[1]
        shapes, reference = learner.abstract_state(), None
        if referred:
            dtype = dtype_of(config.reference.dtype, "config.reference.dtype")
            reference = jax.tree.map(lambda leaf: sharding.shape_of(leaf, dtype), shapes.trained)
        start = _start(jax.tree.map(sharding.shape_of, frozen), reference, jax.ShapeDtypeStruct((), np.int32))
        start = store.restore_reference(name, start)
        self._take(learner, store.restore(number, shapes), start["frozen"], start["reference"], config)

    def stage_start(self, number: int) -> dict[str, Any]:
        """What `restore` needs besides a checkpoint, to be stored once a stage: what no update changes."""
        return _start(self.frozen, self.reference, np.int32(number))

    def _let_go(self) -> nnx.State:
        """The parameters. All else of the stage is given up: the next one's state needs its room."""
        parameters = self.parameters()
        self.state, self.frozen = TrainState(parameters, None, None), nnx.State({})
        self.sums = self.reference = None
        return parameters

    def _take(self, learner: Learner, state: TrainState, frozen: Any, reference: Any, config: ConfigDict) -> None:
        self.learner, self.state, self.frozen, self.reference = learner, state, frozen, reference
        self.sums = self._away = self._frozen = None
        self.optimizer_home = Residence(config.optimizer.memory, state.optimizer, "config.optimizer.memory")
        self.reference_home = Residence(config.reference.memory, reference, "config.reference.memory")
        self._rest()
        self.reference = self.reference_home.rest(reference)

    # ------------------------------------------------------------------ where it lies

    def leave(self) -> None:
        """Moves everything to pinned host memory, to leave the devices to the rollout engine for a while."""
        moved = self.state, self.sums, self.reference
        self._away = Offload.of((moved, self.frozen))
        (self.state, self.sums, self.reference), frozen = self._away.to_host((moved, self._frozen or self.frozen))
        self.frozen = self._frozen = self._frozen or frozen

    @property
    def away(self) -> bool:
        """Whether it has left the devices."""
        return self._away is not None

    def enter(self) -> None:
        """Moves it back to the devices."""
        if self._away:
            whole = (self.state, self.sums, self.reference), self.frozen
            (self.state, self.sums, self.reference), self.frozen = self._away.to_device(whole)
            self._away = None

    def at_work(self) -> TrainState:
        """The state with all of it on the devices."""
        return self.state._replace(optimizer=self.optimizer_home.work(self.state.optimizer))

    def _rest(self) -> None:
        self.state = self.state._replace(optimizer=self.optimizer_home.rest(self.state.optimizer))

    # ------------------------------------------------------------------ updates

    def step(
        self, minibatches: Sequence[Sequence[Micro]], old: bool, rates: Sequence[float]
    ) -> list[dict[str, jax.Array]]:
        """One update for each mini-batch, dispatched; returns their metrics, still on the devices.

        Reference and old log-probs come first, from the parameters before any of these updates. The first update's old
        policy is the one that it trains: its own log-probs are taken.
        """
        scored = self._scored(minibatches, old)
        results = []
        for mini, rate in zip(minibatches, rates, strict=True):
            for micro in mini:
                placed = _with(sharding.put(self.mesh, micro.batch()), next(scored, {}))
                self.sums = self.learner.accumulate(self.state.trained, self.frozen, self.sums, placed)
            self.state, self.sums, metrics = self.learner.apply(self.at_work(), self.sums, np.float32(rate))
            self._rest()
            results.append(metrics)
        return results

    def not_finite(self, minibatches: Sequence[Sequence[Micro]], old: bool) -> str:
        """Names the parameters that are NaN or infinite, or, where none is, what of a step's gradient is. It looks at
        all of them, and leaves the sums of that gradient: for a run that ends."""
        found, where = _not_finite(self.parameters()), "parameters"
        if not found:
            scored, where = self._scored(minibatches, old), "gradients"
            for micro in (micro for mini in minibatches for micro in mini):
                placed = _with(sharding.put(self.mesh, micro.batch()), next(scored, {}))
                self.sums = self.learner.accumulate(self.state.trained, self.frozen, self.sums, placed)
            found = _not_finite(self.sums.gradients)
        more = f" and {len(found) - 5} more" if len(found) > 5 else ""
        return f"{where} that are NaN or infinite: {', '.join(found[:5]) or 'none'}{more}"

    def _scored(self, minibatches: Sequence[Sequence[Micro]], old: bool) -> Iterator[dict[str, jax.Array]]:
        """Log-probs of other passes for each micro-batch, by field. Its arrays are made and put on the devices once
        more for the gradient: those of a whole step at once would take gigabytes."""
        scores = []
        reference = None if self.reference is None else self.reference_home.work(self.reference)
        for number, mini in enumerate(minibatches):
            policies = {} if reference is None else {"reference_logprobs": reference}
            if old and number > 0:
                policies["old_logprobs"] = self.state.trained
            for micro in mini if policies or old else ():
                placed = sharding.put(self.mesh, micro.batch()) if policies else None  # no pass reads it
                scored = {f: self.learner.score(p, self.frozen, placed) for f, p in policies.items()}
                if old:  # `own` and what it leaves unread have the same shapes in every update: one program
                    R, T = micro.responses
                    unread = {} if number else {"old_logprobs": np.zeros((R, T), np.float32)}
                    scored |= sharding.put(self.mesh, {"own": np.full(R, number == 0), **unread})
                scores.append(scored)
        return iter(scores)


def _not_finite(tree: Any) -> list[str]:
    """The paths of the arrays with a number that is NaN or infinite."""
    flat = nnx.to_flat_state(tree)
    bad = jax.device_get([jnp.logical_not(jnp.isfinite(leaf[...]).all()) for _, leaf in flat])
    return [".".join(map(str, path)) for (path, _), found in zip(flat, bad, strict=True) if found]


def _start(frozen: Any, reference: Any, number: Any) -> dict[str, Any]:
    # The number is an array at least, where nothing is frozen and there is no reference.
    return {"frozen": frozen, "reference": reference, "stage": number}


def learners(
    graph: nnx.GraphDef, parameters: nnx.State, config: ConfigDict, banned: tuple[int, ...], mesh: Mesh
) -> Callable[[str, str], Learner]:
    """The Learner of an objective and a pattern of frozen parameters: stages that share both share its programs."""

    @functools.cache
    def make(objective: str, freeze: str) -> Learner:
        return Learner(
            graph,
            parameters,
            objective=objective,
            freeze=freeze,
            config=config,
            temperature=config.rollout.temperature,
            banned=banned,
            mesh=mesh,
        )

    return make


def _with(batch: UpdateBatch, fields: dict[str, jax.Array]) -> UpdateBatch:
    """The batch with more log-probs of its responses."""
    return dataclasses.replace(batch, responses=dataclasses.replace(batch.responses, **fields))


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
