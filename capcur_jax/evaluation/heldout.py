"""Held-out accuracy of each capability: greedy answers to the same questions before the run and after each stage."""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterator, Sequence

from capcur_jax.data.problem import Problem
from capcur_jax.data.prompts import PromptBuilder
from capcur_jax.models.inputs import Processor
from capcur_jax.rewards.reward import Reward
from capcur_jax.rollout.engine import Engine, Sampling


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else float("nan")


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
    accuracy, form, lengths = [], [], []
    by_kind: dict[str, list[float]] = collections.defaultdict(list)
    images = any(problem.images for problem in problems)
    for number, part in enumerate(_parts(problems, batch)):
        built = [(problem, builder.try_build(problem)) for problem in part]
        built = [(problem, prompt) for problem, prompt in built if prompt is not None]
        if built:
            groups = engine.generate([prompt for _, prompt in built], sampling, 1, seed + number, images)
            samples = [group[0] for group in groups]
            asked = [problem for problem, _ in built]
            for problem, sample, score in zip(
                asked, samples, reward(asked, [processor.decode(s.tokens) for s in samples]), strict=True
            ):
                accuracy.append(score.accuracy)
                form.append(score.format)
                lengths.append(float(len(sample.tokens)))
                by_kind[problem.kind].append(score.accuracy)
        progress(len(part))
    return {
        "accuracy": _mean(accuracy),
        "format": _mean(form),
        "response_length": _mean(lengths),
        "questions": len(accuracy),
        "by_kind": {kind: _mean(values) for kind, values in sorted(by_kind.items()) if kind},
    }
