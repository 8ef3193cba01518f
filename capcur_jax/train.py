"""The training loop, from top to bottom: base evaluation, then each stage (warm-up, steps, export, evaluation), result.

Steps are synchronous: rollouts come from the parameters that the update then changes, so old log-probs are the
policy's own where a rollout batch makes one update.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from capcur_jax import metrics, schedule
from capcur_jax.data import pipeline
from capcur_jax.data.packing import UpdateBatch, pack
from capcur_jax.data.problem import Problem
from capcur_jax.data.prompts import target_tokens
from capcur_jax.display import Display
from capcur_jax.errors import InputError
from capcur_jax.interruption import Interrupted, Interruption
from capcur_jax.learner import Learner, TrainState
from capcur_jax.models.batching import PromptSize, padding
from capcur_jax.models.inputs import BadInput, Prompt
from capcur_jax.rewards.reward import Score
from capcur_jax.rollout.engine import Sample
from capcur_jax.run import Run
from capcur_jax.schedule import Stage


class Example(NamedTuple):
    """A problem ready for a step; `target` is an sft row's response."""

    problem: Problem
    prompt: Prompt
    target: np.ndarray | None


def train(config: ConfigDict, workdir: Path, quiet: bool = False, started: float | None = None) -> dict[str, Any]:
    """Runs the schedule and returns the summary; `started` (time.monotonic) is when the process began, if known.

    Raises InputError for what the user has to mend. Whatever ends the run, what was learned so far is saved.
    """
    stages = schedule.stages(config)
    display = Display(total_steps=sum(stage.steps for stage in stages), quiet=quiet)
    with display, Interruption() as interruption, Run(config, workdir, stages, display, interruption, started) as run:
        run.plan()
        try:
            run.evaluate("base")
            for number, stage in enumerate(stages):
                train_stage(run, stage, number)
                if config.export.each_stage and number + 1 < len(stages):
                    run.export(f"{number + 1}-{stage.name}")
                run.evaluate(stage.name)
            status = "finished"
        except Interrupted as signal:
            display.warn(f"{signal}: stopping here; what was learned so far is saved")
            status = "interrupted"
        except Exception:
            run.finish("failed")
            raise
        return run.finish(status)


def train_stage(run: Run, stage: Stage, number: int) -> None:
    """One stage: its own reference policy, its own optimizer state, its own order of data."""
    config, timer = run.config, metrics.PhaseTimer()
    run.display.stage(stage.name, stage.steps)
    learner = run.learner(stage)
    order = pipeline.in_order(run.problems(stage.data, "train"), seed=config.seed + 1000 * number)
    sizes = measure(run, stage, order)
    images = any(size.images for size in sizes)
    reference, state = warm_up(run, stage, learner, sizes, images)
    updates = config.objective.updates_per_batch if stage.objective == "grpo" else 1
    compiled = run.counter.count
    skipped = run.skipped_updates

    batches = pipeline.batches(order, Maker(run, stage), stage.prompts)
    for step in range(stage.steps):
        run.interruption.check()
        timer.reset()
        started = time.perf_counter()
        with timer("data"):
            examples: list[Example] = next(batches)
        rollout = None
        if stage.objective == "grpo":
            with timer("rollout"):
                prompts = [example.prompt for example in examples]
                groups = run.engine.generate(prompts, run.sampling, config.rollout.group, rollout_seed(run), images)
            with timer("reward"):
                rollout = grade(run, examples, groups)
        with timer("update"):
            packed = make_batches(run, examples, rollout, updates, images)
            minibatches = [
                dataclasses.replace(
                    batch,
                    reference_logprobs=learner.score(reference, batch) if reference is not None else None,
                    # One update on a batch: the policy's own log-probs, computed inside it, are the old ones.
                    old_logprobs=learner.score(state.parameters, batch) if rollout and updates > 1 else None,
                )
                for batch in map(jax.device_put, packed)  # once for the reference, old and update passes
            ]
            results = []
            for i, batch in enumerate(minibatches):
                rate = stage.learning_rate_at(step * updates + i, stage.steps * updates)
                state, result = learner.update(state, batch, np.float32(rate))
                results.append(result)
            results = jax.device_get(results)
        with timer("sync"):
            run.publish(state.parameters, updates)

        run.step += 1
        total = time.perf_counter() - started
        record = {
            "type": "step",
            "step": run.step,
            "stage": stage.name,
            "stage_step": step + 1,
            "objective": stage.objective,
            "learning_rate": rate,
            **combine(results),
            **(rollout.metrics(total) if rollout else {}),
            **padding([batch.prompts for batch in packed]),
            "seconds": total,
            **{f"seconds_{phase}": seconds for phase, seconds in timer.seconds.items()},
            "compilations": run.counter.count - compiled,
        }
        run.skipped_updates = record["skipped_updates"] = skipped + record["skipped_updates"]
        compiled = run.counter.count
        run.record(record)
        if rollout and step % config.log.rollouts_every == 0:
            for line in rollout.shown(config.log.rollout_prompts, run.workdir):
                run.rollouts.write({"step": run.step, "stage": stage.name, **line})


