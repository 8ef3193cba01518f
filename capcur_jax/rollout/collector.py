"""A stage's rollout batches, graded; with `config.rollout.async_steps = 1` the next one is sampled while the trainer
works on this one."""

from __future__ import annotations

import concurrent.futures
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from capcur_jax.data.loader import Example
from capcur_jax.devices import distributed
from capcur_jax.errors import RolloutError
from capcur_jax.records import metrics
from capcur_jax.rollout.engine import Sample
from capcur_jax.rollout.groups import Group, Rollout
from capcur_jax.run import Run


class _Ahead(NamedTuple):
    """A batch whose samples are on their way."""

    examples: list[Example]
    drawn: concurrent.futures.Future


class Drawer:
    """Draws a stage's rollouts. A context manager: what an error leaves on its way ends when the engine is closed.

    A sample's staleness is the number of updates between the oldest weights that made a part of it and those that
    train on it: 0 where sampling and training take turns, at most `async_steps` rollout batches' updates else. Groups
    that are older (their server missed an update) are sampled once more, and counted; to stay so is an error.

    Args:
        batches: the stage's rollout batches of this process; one drawn ahead counts as consumed when it is used.
        local: groups of a step that are this process's.
        images: whether any prompt of the stage has one.
        updates: that a rollout batch is split into.
    """

    def __init__(self, run: Run, batches: Iterator[list[Example]], local: int, images: bool, updates: int):
        self._run, self._batches, self._local, self._images = run, batches, local, images
        settings = run.config.rollout
        self._group, self._allowed = settings.group, settings.async_steps * updates
        self._pool = concurrent.futures.ThreadPoolExecutor(1, "rollout") if settings.async_steps else None
        self._ahead: _Ahead | None = None
        self._renewed, self._rate = 0, 0.0

    def __enter__(self) -> Drawer:
        return self

    def __exit__(self, *exception) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)

    def step(self, timer: metrics.PhaseTimer, capabilities: tuple[str, ...]) -> Rollout:
        """The rollout that the present step trains on."""
        self._renewed = 0
        retries = self._run.config.rollout.dynamic_retries
        rollout = collect(lambda attempt: self._draw(timer, attempt), self._local, retries, capabilities)
        facts = {"version": self._run.version, "renewed": self._renewed, "tokens_per_second": self._rate}
        return dataclasses.replace(rollout, **facts)

    def ahead(self, timer: metrics.PhaseTimer) -> None:
        """Has the next step's batch sampled from now on, by the present weights, if that is asked for."""
        if self._pool is not None:
            with timer("data"):
                examples = next(self._batches)
            work = self._pool.submit(self._generate, examples, self._run.rollout_seed(ahead=1))
            self._ahead = _Ahead(examples, work)

    def _draw(self, timer: metrics.PhaseTimer, attempt: int) -> list[Group]:
        run, ahead, self._ahead = self._run, self._ahead, None
        if ahead is None:
            with timer("data"):
                examples = next(self._batches)
        else:
            examples = ahead.examples
        with timer("rollout"):  # of one that was drawn ahead: what the update did not hide
            drawn = ahead.drawn.result() if ahead else self._generate(examples, run.rollout_seed(attempt))
            self._rate = run.engine.health().tokens_per_second  # before another call begins
            self._renew(examples, drawn, attempt)
        run.consumed_batch()
        with timer("reward"):
            return run.grade(examples, drawn)

    def _generate(self, examples: Sequence[Example], seed: int) -> list[list[Sample]]:
        prompts = [example.prompt for example in examples]
        return self._run.engine.generate(prompts, self._run.sampling, self._group, seed, self._images)

    def _renew(self, examples: Sequence[Example], drawn: list[list[Sample]], attempt: int) -> None:
        """Samples groups anew, in place, that are older than allowed. Raises RolloutError if they stay so."""
        stale = self._stale(drawn)
        if stale:
            again = self._generate([examples[i] for i in stale], self._run.rollout_seed(attempt + 1000))
            if still := self._stale(again):
                version = min(sample.version for sample in again[still[0]])
                raise RolloutError(
                    f"samples of weights of version {version}, sampled anew because of that, where the trainer is at "
                    f"{self._run.version} and may be {self._allowed} ahead: a server doesn't take new weights"
                )
            for i, group in zip(stale, again, strict=True):
                drawn[i] = group
        self._renewed += len(stale)

    def _stale(self, groups: Sequence[Sequence[Sample]]) -> list[int]:
        """Which groups are older than allowed."""
        oldest = self._run.version - self._allowed
        return [i for i, group in enumerate(groups) if min(sample.version for sample in group) < oldest]


def collect(
    draw: Callable[[int], list[Group]], wanted: int, retries: int, capabilities: tuple[str, ...] = ()
) -> Rollout:
    """A rollout of `wanted` groups (of this process).

    `draw(attempt)` gives `wanted` graded groups. With `retries`, groups whose rewards are all equal are dropped and
    more are drawn until there are enough, at most so often (DAPO's dynamic sampling, arXiv:2503.14476). What is then
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
    missing = wanted - len(kept)
    groups = (kept + dropped[: max(missing, 0)])[:wanted]
    return Rollout(groups, drawn, len(dropped) - max(missing, 0), capabilities)
