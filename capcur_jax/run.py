"""What all stages of a run share, opened and closed: data, model, trainer, engine, rewards, records, checkpoints."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict

from capcur_jax import policy
from capcur_jax.checkpoints.checkpointing import Checkpoints, go_on, start_anew
from capcur_jax.checks import check, check_data, check_devices, goes_on_from, splits
from capcur_jax.data import identity
from capcur_jax.data.prompts import tokenizer_texts
from capcur_jax.data.sets import Sets
from capcur_jax.devices import distributed, sharding
from capcur_jax.errors import InputError
from capcur_jax.evaluation.heldout import Heldout
from capcur_jax.evaluation.keeper import VALIDATION, Keeper
from capcur_jax.hub import download
from capcur_jax.interruption import Interruption
from capcur_jax.learner import objectives
from capcur_jax.learner.layout import Layout
from capcur_jax.learner.learner import Learner, frozen_paths
from capcur_jax.learner.trainer import Trainer, combined, learners
from capcur_jax.learner.turns import Turns
from capcur_jax.models import fresh
from capcur_jax.models import lora as lora_lib
from capcur_jax.models.batching import PromptSize
from capcur_jax.models.config import dtype_of
from capcur_jax.models.qwen_vl import QwenVL
from capcur_jax.plan import fitting
from capcur_jax.records import journal, jsonl, metrics
from capcur_jax.records.display import Display
from capcur_jax.records.jsonl import JsonLines, Nowhere
from capcur_jax.records.lock import Lock
from capcur_jax.records.sinks import Sinks
from capcur_jax.records.steps import StepRecorder
from capcur_jax.rewards.reward import make_reward
from capcur_jax.rollout.engine import sampling_of
from capcur_jax.rollout.groups import Grading
from capcur_jax.schedule import Stage


class Run:
    """Opens everything; `stages` are labelled uniquely in their order. A context manager.

    Args:
        accept: whether a run that goes on may read other data, weights, rewards or packages; see data/identity.py.

    Attributes:
        progress: where the run stands; train.py replaces it.
        restored: the number of the checkpoint that the run goes on from; None for a new run.
        trainer: has the parameters, before the first stage too.
        decided: of the keys that the config leaves to the devices' memory, what they are now and why.
    """

    def __init__(
        self,
        config: ConfigDict,
        workdir: Path,
        stages: Sequence[Stage],
        display: Display,
        interruption: Interruption,
        started: float | None = None,
        accept: bool = False,
    ):
        self._started = time.monotonic() if started is None else started
        self.config, self.workdir, self.stages = config, workdir, stages
        self._export_dtype = dtype_of(config.export.dtype, "config.export.dtype")
        self.display, self.interruption = display, interruption
        self.owner, self._accept = distributed.is_owner(), accept
        self._versions = functools.cache(metrics.versions)
        with contextlib.ExitStack() as self._closing:  # an error on the way leaves no server and no worker behind
            with interruption.at_once():
                self._open()
            self._closing = self._closing.pop_all()

    def _open(self) -> None:
        config, workdir, display = self.config, self.workdir, self.display
        # Given up last: process 0's, for all.
        self._lock: Lock | None = self._by_owner(lambda: self._closing.enter_context(Lock(workdir)))
        self._open_data()
        check_devices(config)
        self.mesh: Mesh = sharding.make_mesh(config.mesh)
        self.checkpoints = Checkpoints(workdir / "state", keep=config.checkpointing.keep)
        self._closing.push(self._close_checkpoints)
        for line in self.checkpoints.set_aside:
            display.warn(line)
        self.restored = goes_on_from(workdir, config, self.checkpoints)
        if self.restored is None:
            self.progress = start_anew(workdir, self.owner)
            self._check_inputs(None)
        else:
            self._check_inputs(self.checkpoints.progress(self.restored)[0].step)
            self.progress = go_on(workdir, self.owner, self.checkpoints, self.restored)
            if self.owner:
                display.note(f"{workdir}: going on after step {self.progress.step}")
        self._started -= self.progress.seconds
        self._open_reward()
        model = self._open_model()
        self.counter = self._closing.enter_context(contextlib.closing(metrics.CompilationCounter()))
        self._open_engine(model)  # last of what may fail: servers take minutes to start
        self._open_records()

    def _by_owner(self, act: Callable[[], Any]) -> Any:
        """What `act` gives in process 0; None in the others. An InputError of its is one of all processes."""
        return distributed.by_owner(act, str(self.workdir))

    def _check_inputs(self, step: int | None) -> None:
        """That a run that goes on after `step` reads what it read when it began (None). Raises InputError."""

        def compare() -> None:
            now = identity.of_run(self.config, self.sets, splits(self.config, self.stages), self._base)
            identity.check(self.workdir, now, step, self._accept, self.display.warn)

        self._by_owner(compare)

    def _open_data(self) -> None:
        """What the data lacks is said before the start; the owner builds the sets that are built on first use, and the
        others read what it wrote. What lies on the Hub is downloaded. Raises InputError."""
        config, commits = self.config, identity.commits(self.workdir)
        self.sets = Sets(config.data, self.workdir / "data", commits)
        self.sets.fetch(splits(config, self.stages))
        check(config, self.stages, self.sets)
        self._base = download.checkpoint(config.checkpoint, commits=commits) if config.checkpoint else None
        names = {name for stage in self.stages for name in stage.data} | set(config.evaluation.sets)
        for turn in (True, False):
            if self.owner == turn:
                self.sets.build(names, config.evaluation.split)
            distributed.barrier(f"data-{turn}")
        check_data(config, self.stages, self.sets)

    def _open_model(self) -> QwenVL:
        config, source = self.config, self._base or self.workdir / "skeleton"
        if not self._base:
            if self.owner and not source.exists():
                # Of all of config.stages, whichever of them are run now: stages run one by one share a tokenizer.
                pools = (self.sets.pool(stage.data, "train") for stage in config.stages.values())
                fresh.write_skeleton(source, tokenizer_texts(itertools.chain(*pools)), config.create.to_dict())
            distributed.barrier("skeleton")
        # What the config leaves to the devices' memory; what the directory keeps is the config as it was given.
        with self.display.progress("memory of the devices"):
            self._settled, self.decided = fitting.of_run(config, source, self._without_images())
        model, opened = policy.open_model(self._settled, source, self.mesh, self.display.warn)
        most = config.rollout.prefill * self._most_images()
        self.policy = opened._replace(buckets=dataclasses.replace(opened.buckets, most=most))
        self._closing.enter_context(self.policy.images)
        graph, parameters = nnx.split(model)
        self.trainer = Trainer.holding(parameters, self.mesh)
        banned = self.policy.processor.banned_tokens
        self._learners = learners(graph, jax.tree.map(sharding.shape_of, parameters), config, banned, self.mesh)
        textual = self._without_images()
        for stage in self.stages:  # what does not fit together is said before anything is computed
            self.layout(stage, images=stage.name not in textual)
            frozen_paths(parameters, self.freeze_of(stage))
        return model

    def _without_images(self) -> list[str]:
        """Names of the stages whose problems have no image."""
        pools = {stage.name: self.sets.pool(stage.data, "train") for stage in self.stages}
        return [name for name, pool in pools.items() if not any(problem.images for problem in pool)]

    def _most_images(self) -> int:
        """Of a problem that the run reads."""
        read = (self.sets.problems(name, split) for name, split in splits(self.config, self.stages))
        return max((len(problem.images) for problem in itertools.chain(*read)), default=0)

    def _open_reward(self) -> None:
        try:
            self.reward = make_reward(self.config.reward)
        except ValueError as error:
            raise InputError(str(error)) from None
        self._closing.callback(self.reward.close)

    def _open_engine(self, model: QwenVL) -> None:
        config, settings = self.config, self.config.objective
        advantages = functools.partial(
            objectives.group_advantages, epsilon=settings.advantage_epsilon, normalise=settings.advantage_std
        )
        self.grading = Grading(self.reward, self.policy.processor.response, jax.jit(advantages))
        self._closing.callback(self.grading.close)
        self.sampling = sampling_of(config, "rollout")
        with self.display.progress(f"rollout engine ({config.rollout.engine})"):
            self.engine = policy.open_engine(self._settled, model, self.policy, self.workdir)
            self._closing.callback(self.engine.close)
            if self.restored is None:  # else a stage's state comes from the checkpoint, and its weights with it
                self.engine.update_weights(self.trainer.parameters(), self.progress.version)
        shared = policy.engine_kind(config).shares_devices(config)
        self.turns = Turns(self.trainer, self.engine, shared)
        self.display.watch(self.engine.health)
        kept = Keeper(self._evaluation, self._asked_model)
        parts = self.sets, self.engine, self.policy.builder, self.reward
        self.heldout = Heldout(config, *parts, self.display.progress, self.stop_if_asked, kept)

    def _evaluation(self, label: str) -> Path:
        """Where an evaluation is kept, named as the checkpoint of that moment; "": the validation of this step."""
        if not label:
            return self.workdir / "evaluation" / f"{VALIDATION}{self.progress.step}"
        names = [stage.name for stage in self.stages]
        number = names.index(label) + 1 if label in names else 0
        moment = label if not number else "final" if number == len(names) else f"{number}-{label}"
        return self.workdir / "evaluation" / moment

    def _asked_model(self) -> dict[str, Any]:
        """What tells the present weights, and how they are asked."""
        config, at = self.config, self.progress
        digest = journal.fingerprint(self.policy.source) if config.checkpoint and not at.version else None
        return {
            "checkpoint": digest or f"step {at.step} of {self.workdir}, seed {config.seed}",
            "step": at.step,
            "engine": config.rollout.engine,
            "dtype": policy.engine_kind(config).dtype(config),
            "seed": config.seed,
            "reward": config.reward.function or "accuracy",
            "versions": self._versions(),
        }

    def _open_records(self) -> None:
        config, sinks = self.config, None
        if self.owner:
            kinds = {"tensorboard": config.log.tensorboard, "wandb": config.log.wandb}
            plain = jsonl.plain(config.to_dict())
            sinks = Sinks(self.workdir, **kinds, config=plain, resume_step=self.progress.step, warn=self.display.warn)
            self._closing.callback(sinks.close)
        records = self.workdir / "metrics.jsonl"
        recorder = StepRecorder(records, combined, self.counter, self.display, sinks, self.owner, self._alarmed)
        self.recorder = self._closing.enter_context(recorder)
        self.display.earlier(recorder.evaluations)
        rollouts = JsonLines(self.workdir / "rollouts.jsonl") if self.owner else Nowhere()
        self._rollouts, self._sinks = self._closing.enter_context(contextlib.closing(rollouts)), sinks

    def show_rollouts(self, groups: Sequence[dict[str, Any]]) -> None:
        """Sampled groups of the last step, for rollouts.jsonl and for whoever shows the run."""
        for group in groups:
            self._rollouts.write(group)
        if self._sinks:
            self._sinks.rollouts(self.progress.step, groups)

    def _alarmed(self, name: str, text: str) -> None:
        if self.owner:
            self.display.warn(f"alarm {name}: {text} (remedies: docs/training.md, Alarms)")
        if name in self.config.log.stop_at:
            self.interruption.ask(f"alarm {name}")

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *exception) -> None:
        self._closing.__exit__(*exception)

    def _close_checkpoints(self, kind: type[BaseException] | None, *unused) -> None:
        if kind is None or distributed.process_count() == 1:  # closing meets the other processes, which are elsewhere
            self.checkpoints.close()

    # ------------------------------------------------------------------ what a stage asks for

    def layout(self, stage: Stage, images: bool, sizes: Sequence[PromptSize] = ()) -> Layout:
        """The declared shapes of its batches; `images`: whether any of its prompts has one; `sizes`: those of all,
        where they are known. Raises InputError."""
        return Layout.of(stage, self.config, self.policy.buckets, self.policy.processor, self.mesh, images, sizes)

    def learner(self, stage: Stage) -> Learner:
        """Stages with the same objective and the same frozen parameters share their compiled programs."""
        return self._learners(stage.objective, self.freeze_of(stage))

    def freeze_of(self, stage: Stage) -> str:
        """The pattern of what the stage does not train: with LoRA, all but the factors."""
        return lora_lib.pattern() if self.policy.lora else stage.freeze

    def stop_if_asked(self) -> None:
        """Raises Interrupted, in all processes, if one of them got a signal; InputError if the lock is lost."""
        if self._lock:
            self._lock.check()
        self.interruption.check(distributed.agree)

    @property
    def may_finish(self) -> bool:
        """Whether what the trainer holds may be written as what the run came to: its parameters are those of
        `progress` (the base's are, until a checkpoint is restored), and the directory is still this run's."""
        up_to_date = self.restored is None or self.trainer.learner is not None
        return up_to_date and not (self._lock and self._lock.lost)

    def seconds(self) -> float:
        """Seconds that the run has taken so far; where it was stopped and goes on, those before that count, too."""
        return time.monotonic() - self._started

    def export(self, name: str) -> Path:
        """Writes the parameters as a Hugging Face checkpoint."""
        return self.policy.export(self.trainer.parameters(), self.workdir / "checkpoints" / name, self._export_dtype)

    def warm_up_export(self) -> None:
        self.policy.warm_up_export(self.trainer.parameters(), self._export_dtype)