def rollout_seed(run: Run) -> int:
    """One stream of samples for each step of each seed."""
    return (run.config.seed * 1_000_003 + run.step * 104_729 + 1) % 2**32


class Maker:
    """Makes a stage's examples from its problems, in the data threads; None for one that can't be used.

    A bad problem is counted once and left out. Data of which nothing is left would be searched for ever, so a whole
    epoch of nothing but bad problems ends the run with the reasons.
    """

    def __init__(self, run: Run, stage: Stage):
        self._run, self._stage, self._bad_in_a_row = run, stage, 0
        self._epoch = len(run.problems(stage.data, "train"))

    def __call__(self, problem: Problem) -> Example | None:
        run = self._run
        try:
            example = Example(problem, run.builder.build(problem), target_of(run, self._stage, problem))
        except BadInput as error:
            run.builder.skip(problem, error)
            self._bad_in_a_row += 1
            if self._bad_in_a_row > 2 * self._epoch:
                raise InputError(f"stage {self._stage.name}: no problem can be used: {run.builder.reasons()}") from None
            return None
        self._bad_in_a_row = 0
        return example


def target_of(run: Run, stage: Stage, problem: Problem) -> np.ndarray | None:
    """The tokens to imitate; None where nothing is imitated. Raises BadInput."""
    if stage.objective != "sft":
        return None
    return target_tokens(run.processor, problem, run.config.rollout.max_new_tokens)


# ---------------------------------------------------------------------- warm-up


def warm_up(
    run: Run, stage: Stage, learner: Learner, sizes: Sequence[PromptSize], images: bool
) -> tuple[Any, TrainState]:
    """Compiles every program that the stage's batches will need; returns the reference policy and the start state.

    The order of the data is known, so the shapes are: `sizes` are those of all its prompts, in order,
    `images` says whether any has one.
    """
    config, known = run.config, run.processor
    grpo = stage.objective == "grpo"
    updates = config.objective.updates_per_batch if grpo else 1
    size = stage.prompts // updates
    shapes = sorted({run.buckets.shape(sizes[at : at + size], images) for at in range(0, len(sizes), size)})
    rows = size * (config.rollout.group if grpo else 1)
    needs_reference = grpo and config.objective.kl_coefficient != 0
    # Updates donate what they are given, so the stage's start is copied.
    reference = jax.tree.map(jnp.copy, run.parameters) if needs_reference else None
    state = learner.start(run.parameters)

    with run.display.progress(f"compiling ({stage.name})", len(shapes) * len(config.rollout.response_buckets)) as done:
        if grpo:
            # As the steps will ask: the engine's batches never reach from one step into the next.
            for at in range(0, len(sizes), stage.prompts):
                run.engine.warm_up(sizes[at : at + stage.prompts], run.sampling, config.rollout.group, images)
            run.advantages(np.zeros((stage.prompts, config.rollout.group), np.float32))
        for shape in shapes:
            for length in config.rollout.response_buckets:
                blank = UpdateBatch(
                    run.buckets.blank(shape, known.config, known.pad_token),
                    np.zeros((rows, length), np.int32),
                    np.ones(rows, np.int32),
                )
                if grpo:
                    zeros = np.zeros((rows, length), np.float32)
                    blank = dataclasses.replace(blank, advantages=zeros[:, 0], sampler_logprobs=zeros)
                    if needs_reference or updates > 1:
                        learner.score.compile(state.parameters, blank)
                    blank = dataclasses.replace(
                        blank,
                        reference_logprobs=zeros if needs_reference else None,
                        old_logprobs=zeros if updates > 1 else None,
                    )
                learner.update.compile(state, blank, np.float32(0))
                run.interruption.check()
                done()
    return reference, state


def measure(run: Run, stage: Stage, order: Any) -> list[PromptSize]:
    """Sizes of the prompts that the stage's steps will see, in order, unusable ones left out; no pixel is decoded."""
    known: dict[Problem, PromptSize | None] = {}
    sizes: list[PromptSize] = []
    problems = len(run.problems(stage.data, "train"))
    at = 0
    while len(sizes) < stage.steps * stage.prompts:
        problem = order[at]
        at += 1
        if problem not in known:
            try:
                target_of(run, stage, problem)
                known[problem] = run.builder.measure(problem)
            except BadInput as error:
                run.builder.skip(problem, error)
                known[problem] = None
        if known[problem] is not None:
            sizes.append(known[problem])
        elif not sizes and at >= problems:
            raise InputError(f"stage {stage.name}: no problem can be used: {run.builder.reasons()}")
    return sizes


