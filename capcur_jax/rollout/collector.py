"""A stage's rollout batches, graded; with `config.rollout.async_steps = 1` the next one is sampled while the trainer
works on this one."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from ml_collections import ConfigDict

from capcur_jax.data.loader import Example
from capcur_jax.devices import distributed
from capcur_jax.errors import RolloutError
from capcur_jax.records import metrics
from capcur_jax.rollout.engine import Engine, Sample, Sampling
from capcur_jax.rollout.groups import Grade, Grading, Group, Rollout


class _Drawn(NamedTuple):
    """A group as the engine gives it: its samples, none where it was refused, and its grade where that has begun."""

    samples: list[Sample]
    grade: Grade | None


class _Ahead(NamedTuple):
    """A batch whose samples are on their way."""

    examples: list[Example]
    drawn: concurrent.futures.Future[list[_Drawn]]


@dataclasses.dataclass
class _Counts:
    """What was done for a rollout, field by field as Rollout has it."""

    batches: int = 0
    refused: list[str] = dataclasses.field(default_factory=list)
    renewed: int = 0
    tokens_per_second: float = 0.0


class Collector:
    """Collects a stage's rollouts. A context manager: calls that an error leaves running end when the engine is closed.

    A sample's staleness is the number of updates between the oldest weights that made a part of it and those that
    train on it: 0 where sampling and training take turns, at most `async_steps` rollout batches' updates else. Groups
    that are older (their server missed an update) are sampled once more, and counted. Raises if they stay so.

    A group is graded as soon as it has all its samples, while others are still sampled: also those of the next batch,
    while the trainer works.

    A prompt that the engine refuses leaves its place to one of the next batch. Raises if half of a batch is refused.

    Args:
        batches: the stage's rollout batches of this process; one drawn ahead counts as consumed when it is used.
        local: groups of a step that are this process's.
        images: whether any prompt of the stage has one.
        updates: that a rollout batch is split into.
        capabilities: of the stage's problems, in an order that all processes share.
        settings: config.rollout.
        seed: config.seed.
    """

    def __init__(
        self,
        engine: Engine,
        sampling: Sampling,
        grading: Grading,
        batches: Iterator[list[Example]],
        *,
        local: int,
        images: bool,
        updates: int,
        capabilities: tuple[str, ...],
        settings: ConfigDict,
        seed: int,
    ):
        self._engine, self._sampling, self._grading, self._batches = engine, sampling, grading, batches
        self._local, self._images, self._capabilities, self._seed = local, images, capabilities, seed
        self._group, self._retries = settings.group, settings.dynamic_retries
        self._allowed = settings.async_steps * updates
        self._pool = concurrent.futures.ThreadPoolExecutor(1, "rollout") if settings.async_steps else None
        self._ahead: _Ahead | None = None
        self._peeked: list[Example] | None = None  # the next batch, if it was looked at

    def __enter__(self) -> Collector:
        return self

    def __exit__(self, *exception) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)

    def step(self, timer: metrics.PhaseTimer, step: int, version: int) -> Rollout:
        """The rollout that trains weights `version` in the run's step number `step` (from 0)."""
        counts = _Counts()
        rollout = collect(
            lambda attempt: self._draw(timer, step, version, attempt, counts),
            self._local,
            self._retries,
            self._capabilities,
        )
        return dataclasses.replace(rollout, version=version, **dataclasses.asdict(counts))

    def ahead(self, timer: metrics.PhaseTimer, step: int) -> None:
        """Has the batch of step number `step` sampled from now on, by the present weights, if that is asked for."""
        if self._pool is not None:
            with timer("data"):
                examples = self._next()
            self._ahead = _Ahead(examples, self._pool.submit(self._generate, examples, self._seed_of(step)))

    def _draw(self, timer: metrics.PhaseTimer, step: int, version: int, attempt: int, counts: _Counts) -> list[Group]:
        ahead, self._ahead = self._ahead, None
        if ahead is None:
            with timer("data"):
                examples = self._next()
        else:
            examples = ahead.examples
        with timer("rollout"):  # of one that was drawn ahead: what the update did not hide
            drawn = ahead.drawn.result() if ahead else self._generate(examples, self._seed_of(step, attempt))
            counts.tokens_per_second = self._engine.health().tokens_per_second  # before another call begins
            counts.refused += self._replace(examples, drawn, self._seed_of(step, attempt + 2000))
            counts.renewed += self._renew(examples, drawn, version, self._seed_of(step, attempt + 1000))
            counts.refused += self._replace(examples, drawn, self._seed_of(step, attempt + 3000))  # when asked again
        counts.batches += 1
        with timer("reward"):  # what sampling did not hide
            return self._grading(examples, [group.samples for group in drawn], [group.grade for group in drawn])

    def _next(self) -> list[Example]:
        examples, self._peeked = self._peeked or next(self._batches), None
        return list(examples)

    def _replace(self, examples: list[Example], drawn: list[_Drawn], seed: int) -> list[str]:
        """Puts others into the places of prompts that the engine refused; the ids of those. Raises RolloutError.

        They are the next batch's first, which are asked in their own turn all the same: where a run stands in its data
        stays a number of batches, and no continuation meets these prompts again.
        """
        refused: list[str] = []
        most, following = max(1, len(examples) // 2), None
        while missing := [i for i, group in enumerate(drawn) if not group.samples]:
            refused += [examples[i].problem.id for i in missing]
            if len(refused) > most:
                raise RolloutError(
                    f"the rollout engine refused {len(refused)} of {len(examples)} prompts, more than half of a batch; "
                    f"the last: {self._engine.health().refusal}. What ends a run is not a prompt: look into the "
                    "servers' logs and settings (config.rollout.sglang)"
                )
            if following is None:
                self._peeked = self._peeked or next(self._batches)
                following = iter(self._peeked)
            spare = list(itertools.islice(following, len(missing)))
            for i, example, group in zip(missing, spare, self._generate(spare, seed), strict=True):
                examples[i], drawn[i] = example, group
        return refused

    def _seed_of(self, step: int, attempt: int = 0) -> int:
        """One stream of samples for each step of each seed."""
        return (self._seed * 1_000_003 + step * 104_729 + attempt * 15_485_863 + 1) % 2**32

    def _generate(self, examples: Sequence[Example], seed: int) -> list[_Drawn]:
        prompts, grades = [example.prompt for example in examples], [None] * len(examples)

        def done(number: int, samples: list[Sample]) -> None:
            grades[number] = self._grading.begin(examples[number], samples)

        drawn = self._engine.generate(prompts, self._sampling, self._group, seed, self._images, done)
        return [_Drawn(*group) for group in zip(drawn, grades, strict=True)]

    def _renew(self, examples: Sequence[Example], drawn: list[_Drawn], version: int, seed: int) -> int:
        """Samples groups anew, in place, that are older than allowed; how many. Raises RolloutError if they stay so."""
        stale = self._stale(drawn, version)
        if stale:
            again = self._generate([examples[i] for i in stale], seed)
            if still := self._stale(again, version):
                oldest = min(sample.version for sample in again[still[0]].samples)
                raise RolloutError(
                    f"samples of weights of version {oldest}, sampled anew because of that, where the trainer is at "
                    f"{version} and may be {self._allowed} ahead: a server doesn't take new weights"
                )
            for i, group in zip(stale, again, strict=True):
                drawn[i] = group
        return len(stale)

    def _stale(self, groups: Sequence[_Drawn], version: int) -> list[int]:
        """Which groups are older than allowed."""
        oldest = version - self._allowed
        return [i for i, (samples, _) in enumerate(groups) if any(sample.version < oldest for sample in samples)]


def collect(
    draw: Callable[[int], list[Group]], wanted: int, retries: int, capabilities: tuple[str, ...] = ()
) -> Rollout:
    """A rollout of `wanted` groups (of this process).

    `draw(attempt)` gives `wanted` graded groups. With `retries`, groups whose rewards are all equal are dropped and
    more are drawn until there are enough, at most `retries` times (DAPO, arXiv:2503.14476). What is then
    missing is filled with dropped ones, whose advantages are 0. Processes draw together, until none lacks any.
    """
    kept: list[Group] = []
    dropped: list[Group] = []
    drawn = 0
    for attempt in range(1 + retries):
        groups = draw(attempt)
        drawn += len(groups)
        for group in groups:
            (dropped if retries and group.equal else kept).append(group)
        if attempt < retries and not distributed.agree(len(kept) < wanted):
            break
    missing = max(wanted - len(kept), 0)
    groups = (kept + dropped[:missing])[:wanted]
    return Rollout(groups, drawn, len(dropped) - missing, capabilities)
