"""What all stages of a run share: the work directory and its records, data, model, engine, rewards, evaluation."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict

from capcur_jax import distributed, metrics, objectives, sharding
from capcur_jax.checkpointing import Checkpoints, check_same_config, truncate_records
from capcur_jax.data.blind import blind_accuracy
from capcur_jax.data.pipeline import Sets
from capcur_jax.data.problem import Problem
from capcur_jax.data.prompts import INSTRUCTION, PromptBuilder, explain_skipped
from capcur_jax.display import Display
from capcur_jax.errors import InputError
from capcur_jax.evaluation import heldout, report
from capcur_jax.interruption import Interruption
from capcur_jax.learner import Learner
from capcur_jax.models import config as model_config
from capcur_jax.models import fresh, huggingface
from capcur_jax.models import lora as lora_lib
from capcur_jax.models.batching import Buckets
from capcur_jax.models.inputs import Processor
from capcur_jax.models.lora import LoRA
from capcur_jax.rewards.reward import make_reward
from capcur_jax.rollout.engine import Sample, Sampling
from capcur_jax.rollout.local import LocalEngine
from capcur_jax.rollouts import Example, Group
from capcur_jax.schedule import Stage
from capcur_jax.sinks import Sinks
from capcur_jax.updates import Offload, Trainer, needs_reference

DTYPES = ("float32", "bfloat16")
# What a run that goes on may have changed: where it computes, what it writes, and how long it is.
MAY_CHANGE = ("mesh", "log", "checkpointing", "export", "reference.memory", "optimizer.memory", "reward.workers")


@dataclasses.dataclass(frozen=True)
class Position:
    """Where a run stands: what of a checkpoint is not arrays."""

    stage: int = 0  # number in config.order
    stage_step: int = 0  # steps of it that are done
    batches: int = 0  # rollout batches of it that were drawn
    evaluated: bool = False  # the base was


def _dtype(name: str, key: str):
    if name not in DTYPES:
        raise InputError(f"{key} = {name!r}; choose one of {', '.join(DTYPES)}")
    return jnp.dtype(name)


def _sampling(config: ConfigDict, key: str) -> Sampling:
    try:
        return Sampling(config.rollout.max_new_tokens, config[key].temperature, config[key].top_p)
    except ValueError as error:
        raise InputError(f"config.{key}: {error}") from None


def check(config: ConfigDict, stages: Sequence[Stage], sets: Sets) -> None:
    """Everything the run needs from outside, missing things named all at once. Raises InputError."""
    missing = []
    if not config.checkpoint and not config.create:
        missing.append("config.checkpoint: a Hugging Face checkpoint directory of a Qwen3-VL (--config.checkpoint=DIR)")
    needed = {(name, "train") for stage in stages for name in stage.data}
    needed |= {(name, config.evaluation.split) for name in config.evaluation.sets}
    if config.validation.every:
        needed |= {(name, "validation") for name in config.evaluation.sets}
    for name, split in sorted(needed):
        if name not in config.data.sets:
            missing.append(f"config.evaluation.sets names '{name}', which config.data.sets lacks")
            continue
        entry = config.data.sets[name]
        if split not in entry or split == "source":
            missing.append(f"config.evaluation.split = {split!r}; choose train, validation or test")
        elif sets.missing(name, split):
            missing.append(f"config.data.sets.{name}.{split}: {sets.missing(name, split)}")
        elif entry[split] and not sets.path(name, split).is_file():
            missing.append(f"config.data.sets.{name}.{split}: {sets.path(name, split)} does not exist")
    if missing:
        raise InputError("\n".join(["this run needs what is not there:", *(f"  - {line}" for line in missing)]))
    _check_numbers(config, stages)


def _check_numbers(config: ConfigDict, stages: Sequence[Stage]) -> None:
    """Values that would otherwise fail hours later, or quietly train nothing."""
    least = {
        "seed": 0, "prompt.max_tokens": 1, "rollout.max_rows": 1, "objective.updates_per_batch": 1,
        "log.rollouts_every": 1, "log.rollout_prompts": 0, "evaluation.questions": 0, "rollout.dynamic_retries": 0,
        "packing.micro_prompts": 0, "checkpointing.every": 1, "checkpointing.keep": 1, "validation.every": 0,
        "validation.questions": 0,
    }  # fmt: skip
    if any(stage.objective == "grpo" for stage in stages):
        least["rollout.group"] = 2  # an advantage is a comparison inside the group
    for key, value in least.items():
        section, _, name = key.rpartition(".")
        if (config[section] if section else config)[name] < value:
            raise InputError(f"config.{key} must be at least {value}")
    for stage in stages:
        if stage.prompts < 1:
            raise InputError(f"config.stages.{stage.name}.prompts must be at least 1")
        if stage.objective != "grpo":
            continue
        if stage.prompts % config.objective.updates_per_batch:
            raise InputError(
                f"config.stages.{stage.name}.prompts = {stage.prompts} can't be split into "
                f"config.objective.updates_per_batch = {config.objective.updates_per_batch} equal updates"
            )
        if config.rollout.temperature <= 0:
            raise InputError("config.rollout.temperature must be above 0: greedy groups are all equal")
    if max(config.prompt.token_buckets, default=0) < config.prompt.max_tokens:
        raise InputError("config.prompt.token_buckets must reach config.prompt.max_tokens")


def check_same(workdir: Path, config: ConfigDict) -> dict[str, Any]:
    """The config in plain JSON types; raises InputError if the directory holds a run with another one."""
    plain, stored = json.loads(metrics.to_json(config.to_dict())), workdir / "config.json"
    if stored.exists():
        check_same_config(json.loads(stored.read_text(encoding="utf-8")), plain, MAY_CHANGE)
    return plain


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
        self._closing = contextlib.ExitStack()
        self.sets = Sets(config.data, workdir / "data")
        check(config, stages, self.sets)
        self._build_data()
        self.mesh: Mesh = sharding.make_mesh(config.mesh)
        plain = check_same(workdir, config)
        self.checkpoints = self._closing.enter_context(
            Checkpoints(workdir / "state", keep=config.checkpointing.keep, config=plain)
        )
        self.checkpoint = self.checkpoints.latest()
        self.position, self._counts = Position(), {"step": 0, "version": 0, "skipped_updates": 0, "seconds": 0.0}
        self.evaluations: list[dict] = []
        self._steps: list[dict] = []
        self.best: float | None = None
        if self.checkpoint is not None:
            self._go_on()
        else:
            self._start_anew()
        self.step, self.version = self._counts["step"], self._counts["version"]
        self.skipped_updates = self.skipped_before = self._counts["skipped_updates"]
        self._open_model()
        self.counter = self._closing.enter_context(contextlib.closing(metrics.CompilationCounter()))
        self.sampling = _sampling(config, "rollout")
        self._greedy, self._validating = _sampling(config, "evaluation"), _sampling(config, "validation")
        try:
            self.reward = make_reward(config.reward)
        except ValueError as error:
            raise InputError(str(error)) from None
        self._closing.callback(self.reward.close)
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

    def _lines(self, name: str) -> metrics.JsonLines | _Nowhere:
        """Records of the owner; the other processes write none."""
        if not self.owner:
            return _Nowhere()
        return self._closing.enter_context(metrics.JsonLines(self.workdir / name))

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
        """What a run left that was stopped before its first checkpoint is removed."""
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
        for record in metrics.read_jsonl(self.workdir / "metrics.jsonl"):
            if record["type"] == "step":
                self._steps.append(record)
            elif record["type"] == "evaluation":
                self.evaluations.append(record)
        self.display.warn(f"{self.workdir}: going on after step {self._counts['step']}")

    def _open_model(self) -> None:
        config, prompt = self.config, self.config.prompt
        self.source = Path(config.checkpoint).expanduser()
        kinds = {"remat": config.model.remat, "attention": config.model.attention, "mesh": self.mesh}
        kinds["dtype"] = _dtype(config.model.dtype, "config.model.dtype")
        kinds["param_dtype"] = _dtype(config.optimizer.parameters, "config.optimizer.parameters")
        lora = config.model.lora
        self.lora = kinds["lora"] = LoRA(lora.rank, lora.alpha, tuple(lora.targets)) if lora.rank else None
        place = functools.partial(sharding.of_parameter, self.mesh)
        if config.checkpoint:
            model = huggingface.load(self.source, seed=config.seed, sharding=place, **kinds)
        else:
            self.source = self.workdir / "skeleton"
            if self.owner and not self.source.exists():
                fresh.write_skeleton(self.source, self._texts(), config.create.to_dict())
            distributed.barrier("skeleton")
            model = huggingface.create(model_config.from_directory(self.source), config.seed, sharding=place, **kinds)
        self.processor = Processor.from_directory(self.source, prompt.min_pixels, prompt.max_pixels)
        self.builder = PromptBuilder(self.processor, prompt.instruction, prompt.max_tokens, prompt.patch_row)
        merged = self.processor.config.vision.merge_size**2
        if prompt.patch_row % merged:
            raise InputError(f"config.prompt.patch_row must be a multiple of {merged}: so many patches make a token")
        self.buckets = Buckets(tuple(prompt.token_buckets), prompt.patch_row, tuple(prompt.patch_rows))
        self.graph, self.parameters = nnx.split(model)
        self.engine = LocalEngine(
            model, self.processor, max_rows=config.rollout.max_rows, buckets=self.buckets, mesh=self.mesh
        )
        self._closing.callback(self.engine.close)

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

    def __exit__(self, *unused) -> None:
        self._closing.close()

    def problems(self, names: Sequence[str], split: str) -> list[Problem]:
        """The problems of several sets, one after the other."""
        return [problem for name in names for problem in self.sets.problems(name, split)]

    def learner(self, stage: Stage) -> Learner:
        """Stages with the same objective and the same frozen parameters share their compiled programs."""
        key = stage.objective, stage.freeze
        if key not in self._learners:
            self._learners[key] = Learner(
                self.graph,
                self.parameters,
                objective=stage.objective,
                freeze=lora_lib.pattern() if self.lora else stage.freeze,
                config=self.config,
                temperature=self.config.rollout.temperature,
                banned=self.processor.banned_tokens,
                mesh=self.mesh,
            )
        return self._learners[key]

    def publish(self, parameters: nnx.State, updates: int = 1) -> None:
        """The parameters after an update: what the engine samples from and what is saved."""
        self.parameters, self.version = parameters, self.version + updates
        self.engine.update_weights(parameters, self.version)

    def trainer(self, stage: Stage, number: int) -> Trainer:
        """The stage's state: a fresh one around the present parameters, or the one that the last checkpoint holds."""
        config, learner = self.config, self.learner(stage)
        trained, frozen = learner.split(self.parameters)
        name = f"{number}-{stage.name}"
        resumed = self.checkpoint is not None and self._resuming(number)
        wanted = stage.objective == "grpo" and needs_reference(config)
        dtype = _dtype(config.reference.dtype, "config.reference.dtype")
        # Updates donate what they are given, so the stage's start is copied.
        copied = learner.copy_as(trained, dtype) if wanted else None
        if resumed:
            start = {"frozen": frozen, "reference": copied}
            start = self.checkpoints.restore_reference(name, jax.tree.map(sharding.shape_of, start))
            frozen, copied = start["frozen"], start["reference"]
            state = self.checkpoints.restore(self.checkpoint, jax.tree.map(sharding.shape_of, learner.start(trained)))
            self.checkpoint = None
            self.parameters = nnx.merge_state(state.trained, frozen)
            self.engine.update_weights(self.parameters, self.version)
        else:
            self.checkpoints.save_reference(name, {"frozen": frozen, "reference": copied})
            state = learner.start(trained)
            self.position = Position(stage=number, evaluated=True)
        trainer = Trainer(learner, self.mesh, state, frozen, reference=copied)
        trainer.offload = Offload.of(config.optimizer.memory, state.optimizer, "config.optimizer.memory")
        trainer.offload_reference = Offload.of(config.reference.memory, copied, "config.reference.memory")
        trainer.to_host()
        if not resumed:
            self.save(trainer, wait=True)
        return trainer

    def _resuming(self, number: int) -> bool:
        return self.position.stage == number

    def save(self, trainer: Trainer, metric: float | None = None, wait: bool = False) -> None:
        """A checkpoint from which the run goes on here; written in the background."""
        counts = {
            "step": self.step,
            "version": self.version,
            "skipped_updates": self.skipped_updates,
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

    def next_batch(self, batches: Iterator[list[Example]]) -> list[Example]:
        """The next rollout batch of this process; a run that goes on takes up the count."""
        self.position = dataclasses.replace(self.position, batches=self.position.batches + 1)
        return next(batches)

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

    def plan(self) -> None:
        """Writes config and versions; prints stages, data, steps, parameters and devices."""
        config = self.config
        if self.owner:
            metrics.write_json_atomic(self.workdir / "config.json", config.to_dict())
            metrics.write_json_atomic(self.workdir / "versions.json", metrics.versions())
        sizes = {path[0]: 0 for path, _ in nnx.to_flat_state(self.parameters)}
        for path, leaf in nnx.to_flat_state(self.parameters):
            sizes[path[0]] += leaf.size
        self.parameter_count = sum(sizes.values())
        self.blind = self._blind()
        devices, rows = jax.devices(), sharding.row_shards(self.mesh)
        self.display.plan(
            {
                "Run": {
                    "work directory": str(self.workdir),
                    "checkpoint": str(self.source),
                    "parameters": self.parameter_count,
                    "of them vision": sizes["visual"],
                    "compute": config.model.dtype,
                    "devices": f"{len(devices)} x {devices[0].device_kind}",
                    "mesh": " x ".join(f"{axis} {size}" for axis, size in self.mesh.shape.items())
                    + f": {rows} device rows, each with its own prompts",
                    **distributed.describe(),
                    "seed": config.seed,
                },
                "Stages": [self._plan_of(stage) for stage in self.stages],
                f"Held-out questions ({config.evaluation.split})": [
                    {
                        "set": name,
                        "questions": len(self._questions(name)),
                        "blind guess": f"{self.blind[name]:.1%}" if name in self.blind else "",
                    }
                    for name in config.evaluation.sets
                ],
            }
        )
        self.display.table("Where parameters lie", sharding.described(self.mesh, self.parameters))
        for (name, split), lines in self.sets.skipped_rows.items():
            self.display.warn(f"{name} {split}: {len(lines)} rows skipped, the first: {lines[0]}")

    def _plan_of(self, stage: Stage) -> dict[str, Any]:
        group = f" x {self.config.rollout.group}" if stage.objective == "grpo" else ""
        return {
            "stage": stage.name,
            "data": " + ".join(stage.data),
            "problems": len(self.problems(stage.data, "train")),
            "objective": stage.objective,
            "steps": stage.steps,
            "a step": f"{stage.prompts}{group}",
            "learning rate": f"{stage.learning_rate:g}",
            "frozen": stage.freeze or "nothing",
        }

    def _blind(self) -> dict[str, float]:
        """The best accuracy without looking, for each held-out set with images."""
        if not self.config.evaluation.blind:
            return {}
        blind = {}
        for name in self.config.evaluation.sets:
            questions = self._questions(name)
            if any(problem.images for problem in questions) and name in {n for s in self.stages for n in s.data}:
                blind[name] = blind_accuracy(self.sets.problems(name, "train"), questions)
        return blind

    def _questions(self, name: str) -> list[Problem]:
        problems = self.sets.problems(name, self.config.evaluation.split)
        return problems[: self.config.evaluation.questions or None]

    def _accuracies(
        self, title: str, split: str, questions: int, sampling: Sampling, stoppable: bool
    ) -> list[dict[str, Any]]:
        """Accuracy of every capability now, on the first `questions` of a split (0: all)."""
        results = []
        sets = {name: self.sets.problems(name, split)[: questions or None] for name in self.config.evaluation.sets}
        with self.display.progress(title, sum(map(len, sets.values()))) as progress:

            def advance(count: int) -> None:
                if stoppable:
                    self.interruption.check(distributed.agree)
                progress(count)

            for name, problems in sets.items():
                result = heldout.evaluate(
                    problems,
                    engine=self.engine,
                    builder=self.builder,
                    reward=self.reward,
                    sampling=sampling,
                    seed=self.config.seed,
                    batch=self.config.rollout.max_rows,
                    progress=advance,
                )
                if not result["questions"]:
                    raise InputError(f"no {split} question of '{name}' can be used: {self.builder.reasons()}")
                results.append({"capability": name, **result})
        return results

    def evaluate(self, label: str) -> None:
        """Held-out accuracy of every capability now; `label` is "base" or the name of the stage just done."""
        settings, started = self.config.evaluation, time.monotonic()
        results = self._accuracies(f"evaluating ({label})", settings.split, settings.questions, self._greedy, True)
        records = [{"type": "evaluation", "step": self.step, "after": label, **result} for result in results]
        for record in records:
            self._write({**record, "seconds_all": time.monotonic() - started})
        self.evaluations += records
        self.position = dataclasses.replace(self.position, evaluated=True)
        self.display.evaluation(records)

    def validate(self, stage: str) -> float:
        """Mean accuracy over the capabilities on validation questions; the best so far is exported.

        A signal to stop waits for its end: the checkpoint of this step is to have the figure.
        """
        settings, started = self.config.validation, time.monotonic()
        results = self._accuracies(f"validating ({stage})", "validation", settings.questions, self._validating, False)
        accuracy = statistics.fmean(result["accuracy"] for result in results)
        record = {
            "type": "validation",
            "step": self.step,
            "stage": stage,
            "accuracy": accuracy,
            **{result["capability"]: {k: v for k, v in result.items() if k != "by_kind"} for result in results},
            "seconds_all": time.monotonic() - started,
        }
        self._write(record)
        if self.best is None or accuracy > self.best:
            self.best = accuracy
            self.export("best")
        return accuracy

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
        dtype = _dtype(self.config.export.dtype, "config.export.dtype")
        huggingface.save(directory, self.parameters, self.processor.config, self.source, dtype, lora=self.lora)
        return directory

    def finish(self, status: str) -> dict[str, Any]:
        """Saves the checkpoint, summary.json and report.html; prints the closing table."""
        checkpoint = self.export("final")
        self.checkpoints.close()
        accuracy = metrics.accuracy_of(self.evaluations)
        if status != "finished":
            for values in accuracy.values():
                values.pop("final")
        last = self.evaluations[-len(self.config.evaluation.sets) :] if status == "finished" else []
        rollout_steps = [step for step in self._steps if step["objective"] == "grpo"]
        skipped = {
            "rows": sum(map(len, self.sets.skipped_rows.values())),
            "images": self.builder.counts["images"],
            "prompts": self.builder.counts["prompts"],
            "updates": self.skipped_updates,
            **self.reward.counters(),
        }
        summary = {
            "status": status,
            "accuracy": accuracy,
            "blind": self.blind,
            "seconds": time.monotonic() - self.started,
            "step_seconds_median": _over(statistics.median, [step["seconds"] for step in self._steps]),
            "compilations_after_warmup": sum(step["compilations"] for step in self._steps),
            "logprob_difference_mean": _over(
                statistics.fmean, [step["logprob_difference_mean"] for step in rollout_steps]
            ),
            "format_reward_final": _over(statistics.fmean, [record["format"] for record in last]),
            "steps": self.step,
            "best_validation": self.best,
            "parameters": self.parameter_count,
            "checkpoint": str(checkpoint),
            "skipped": skipped,
        }
        if not self.owner:
            return summary
        metrics.write_json_atomic(self.workdir / "summary.json", summary)
        files = {"report": report.write_report(self.workdir), "metrics": self.workdir / "metrics.jsonl"}
        for line in explain_skipped(self.builder):
            self.display.warn(f"left out: {line}")
        self.display.final(summary, files)
        return summary


class _Nowhere:
    """Stands for a record file in processes that write none."""

    def write(self, record: Mapping[str, Any]) -> None:
        pass


def _over(function, values: Sequence[float]) -> float | None:
    return float(function(values)) if values else None