# ---------------------------------------------------------------------- rollouts and batches


@dataclasses.dataclass
class Rollout:
    """Graded groups of one step, in the prompts' order."""

    examples: Sequence[Example]
    groups: Sequence[Sequence[Sample]]
    responses: list[str]  # B x G
    scores: list[Score]  # B x G
    rewards_BxG: np.ndarray
    advantages_BxG: np.ndarray

    @property
    def samples(self) -> list[Sample]:
        return [sample for group in self.groups for sample in group]

    def metrics(self, seconds: float) -> dict[str, float]:
        """What the step record says about the rollouts; tokens/s counts response tokens over the whole step."""
        lengths = [len(sample.tokens) for sample in self.samples]
        return {
            "reward": float(self.rewards_BxG.mean()),
            "accuracy": float(np.mean([score.accuracy for score in self.scores])),
            "format": float(np.mean([score.format for score in self.scores])),
            "response_length": float(np.mean(lengths)),
            "truncated": float(np.mean([sample.finish == "length" for sample in self.samples])),
            "equal_groups": float(np.mean(self.rewards_BxG.max(1) == self.rewards_BxG.min(1))),
            "tokens_per_second": sum(lengths) / seconds,
        }

    def shown(self, prompts: int, workdir: Path) -> list[dict[str, Any]]:
        """The first groups as records for rollouts.jsonl; images by their path from the work directory."""
        lines, G = [], self.rewards_BxG.shape[1]
        for b, (example, group) in enumerate(zip(self.examples[:prompts], self.groups, strict=False)):
            problem = example.problem
            samples = [
                {
                    "response": self.responses[b * G + g],
                    "reward": self.scores[b * G + g].reward,
                    "accuracy": self.scores[b * G + g].accuracy,
                    "format": self.scores[b * G + g].format,
                    "advantage": float(self.advantages_BxG[b, g]),
                    "tokens": len(sample.tokens),
                    "finish": sample.finish,
                }
                for g, sample in enumerate(group)
            ]
            lines.append(
                {
                    "id": problem.id,
                    "problem": problem.problem,
                    "answer": problem.answer,
                    "images": [os.path.relpath(image, workdir) for image in problem.images],
                    "samples": samples,
                }
            )
        return lines


def grade(run: Run, examples: Sequence[Example], groups: Sequence[Sequence[Sample]]) -> Rollout:
    """Rewards and advantages of a rollout batch."""
    G = len(groups[0])
    responses = [run.processor.decode(sample.tokens) for group in groups for sample in group]
    scores = run.reward([example.problem for example in examples for _ in range(G)], responses)
    rewards = np.array([score.reward for score in scores], np.float32).reshape(len(groups), G)
    return Rollout(examples, groups, responses, scores, rewards, np.asarray(run.advantages(rewards)))


def make_batches(
    run: Run, examples: Sequence[Example], rollout: Rollout | None, updates: int, images: bool
) -> list[UpdateBatch]:
    """The step's mini-batches: whole groups, in order, `updates` equal parts. `images`: the stage has any."""
    config, known = run.config, run.processor
    size, batches = len(examples) // updates, []
    for at in range(0, len(examples), size):
        part = slice(at, at + size)
        prompts = run.buckets.collate(
            [example.prompt for example in examples[part]], known.config, known.pad_token, images
        )
        if rollout is None:
            tokens, extra = [example.target for example in examples[part]], {}
        else:
            samples = [sample for group in rollout.groups[part] for sample in group]
            tokens = [sample.tokens for sample in samples]
            extra = {
                "advantages": rollout.advantages_BxG[part].reshape(-1),
                "sampler_logprobs": [sample.logprobs for sample in samples],
            }
        batch = pack(prompts, tokens, config.rollout.response_buckets, known.pad_token, **extra)
        batches.append(batch)
    return batches


def combine(results: Sequence[dict[str, np.ndarray]]) -> dict[str, float]:
    """Metrics of a step's updates: means, but the maximum of maxima and the last count of skipped updates."""
    combined = {key: float(np.mean([result[key] for result in results])) for key in results[0]}
    if "logprob_difference_max" in combined:
        combined["logprob_difference_max"] = float(max(result["logprob_difference_max"] for result in results))
    combined["skipped_updates"] = int(results[-1]["skipped_updates"])
    return combined
