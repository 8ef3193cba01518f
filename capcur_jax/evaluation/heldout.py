"""Held-out accuracy of each capability: greedy answers to the same questions before the run and after each stage."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from capcur_jax.data.problem import Problem
from capcur_jax.data.prompts import PromptBuilder
from capcur_jax.data.sets import Sets
from capcur_jax.devices import distributed
from capcur_jax.errors import InputError
from capcur_jax.models.inputs import BadInput, Processor
from capcur_jax.rewards.reward import Reward
from capcur_jax.rollout.engine import Engine, Sampling, sampling_of


def _parts(problems: Sequence[Problem], size: int) -> Iterator[Sequence[Problem]]:
    for at in range(0, len(problems), size):
        yield problems[at : at + size]


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
) -> dict:
    """One answer to each problem. Returns accuracy, format, response_length, questions (answered) and by_kind.

    A problem whose prompt can't be built is counted by the builder and left out of the mean.
    """
    processor: Processor = builder.processor
    kinds = sorted({problem.kind for problem in problems if problem.kind})
    # Right answers, well-formed ones, tokens and questions, of all problems and of each kind.
    sums = np.zeros((1 + len(kinds), 4))
    images = any(problem.images for problem in problems)
    for number, part in enumerate(_parts(problems, batch)):
        # Of several processes each asks its share; all of them sample together.
        mine = part[jax.process_index() :: jax.process_count()]
        with ThreadPoolExecutor() as pool:  # the workers that decode images are kept busy
            built = list(zip(mine, pool.map(builder.try_build, mine), strict=True))
        built = [(problem, prompt) for problem, prompt in built if prompt is not None]
        groups = engine.generate([prompt for _, prompt in built], sampling, 1, seed + number, images)
        samples, asked = [group[0] for group in groups], [problem for problem, _ in built]
        scores = reward(asked, [processor.decode(sample.tokens) for sample in samples])
        for problem, sample, score in zip(asked, samples, scores, strict=True):
            row = np.array([score.accuracy, score.format, len(sample.tokens), 1])
            sums[0] += row
            if problem.kind:
                sums[1 + kinds.index(problem.kind)] += row
        progress(len(part))
    sums = distributed.exchange(sums).sum(0)
    means = sums[:, :3] / np.where(sums[:, 3:] > 0, sums[:, 3:], np.nan)
    accuracy, form, length = means[0].tolist()
    return {
        "accuracy": accuracy,
        "format": form,
        "response_length": length,
        "questions": int(sums[0, 3]),
        "by_kind": {kind: float(means[1 + i, 0]) for i, kind in enumerate(kinds) if sums[1 + i, 3]},
    }


class Heldout:
    """Accuracy of every capability of `config.evaluation.sets`, on test and on validation questions.

    Args:
        progress: opens a bar: (title, questions) -> a context manager that gives what is told of answered questions.
        stop: called between batches of an evaluation; raises what shall end it. A validation is not stopped: the
            checkpoint of its step is to have the figure.
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
    ):
        self._config, self._sets, self._engine, self._builder, self._reward = config, sets, engine, builder, reward
        self._progress, self._stop = progress, stop
        self._greedy, self._validating = sampling_of(config, "evaluation"), sampling_of(config, "validation")

    def questions(self, name: str) -> list[Problem]:
        """The held-out questions of a set that are asked."""
        return self._of(name, self._config.evaluation.split, self._config.evaluation.questions)

    def _of(self, name: str, split: str, questions: int) -> list[Problem]:
        return self._sets.problems(name, split)[: questions or None]

    def evaluate(self, label: str) -> list[dict[str, Any]]:
        """A result for each set, see `evaluate` above; `label`: "base", or the stage just done. Raises InputError."""
        settings = self._config.evaluation
        title = f"evaluating ({label})"
        return self._accuracies(title, settings.split, settings.questions, self._greedy, self._stop)

    def validate(self, label: str) -> list[dict[str, Any]]:
        """The same on validation questions, in the stage `label`."""
        questions = self._config.validation.questions
        return self._accuracies(f"validating ({label})", "validation", questions, self._validating, lambda: None)

    def warm_up(self) -> None:
        """Compiles what `validate` samples with, so that it does not look like a late compilation."""
        for name in self._config.evaluation.sets:
            problems, sizes = self._of(name, "validation", self._config.validation.questions), []
            for problem in problems:
                with contextlib.suppress(BadInput):  # `validate` counts it
                    sizes.append(self._builder.measure(problem))
            if sizes:
                self._engine.warm_up(sizes, self._validating, 1, any(problem.images for problem in problems))

    def _accuracies(
        self, title: str, split: str, questions: int, sampling: Sampling, stop: Callable[[], None]
    ) -> list[dict[str, Any]]:
        results = []
        sets = {name: self._of(name, split, questions) for name in self._config.evaluation.sets}
        with self._progress(title, sum(map(len, sets.values()))) as progress:

            def advance(count: int) -> None:
                stop()
                progress(count)

            for name, problems in sets.items():
                result = evaluate(
                    problems,
                    engine=self._engine,
                    builder=self._builder,
                    reward=self._reward,
                    sampling=sampling,
                    seed=self._config.seed,
                    batch=4 * self._config.rollout.slots,  # slots that become free find work
                    progress=advance,
                )
                if not result["questions"]:
                    raise InputError(f"no {split} question of '{name}' can be used: {self._builder.reasons()}")
                results.append({"capability": name, **result})
        return results
