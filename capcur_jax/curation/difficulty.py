"""Pass rates: the share of a model's sampled responses to a problem that the training reward finds right.

The paper samples K = 16 responses of the base model at temperature 0.7, 1,024 new tokens (its section on difficulty).
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np

from capcur_jax.data.problem import Drop, Problem
from capcur_jax.data.prompts import PromptBuilder
from capcur_jax.errors import InputError
from capcur_jax.models.batching import PromptSize
from capcur_jax.models.inputs import BadImage, BadInput, Prompt
from capcur_jax.records.journal import Journal, digest_of, key_of
from capcur_jax.rewards.reward import Reward
from capcur_jax.rollout.engine import Engine, Sampling

WORST = 512  # characters of a prediction that are kept; a longer one is wrong whatever it says
COMMON = 20  # rows of an answer whose pass rate is told
ANSWERS = 12  # of a kind at most: with more of them answers are a part of what makes a problem hard
FOLLOWS = 0.1  # of the variance of pass rates: where answers explain more, an order by pass rate sorts by answer


def key(problem: Problem) -> str:
    """What a measured problem is known by in the journal: changed text, answer or images make it another one."""
    return key_of(problem.id, problem.problem, problem.answer, *map(digest_of, problem.images))


def measurable(problems: Iterable[Problem], builder: PromptBuilder) -> Iterator[tuple[Problem, PromptSize] | Drop]:
    """The problems with their prompts' sizes, or why one can't be measured; no pixel is decoded."""
    for problem in problems:
        if not problem.answer:
            yield Drop(f"row {problem.id}", "no answer", "a row to imitate has no answer that could be right")
            continue
        try:
            yield problem, builder.measure(problem)
        except BadInput as error:
            yield _drop(problem, error)


def measure(
    problems: Sequence[Problem],
    *,
    engine: Engine,
    builder: PromptBuilder,
    reward: Reward,
    sampling: Sampling,
    samples: int,
    seed: int,
    batch: int,
    journal: Journal,
    images: bool,
    progress: Callable[[str], None] = lambda word: None,
) -> None:
    """Samples and grades what the journal lacks; a record is {"predictions", "correctness", "lengths", "timed_out"} or
    {"reason", "detail"} of a problem whose image turned out to be broken.

    Batches are cut from the whole list, done or not, and seeded by their number: a killed job ends with
    the figures of an unbroken one.

    Args:
      batch: problems that are asked together.
      images: whether any problem has one.
      progress: called once for each problem, with a word for one that could not be measured.
    """
    for start in range(0, len(problems), batch):
        part = problems[start : start + batch]
        if all(key(problem) in journal.done for problem in part):
            continue
        built: list[tuple[Problem, Prompt]] = []
        broken: list[tuple[Problem, Drop]] = []
        with ThreadPoolExecutor() as pool:  # the workers that decode images are kept busy
            for problem, prompt in zip(part, pool.map(functools.partial(_built, builder), part), strict=True):
                (broken if isinstance(prompt, Drop) else built).append((problem, prompt))
        groups = engine.generate([prompt for _, prompt in built], sampling, samples, seed + start, images)
        for (problem, _), group in zip(built, groups, strict=True):
            if not group:
                broken.append(
                    (problem, Drop(problem.id, "refused", f"the servers refuse it: {engine.health().refusal}"))
                )
        built, groups = [one for one, group in zip(built, groups, strict=True) if group], list(filter(None, groups))
        asked = [problem for problem, _ in built for _ in range(samples)]
        texts = [builder.processor.response(sample.tokens) for group in groups for sample in group]
        scores = reward(asked, texts)
        for number, ((problem, _), group) in enumerate(zip(built, groups, strict=True)):
            mine = scores[number * samples : (number + 1) * samples]
            if any(math.isnan(score.accuracy) for score in mine):
                raise InputError(
                    "config.reward.function gives rewards outside 0 to 1 and no accuracy: return {'reward': ..., "
                    "'accuracy': ...}; a pass rate is the mean accuracy"
                )
            record = {
                "predictions": [(score.answer or "")[:WORST] for score in mine],
                "correctness": [score.accuracy for score in mine],
                "lengths": [len(sample.tokens) for sample in group],
                "timed_out": sum(score.timed_out for score in mine),
            }
            _add(journal, problem, record, progress)
        for problem, drop in broken:
            _add(journal, problem, {"reason": drop.reason, "detail": drop.detail}, progress)


def rated(problems: Sequence[Problem], journal: Journal, by: dict[str, Any]) -> Iterator[Problem | Drop]:
    """The problems with their pass rates, as the journal has them.

    Args:
      by: whose they are: model, samples, temperature, limits.
    """
    for problem in problems:
        record = journal.done[key(problem)]
        if "reason" in record:
            yield Drop(f"row {problem.id}", record["reason"], record["detail"])
            continue
        correctness, late = tuple(record["correctness"]), record.get("timed_out", 0)
        of_this = {"mean_tokens": round(sum(record["lengths"]) / len(record["lengths"]), 1)}
        if late:  # verdicts that depend on the host
            of_this["timed_out"] = late
        yield dataclasses.replace(
            problem,
            pass_rate=sum(correctness) / len(correctness),
            pass_rate_by=by | of_this,
            predictions=tuple(record["predictions"]),
            correctness=correctness,
        )


class Followed(NamedTuple):
    """A kind of question whose pass rates follow its answers."""

    kind: str
    rows: int
    share: float  # of the pass rates' variance that the answers explain
    lowest: tuple[str, float]  # the answer with the lowest pass rate, and that rate
    highest: tuple[str, float]


def followed(problems: Iterable[Problem]) -> list[Followed]:
    """The kinds in which the answer tells how often the model is right, the clearest first.

    Easy to hard then shows such a kind answer by answer; what is trained last is the answer that the model gives most
    rarely. Looked at are kinds most of whose rows have one of ANSWERS answers or fewer, each of them COMMON times. The
    share is epsilon squared of a one-way analysis of variance: 0 on average where rates have nothing to do with
    answers.
    """
    kinds: dict[str, dict[str, list[float]]] = collections.defaultdict(lambda: collections.defaultdict(list))
    for problem in problems:
        if problem.pass_rate is not None:
            kinds[problem.kind or problem.capability][problem.answer].append(problem.pass_rate)
    found = []
    for kind, answers in kinds.items():
        rows = sum(map(len, answers.values()))
        common = {answer: np.array(rates) for answer, rates in answers.items() if len(rates) >= COMMON}
        if not 2 <= len(common) <= ANSWERS:
            continue
        looked = np.concatenate([*common.values()])
        if 2 * len(looked) < rows or not looked.std():
            continue
        n, k, total = len(looked), len(common), ((looked - looked.mean()) ** 2).sum()
        within = sum(((rates - rates.mean()) ** 2).sum() for rates in common.values())
        share = float(1 - within / (n - k) * (n - 1) / total)
        if share >= FOLLOWS:
            means = sorted(((answer, float(rates.mean())) for answer, rates in common.items()), key=lambda one: one[1])
            found.append(Followed(kind, rows, share, means[0], means[-1]))
    return sorted(found, key=lambda one: -one.share)


def _add(journal: Journal, problem: Problem, record: dict, progress: Callable[[str], None]) -> None:
    if key(problem) not in journal.done:  # of a batch that was cut off midway, the first rows are there
        journal.add(key(problem), record)
        progress(record.get("reason", ""))


def _built(builder: PromptBuilder, problem: Problem) -> Prompt | Drop:
    try:
        return builder.build(problem)
    except BadInput as error:
        return _drop(problem, error)


def _drop(problem: Problem, error: BadInput) -> Drop:
    return Drop(f"row {problem.id}", "broken image" if isinstance(error, BadImage) else "unusable prompt", str(error))
