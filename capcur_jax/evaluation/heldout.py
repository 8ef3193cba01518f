"""Held-out accuracy of each capability: greedy answers to the same questions before the run and after each stage."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np

from capcur_jax.data.problem import Problem
from capcur_jax.data.prompts import PromptBuilder
from capcur_jax.devices import distributed
from capcur_jax.models.inputs import Processor
from capcur_jax.rewards.reward import Reward
from capcur_jax.rollout.engine import Engine, Sampling


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
