"""What all stages of a run share: the work directory and its records, data, model, engine, rewards, evaluation."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict

from capcur_jax import policy
from capcur_jax.checkpointing import Checkpoints, Position, truncate_records
from capcur_jax.checks import check, check_same
from capcur_jax.data.loader import Example
from capcur_jax.data.problem import Problem
from capcur_jax.data.prompts import INSTRUCTION
from capcur_jax.data.sets import Sets
from capcur_jax.devices import distributed, sharding
from capcur_jax.errors import InputError
from capcur_jax.interruption import Interruption
from capcur_jax.learner import objectives
from capcur_jax.learner.layout import Layout, needs_reference
from capcur_jax.learner.learner import Learner, frozen_paths
from capcur_jax.learner.trainer import Offload, Trainer
from capcur_jax.models import fresh, huggingface
from capcur_jax.models import lora as lora_lib
from capcur_jax.models.config import dtype_of
from capcur_jax.records import jsonl, metrics
from capcur_jax.records.display import Display
from capcur_jax.records.sinks import Sinks
from capcur_jax.rewards.reward import make_reward
from capcur_jax.rollout.engine import Sample, sampling_of
from capcur_jax.rollout.groups import Group
from capcur_jax.schedule import Stage


class Run:
    """Opens everything; `stages` are labelled uniquely in their order. Used as a context manager."""

    def __init__(
        self,
        config: ConfigDict,
        workdir: Path,
        stages: Sequence[Stage],
        display: Display,
        interruption: Interruption,
        started: float | None = None,
    ):
        self.started = time.monotonic() if started is None else started
        self.config, self.workdir, self.stages = config, workdir, stages
        self.display, self.interruption = display, interruption
        self.owner = distributed.is_owner()
        with contextlib.ExitStack() as self._closing:  # an error on the way leaves no server and no worker behind
            self._open()
            self._closing = self._closing.pop_all()

    def _open(self) -> None:
        config, workdir, display = self.config, self.workdir, self.display
        self.sets = Sets(config.data, workdir / "data")
        check(config, self.stages, self.sets)
        self._build_data()
        for stage in self.stages:
            self._try_curriculum(stage)
        gpus = config.mesh.gpus
        if gpus and jax.default_backend() == "gpu" and jax.local_device_count() != len(gpus):
            raise InputError(
                f"config.mesh.gpus = {tuple(gpus)}, but JAX has {jax.local_device_count()} of this host's GPUs: start "
                "the run with capcur_jax.main, one process a host, or set CUDA_VISIBLE_DEVICES and leave the key empty"
            )
        self.mesh: Mesh = sharding.make_mesh(config.mesh)
        plain = check_same(workdir, config)
        self.checkpoints = Checkpoints(workdir / "state", keep=config.checkpointing.keep, config=plain)
        self.checkpoint = self.checkpoints.latest()
        self.position, self._counts = (
            Position(),
            {"step": 0, "version": 0, "skipped_updates": 0, "skipped_before": 0, "seconds": 0.0},
        )
        self.evaluations: list[dict] = []
        self._steps: list[dict] = []
        self.best: float | None = None
        if self.checkpoint is not None:
            self._go_on()
        else:
            self._start_anew()
        self.step, self.version = self._counts["step"], self._counts["version"]
        self.skipped_updates = self._counts["skipped_updates"]  # of the whole run
        self.skipped_before = self._counts["skipped_before"]  # of the stages before this one
        self.saved: tuple[int, Position] | None = None  # what the last checkpoint is of
        self.parameter_count, self.blind = 0, {}
        self.measured: dict[str, tuple] = {}  # by stage, what `usable` found before the stage's turn
        self.turns = config.rollout.engine != "local" and config.rollout.sglang.colocate
        self.exports_compiled = False
        opened = self._open_model()
        for stage in self.stages:  # what does not fit together is said before anything is computed
            Layout.of(stage, config, self.buckets, self.processor, self.mesh, images=True)
            frozen_paths(self.parameters, self.freeze_of(stage))
        self.counter = self._closing.enter_context(contextlib.closing(metrics.CompilationCounter()))
        self.sampling = sampling_of(config, "rollout")
        self.greedy, self.validating = sampling_of(config, "evaluation"), sampling_of(config, "validation")
        try:
            self.reward = make_reward(config.reward)
        except ValueError as error:
            raise InputError(str(error)) from None
        self._closing.callback(self.reward.close)
        self._open_engine(opened)  # last of what may fail: servers take minutes to start
        self.records = self._lines("metrics.jsonl")
        self.rollouts = self._lines("rollouts.jsonl")
        self.sinks = None
        if self.owner:
            kinds = {"tensorboard": config.log.tensorboard, "wandb": config.log.wandb}
            self.sinks = Sinks(workdir, **kinds, config=plain, resume_step=self.step, warn=display.warn)
            self._closing.callback(self.sinks.close)
        self._learners: dict[tuple[str, str], Learner] = {}
        settings = config.objective
        self._advantages = jax.jit(
            functools.partial(
                objectives.group_advantages, epsilon=settings.advantage_epsilon, normalise=settings.advantage_std
            )
        )

    def _lines(self, name: str) -> jsonl.JsonLines | jsonl.Nowhere:
        """Records of the owner; the other processes write none."""
        if not self.owner:
            return jsonl.Nowhere()
        return self._closing.enter_context(jsonl.JsonLines(self.workdir / name))

    def _build_data(self) -> None:
        """The owner builds the sets that are built on first use; the others read what it wrote."""
        names = {name for stage in self.stages for name in stage.data} | set(self.config.evaluation.sets)
        for turn in (True, False):
            if self.owner == turn:
                for name in sorted(names):
                    self.sets.path(
                        name, "train" if not self.sets.missing(name, "train") else self.config.evaluation.split
                    )
            distributed.barrier(f"data-{turn}")

    def _start_anew(self) -> None:
        """What a run left that was stopped before its first checkpoint is removed.

        Raises InputError where steps were recorded: their checkpoints were taken away.
        """
        records = self.workdir / "metrics.jsonl"
        if records.exists() and any(record["type"] == "step" for record in jsonl.read_jsonl(records)):
            raise InputError(
                f"{self.workdir} holds the records of a run but no checkpoint in {self.checkpoints.directory}: "
                "put them back, or give another --workdir"
            )
        if self.owner:
            for name in ("metrics.jsonl", "rollouts.jsonl"):
                (self.workdir / name).unlink(missing_ok=True)
        distributed.barrier("anew")

    def _go_on(self) -> None:
        """Takes up the run where the last checkpoint left it: its records end there, too."""
        stored = self.checkpoints.position(self.checkpoint)
        self.position, self._counts = Position(**stored["position"]), stored["counts"]
        self.best, self.started = stored["best"], self.started - self._counts["seconds"]
        if self.owner:
            for name, size in stored["bytes"].items():
                truncate_records(self.workdir / name, size)
        distributed.barrier("records")
        for record in jsonl.read_jsonl(self.workdir / "metrics.jsonl"):
            if record["type"] == "step":
                self._steps.append(record)
            elif record["type"] == "evaluation":
                self.evaluations.append(record)
        if self.owner:
            self.display.warn(f"{self.workdir}: going on after step {self._counts['step']}")

    def _open_model(self) -> policy.Opened:
        config = self.config
        self.source = Path(config.checkpoint).expanduser()
        if not config.checkpoint:
            self.source = self.workdir / "skeleton"
            if self.owner and not self.source.exists():
                fresh.write_skeleton(self.source, self._texts(), config.create.to_dict())
            distributed.barrier("skeleton")
        opened = policy.open_model(config, self.source, self.mesh, self.display.warn)
        self.processor, self.builder, self.buckets = opened.processor, opened.builder, opened.buckets
        self.lora = opened.lora
        self._closing.enter_context(opened.images)
        self.graph, self.parameters = nnx.split(opened.model)
        return opened

    def _open_engine(self, opened: policy.Opened) -> None:
        config = self.config
        with self.display.progress(f"rollout engine ({config.rollout.engine})"):
            self.engine = policy.open_engine(config, opened, self.workdir, self.mesh)
            self._closing.callback(self.engine.close)
            if self.checkpoint is None:  # else `trainer` has what it holds
                self.engine.update_weights(self.parameters, self.version)
        self.display.watch(self.engine.health)

    def _texts(self):
        """What a fresh model's tokenizer is trained on: the training questions, answers and the instruction.

        Of all of config.stages, whichever of them are run now: stages run one by one share a tokenizer.
        """
        for stage in self.config.stages.values():
            for problem in self.problems(stage.data, "train"):
                # As the prompt has it: roles, question, instruction. The tokenizer's own marks stay whole anyway.
                yield f"user\n{problem.problem} {INSTRUCTION if problem.answer else ''}\nassistant\n"
                yield problem.response or problem.answer

    def __enter__(self) -> Run:
        return self

    def __exit__(self, kind: type[BaseException] | None, *unused) -> None:
        self._closing.close()
        if kind is None or distributed.process_count() == 1:  # closing meets the other processes, which are elsewhere
            self.checkpoints.close()

    def problems(self, names: Sequence[str], split: str) -> list[Problem]:
        """The problems of several sets, one after the other."""
        return [problem for name in names for problem in self.sets.problems(name, split)]

    def selected(self, stage: Stage) -> list[list[Problem]]:
        """The training problems of each of the stage's sets that its curriculum leaves. Raises InputError."""
        return [
            stage.curriculum.select(self.sets.problems(name, "train"), f"config.data.sets.{name}.train")
            for name in stage.data
        ]

    def _try_curriculum(self, stage: Stage) -> None:
        """What a curriculum lacks is said before the start. Raises InputError."""
        counts = [len(problems) for problems in self.selected(stage)]
        if stage.epochs:
            stage.curriculum.steps(counts, stage.prompts, stage.epochs, f"config.stages.{stage.name}")

    def learner(self, stage: Stage) -> Learner:
        """Stages with the same objective and the same frozen parameters share their compiled programs."""
        key = stage.objective, self.freeze_of(stage)
        if key not in self._learners:
            self._learners[key] = Learner(
                self.graph,
                self.parameters,
                objective=stage.objective,
                freeze=key[1],
                config=self.config,
                temperature=self.config.rollout.temperature,
                banned=self.processor.banned_tokens,
                mesh=self.mesh,
            )
        return self._learners[key]

    def freeze_of(self, stage: Stage) -> str:
        """The pattern of what the stage does not train: with LoRA, all but the factors."""
        return lora_lib.pattern() if self.lora else stage.freeze

    def begin_stage(self) -> None:
        """The devices are the trainer's while its state is made and its programs are compiled, where it and the engine
        take turns on them."""
        if self.turns:
            self.engine.release()

    def begin_update(self, trainer: Trainer) -> None:
        """They are the trainer's again."""
        if self.turns and trainer.away:
            self.engine.release()
            trainer.enter()

    def hand_over(self, trainer: Trainer) -> dict[str, float]:
        """They are the engine's, with the present weights; what is on them of the trainer goes to the host. Seconds of
        the weights' way by phase."""
        if self.turns:
            trainer.leave()
            self.parameters = trainer.parameters()
            self.engine.resume()
        return self.engine.update_weights(self.parameters, self.version)

    def publish(self, trainer: Trainer, updates: int, sampled: bool = True) -> dict[str, float]:
        """The parameters after an update: what is saved and, if something is `sampled` before the next one, what the
        engine samples from. Seconds by phase."""
        self.parameters, self.version = trainer.parameters(), self.version + updates
        return self.hand_over(trainer) if sampled else {}

    def trainer(self, stage: Stage, number: int) -> Trainer:
        """The stage's state: a fresh one around the present parameters, or the one that the last checkpoint holds."""
        self.parameters = sharding.on_devices(self.parameters)
        config, learner = self.config, self.learner(stage)
        trained, frozen = learner.split(self.parameters)
        name = f"{number}-{stage.name}"
        resumed = self.checkpoint is not None and self.position.stage == number
        wanted = objectives.of_stage(stage).sampled and needs_reference(config)
        dtype = dtype_of(config.reference.dtype, "config.reference.dtype")
        if resumed:
            shapes = learner.abstract_state()
            reference = jax.tree.map(lambda leaf: sharding.shape_of(leaf, dtype), shapes.trained) if wanted else None
            start = {
                "frozen": jax.tree.map(sharding.shape_of, frozen),
                "reference": reference,
                "stage": jax.ShapeDtypeStruct((), np.int32),
            }
            start = self.checkpoints.restore_reference(name, start)
            frozen, copied = start["frozen"], start["reference"]
            state = self.checkpoints.restore(self.checkpoint, shapes)
            self.checkpoint = None
            self.parameters = nnx.merge_state(state.trained, frozen)
            if not self.turns:  # else `hand_over` follows
                self.engine.update_weights(self.parameters, self.version)
        else:
            # Updates donate what they are given, so the stage's start is copied.
            copied = learner.copy_as(trained, dtype) if wanted else None
            # The number is an array at least, where nothing is frozen and there is no reference.
            self.checkpoints.save_reference(name, {"frozen": frozen, "reference": copied, "stage": np.int32(number)})
            self.skipped_before = self.skipped_updates
            state = learner.start(trained)
            self.position = Position(stage=number, evaluated=True)
        trainer = Trainer(learner, self.mesh, state, frozen, reference=copied)
        trainer.offload = Offload.of(config.optimizer.memory, state.optimizer, "config.optimizer.memory")
        trainer.offload_reference = Offload.of(config.reference.memory, copied, "config.reference.memory")
        trainer.to_host()
        if not resumed:
            self.save(trainer, wait=True)
        return trainer

    def save(self, trainer: Trainer, metric: float | None = None, wait: bool = False) -> None:
        """A checkpoint from which the run goes on here; written in the background."""
        counts = {
            "step": self.step,
            "version": self.version,
            "skipped_updates": self.skipped_updates,
            "skipped_before": self.skipped_before,
            "seconds": time.monotonic() - self.started,
        }
        sizes = {file.path.name: file.path.stat().st_size for file in (self.records, self.rollouts) if self.owner}
        position = {
            "position": dataclasses.asdict(self.position),
            "counts": counts,
            "best": self.best,
            "bytes": sizes,
        }
        # A stage's start has a number of its own beside the end of the stage before.
        self.checkpoints.save(self.step + self.position.stage, trainer.state, position, metric=metric, wait=wait)
        self.saved = self.step, self.position

    def save_and_wait(self, trainer: Trainer) -> None:
        """The state as it is now is on the disk when this returns."""
        if self.saved != (self.step, self.position):  # one of a validated step keeps its metric
            self.save(trainer, wait=True)
        self.checkpoints.latest()

    def consumed_batch(self) -> None:
        """One more rollout batch was used; a run that goes on takes up the count."""
        self.position = dataclasses.replace(self.position, batches=self.position.batches + 1)

    def rollout_seed(self, attempt: int = 0, ahead: int = 0) -> int:
        """One stream of samples for each step of each seed; `ahead`: of a step to come."""
        return (self.config.seed * 1_000_003 + (self.step + ahead) * 104_729 + attempt * 15_485_863 + 1) % 2**32

    def grade(self, examples: Sequence[Example], drawn: Sequence[Sequence[Sample]]) -> list[Group]:
        """Rewards and advantages of a rollout batch."""
        G = len(drawn[0])
        responses = [self.processor.decode(sample.tokens) for samples in drawn for sample in samples]
        scores = self.reward([example.problem for example in examples for _ in range(G)], responses)
        rewards = np.array([score.reward for score in scores], np.float32).reshape(len(drawn), G)
        advantages = np.asarray(self._advantages(rewards))
        return [
            Group(example, samples, responses[b * G : (b + 1) * G], scores[b * G : (b + 1) * G], advantages[b])
            for b, (example, samples) in enumerate(zip(examples, drawn, strict=True))
        ]

    def warm_up_advantages(self, prompts: int) -> None:
        """Compiles what `grade` computes for so many prompts."""
        self._advantages(np.zeros((prompts, self.config.rollout.group), np.float32))

    def capabilities(self, stage: Stage) -> tuple[str, ...]:
        """Those of the stage's problems, in the same order in every process."""
        return tuple(sorted({problem.capability for problem in self.problems(stage.data, "train")}))

    # ------------------------------------------------------------------ what the user sees

    def _write(self, record: Mapping[str, Any]) -> None:
        self.records.write(record)
        if self.sinks:
            self.sinks.write(record)

    def record(self, record: Mapping[str, Any]) -> None:
        """One training step: to metrics.jsonl and the progress bar."""
        self._write(record)
        self._steps.append(dict(record))
        self.skipped_updates = record["skipped_updates"]
        self.display.step(record)

    # ------------------------------------------------------------------ what the run leaves

    def export(self, name: str) -> Path:
        """Writes the parameters as a Hugging Face checkpoint."""
        directory = self.workdir / "checkpoints" / name
        dtype = dtype_of(self.config.export.dtype, "config.export.dtype")
        huggingface.save(directory, self.parameters, self.processor.config, self.source, dtype, lora=self.lora)
        return directory
