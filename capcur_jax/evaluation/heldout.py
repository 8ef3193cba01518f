"""Held-out accuracy of each capability: greedy answers to the same questions before the run and after each stage."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from capcur_jax import policy
from capcur_jax.data.draw import shares
from capcur_jax.data.problem import Problem
from capcur_jax.data.prompts import PromptBuilder
from capcur_jax.data.sets import Sets
from capcur_jax.devices import distributed
from capcur_jax.errors import InputError
from capcur_jax.evaluation import statistics
from capcur_jax.evaluation.keeper import Keeper
from capcur_jax.evaluation.local import answers
from capcur_jax.models.inputs import BadInput, Processor
from capcur_jax.rewards.reward import Reward, Score
from capcur_jax.rollout.engine import Engine, Sample, Sampling, sampling_of


def evaluate(
    problems: Sequence[Problem],
    *,
    engine: Engine,
    builder: PromptBuilder,
    reward: Reward,
    sampling: Sampling,
    seed: int = 0,
    batch: int = 80,
    progress: Callable[[int], None] = lambda count: None,
    keep: Callable[[int, str, Sample | None, Score | None], None] = lambda place, text, sample, score: None,
) -> dict:
    """One answer to each problem.

    Args:
        keep: told of each problem that this process asks: its place, the response, the sample and its score; of one
            that is left out "", None and None.

    Returns:
        accuracy: the share that is right of all problems, also of those that are left out because their prompt can't be
            built or is refused: who leaves out what is hard must not look better. `by_kind`: the same of each kind.
        standard_error: of `accuracy`; questions about the same images are right or wrong together.
        accuracy_answered, format, response_length: means over the others, `questions`; `left_out`: how many are not.
        timed_out: answers whose grading took too long, which count as wrong.
    """
    processor: Processor = builder.processor
    kinds = sorted({problem.kind for problem in problems if problem.kind})
    # Right answers, well-formed ones, tokens, answered, left out, timed out: of all problems, and of each kind.
    sums = np.zeros((1 + len(kinds), 6))
    places = {id(problem): at for at, problem in enumerate(problems)}
    right_of = np.zeros(len(problems))  # by problem: wrong where it is left out, or another process's

    def add(problem: Problem, *values: float) -> None:
        for row in [0, *([1 + kinds.index(problem.kind)] if problem.kind else [])]:
            sums[row] += values

    images = any(problem.images for problem in problems)
    found = answers(
        problems, engine=engine, build=builder.try_build, sampling=sampling, seed=seed, batch=batch, images=images
    )
    for size, answered in found:
        for problem, sample in answered:
            if sample is None:  # no prompt, or refused by the engine
                add(problem, 0, 0, 0, 0, 1, 0)
                keep(places[id(problem)], "", None, None)
        asked = [(problem, sample) for problem, sample in answered if sample is not None]
        texts = [processor.response(sample.tokens) for _, sample in asked]
        scores = reward([problem for problem, _ in asked], texts)
        for (problem, sample), text, score in zip(asked, texts, scores, strict=True):
            add(problem, score.accuracy, score.format, len(sample.tokens), 1, 0, score.timed_out)
            right_of[places[id(problem)]] = score.accuracy
            keep(places[id(problem)], text, sample, score)
        progress(size)
    sums, right_of = distributed.exchange(sums).sum(0), distributed.exchange(right_of).sum(0)
    clusters = [problem.images or "" for problem in problems]
    measured = len(problems) and np.isfinite(right_of).all()  # a reward of the user's may be nan
    right, answered, left_out = sums[:, 0], sums[:, 3], sums[:, 4]
    with np.errstate(invalid="ignore"):  # 0 / 0 is nan: of nothing
        accuracy, means = (right / (answered + left_out)).tolist(), (sums[0, :3] / answered[0]).tolist()
    return {
        "accuracy": accuracy[0],
        "standard_error": statistics.standard_error(right_of, clusters) if measured else math.nan,
        "accuracy_answered": means[0],
        "format": means[1],
        "response_length": means[2],
        "questions": int(answered[0]),
        "left_out": int(left_out[0]),
        "timed_out": int(sums[0, 5]),
        "by_kind": dict(zip(kinds, accuracy[1:], strict=True)),
    }


class Heldout:
    """Accuracy of every capability of `config.evaluation.sets`, on test and on validation questions.

    Args:
        progress: opens a bar: (title, questions) -> a context manager that gives what is told of answered questions.
        stop: called between batches of an evaluation; raises what shall end it. A validation is not stopped: the
            checkpoint of its step is to have the figure.
        kept: writes what was answered; None: nothing is written.
    """

    def __init__(
        self,
        config: ConfigDict,
        sets: Sets,
        engine: Engine,
        builder: PromptBuilder,
        reward: Reward,
        progress: Callable[[str, int], AbstractContextManager[Callable[[int], None]]],
        stop: Callable[[], None],
        kept: Keeper | None = None,
    ):
        self._config, self._sets, self._engine, self._reward = config, sets, engine, reward
        self._progress, self._stop, self._kept = progress, stop, kept
        self._evaluating, self._validating = sampling_of(config, "evaluation"), sampling_of(config, "validation")
        # What asks: a validation as training does.
        self.builders = {
            "training": builder,
            "evaluation": builder.placing(config.evaluation.instruction),
            "base": builder.placing(config.evaluation.base_instruction),
        }

    def questions(self, name: str) -> list[Problem]:
        """The held-out questions of a set that are asked."""
        return self._sets.drawn(name, self._config.evaluation.split, self._config.evaluation.questions)

    def composition(self) -> dict[str, dict[str, Any]]:
        """What "evaluation" asks, and "validation" if there is one: the split, and of each of its sets how many
        questions, of how many, the shares of their kinds and sources, and their ids."""
        config = self._config
        asked = {"evaluation": (config.evaluation.split, config.evaluation.questions)}
        if config.validation.every:
            asked["validation"] = "validation", config.validation.questions
        found = {}
        for purpose, (split, count) in asked.items():
            sets = {}
            for name in config.evaluation.sets:
                problems, of = self._sets.drawn(name, split, count), len(self._sets.problems(name, split))
                ids = [problem.id for problem in problems]
                sets[name] = {"questions": len(problems), "of": of, **shares(problems), "ids": ids}
            found[purpose] = {"split": split, "sets": sets}
        return found

    def evaluate(self, label: str) -> list[dict[str, Any]]:
        """A result for each set, see `evaluate` above; `label`: "base", or the stage just done. Raises InputError."""
        settings = self._config.evaluation
        title, builder = f"evaluating ({label})", self.builders["base" if label == "base" else "evaluation"]
        asked = settings.split, settings.questions
        return self._accuracies(label, title, *asked, builder, self._evaluating, self._stop)

    def validate(self, label: str) -> list[dict[str, Any]]:
        """The same on validation questions, in the stage `label`."""
        questions = self._config.validation.questions
        title, builder = f"validating ({label})", self.builders["training"]
        return self._accuracies("", title, "validation", questions, builder, self._validating, lambda: None)

    def warm_up(self) -> None:
        """Compiles what `validate` samples with, so that it does not look like a late compilation."""
        for name in self._config.evaluation.sets:
            problems, sizes = self._sets.drawn(name, "validation", self._config.validation.questions), []
            for problem in problems:
                with contextlib.suppress(BadInput):  # `validate` counts it
                    sizes.append(self.builders["training"].measure(problem))
            if sizes:
                self._engine.warm_up(sizes, self._validating, 1, any(problem.images for problem in problems))

    def _accuracies(
        self,
        label: str,
        title: str,
        split: str,
        questions: int,
        builder: PromptBuilder,
        sampling: Sampling,
        stop: Callable[[], None],
    ) -> list[dict[str, Any]]:
        results = []
        sets = {name: self._sets.drawn(name, split, questions) for name in self._config.evaluation.sets}
        with self._progress(title, sum(map(len, sets.values()))) as progress:

            def advance(count: int) -> None:
                stop()
                progress(count)

            for name, problems in sets.items():
                keeping = {"keep": self._kept.begin(name, problems, builder)} if self._kept else {}
                result = evaluate(
                    problems,
                    engine=self._engine,
                    builder=builder,
                    reward=self._reward,
                    sampling=sampling,
                    seed=self._config.seed,
                    batch=policy.batch(self._config),
                    progress=advance,
                    **keeping,
                )
                if not result["questions"]:
                    raise InputError(f"no {split} question of '{name}' can be used: {builder.reasons()}")
                results.append({"capability": name, **result})
        if self._kept:
            self._kept.write(label, {"split": split, "questions": questions}, sampling, builder)
        return results
