"""What all stages of a run share: the work directory and its records, data, model, engine, rewards, evaluation."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from ml_collections import ConfigDict

from capcur_jax import metrics, objectives
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
from capcur_jax.models.batching import Buckets
from capcur_jax.models.inputs import Processor
from capcur_jax.rewards.reward import make_reward
from capcur_jax.rollout.engine import Sampling
from capcur_jax.rollout.local import LocalEngine
from capcur_jax.schedule import Stage

DTYPES = ("float32", "bfloat16")


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
        "log.rollouts_every": 1, "log.rollout_prompts": 0, "evaluation.questions": 0,
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
    if max(config.rollout.response_buckets, default=0) < config.rollout.max_new_tokens:
        raise InputError("config.rollout.response_buckets must reach config.rollout.max_new_tokens")
    if max(config.prompt.token_buckets, default=0) < config.prompt.max_tokens:
        raise InputError("config.prompt.token_buckets must reach config.prompt.max_tokens")


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
        self.sets = Sets(config.data, workdir / "data")
        check(config, stages, self.sets)
        self._open_model()
        self.counter = metrics.CompilationCounter()
        self.sampling = _sampling(config, "rollout")
        self._greedy = _sampling(config, "evaluation")
        try:
            self.reward = make_reward(config.reward)
        except ValueError as error:
            raise InputError(str(error)) from None
        self.records = metrics.JsonLines(workdir / "metrics.jsonl")
        self.rollouts = metrics.JsonLines(workdir / "rollouts.jsonl")
        self._learners: dict[tuple[str, str], Learner] = {}
        epsilon = config.objective.advantage_epsilon
        self.advantages = jax.jit(functools.partial(objectives.group_advantages, epsilon=epsilon))
        self._evaluations: list[dict] = []
        self._steps: list[dict] = []
        self.step = self.version = self.skipped_updates = 0

    def _open_model(self) -> None:
        config, prompt = self.config, self.config.prompt
        self.source = Path(config.checkpoint).expanduser()
        kinds = {"remat": config.model.remat, "attention": config.model.attention}
        kinds["dtype"] = _dtype(config.model.dtype, "config.model.dtype")
        if config.checkpoint:
            model = huggingface.load(self.source, **kinds)
        else:
            self.source = fresh.write_skeleton(self.workdir / "skeleton", self._texts(), config.create.to_dict())
            model = huggingface.create(model_config.from_directory(self.source), config.seed, **kinds)
        self.processor = Processor.from_directory(self.source, prompt.min_pixels, prompt.max_pixels)
        self.builder = PromptBuilder(self.processor, prompt.instruction, prompt.max_tokens, prompt.patch_row)
        merged = self.processor.config.vision.merge_size**2
        if prompt.patch_row % merged:
            raise InputError(f"config.prompt.patch_row must be a multiple of {merged}: so many patches make a token")
        self.buckets = Buckets(tuple(prompt.token_buckets), prompt.patch_row, tuple(prompt.patch_rows))
        self.graph, self.parameters = nnx.split(model)
        self.engine = LocalEngine(model, self.processor, max_rows=config.rollout.max_rows, buckets=self.buckets)

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
        for closing in (self.engine, self.reward, self.records, self.rollouts, self.counter):
            closing.close()

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
                freeze=stage.freeze,
                config=self.config,
                temperature=self.config.rollout.temperature,
                banned=self.processor.banned_tokens,
            )
        return self._learners[key]

    def publish(self, parameters: nnx.State, updates: int = 1) -> None:
        """The parameters after an update: what the engine samples from and what is saved."""
        self.parameters, self.version = parameters, self.version + updates
        self.engine.update_weights(parameters, self.version)

    # ------------------------------------------------------------------ what the user sees

    def plan(self) -> None:
        """Writes config and versions; prints stages, data, steps, parameters and devices."""
        config = self.config
        metrics.write_json_atomic(self.workdir / "config.json", config.to_dict())
        metrics.write_json_atomic(self.workdir / "versions.json", metrics.versions())
        sizes = {path[0]: 0 for path, _ in nnx.to_flat_state(self.parameters)}
        for path, leaf in nnx.to_flat_state(self.parameters):
            sizes[path[0]] += leaf.size
        self.parameter_count = sum(sizes.values())
        self.blind = self._blind()
        devices = jax.devices()
        self.display.plan(
            {
                "Run": {
                    "work directory": str(self.workdir),
                    "checkpoint": str(self.source),
                    "parameters": self.parameter_count,
                    "of them vision": sizes["visual"],
                    "compute": config.model.dtype,
                    "devices": f"{len(devices)} x {devices[0].device_kind}",
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

    def evaluate(self, label: str) -> None:
        """Held-out accuracy of every capability now; `label` is "base" or the name of the stage just done."""
        records, started = [], time.monotonic()
        sets = {name: self._questions(name) for name in self.config.evaluation.sets}
        with self.display.progress(f"evaluating ({label})", sum(map(len, sets.values()))) as progress:

            def advance(count: int) -> None:
                self.interruption.check()
                progress(count)

            for name, problems in sets.items():
                result = heldout.evaluate(
                    problems,
                    engine=self.engine,
                    builder=self.builder,
                    reward=self.reward,
                    sampling=self._greedy,
                    seed=self.config.seed,
                    batch=self.config.rollout.max_rows,
                    progress=advance,
                )
                if not result["questions"]:
                    raise InputError(f"no held-out question of '{name}' can be used: {self.builder.reasons()}")
                records.append({"type": "evaluation", "step": self.step, "after": label, "capability": name, **result})
        for record in records:
            self.records.write({**record, "seconds_all": time.monotonic() - started})
        self._evaluations += records
        self.display.evaluation(records)

    def record(self, record: Mapping[str, Any]) -> None:
        """One training step: to metrics.jsonl and the progress bar."""
        self.records.write(record)
        self._steps.append(dict(record))
        self.display.step(record)

    # ------------------------------------------------------------------ what the run leaves

    def export(self, name: str) -> Path:
        """Writes the parameters as a Hugging Face checkpoint."""
        directory = self.workdir / "checkpoints" / name
        dtype = _dtype(self.config.export.dtype, "config.export.dtype")
        huggingface.save(directory, self.parameters, self.processor.config, self.source, dtype)
        return directory

    def finish(self, status: str) -> dict[str, Any]:
        """Saves the checkpoint, summary.json and report.html; prints the closing table."""
        checkpoint = self.export("final")
        accuracy = metrics.accuracy_of(self._evaluations)
        if status != "finished":
            for values in accuracy.values():
                values.pop("final")
        last = self._evaluations[-len(self.config.evaluation.sets) :] if status == "finished" else []
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
            "parameters": self.parameter_count,
            "checkpoint": str(checkpoint),
            "skipped": skipped,
        }
        metrics.write_json_atomic(self.workdir / "summary.json", summary)
        files = {"report": report.write_report(self.workdir), "metrics": self.workdir / "metrics.jsonl"}
        for line in explain_skipped(self.builder):
            self.display.warn(f"left out: {line}")
        self.display.final(summary, files)
        return summary


def _over(function, values: Sequence[float]) -> float | None:
    return float(function(values)) if values else None
