"""A stage's problems, made ready for its steps: which of them fit, examples by number, batches prepared ahead."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import grain
import jax
import numpy as np

from capcur_jax.data.problem import Problem
from capcur_jax.data.prompts import PromptBuilder, target_tokens
from capcur_jax.errors import InputError
from capcur_jax.models.batching import PromptSize
from capcur_jax.models.inputs import BadInput, Processor, Prompt


class Example(NamedTuple):
    """A problem ready for a step; `target` is an sft row's response."""

    problem: Problem
    prompt: Prompt
    target: np.ndarray | None


Target = Callable[[Problem], np.ndarray | None]


def targets(processor: Processor, longest: int) -> Target:
    """The tokens to imitate of a problem, at most so many; raises BadInput where there are none."""
    return lambda problem: target_tokens(processor, problem, longest)


def no_target(problem: Problem) -> None:
    """Where nothing is imitated."""


def usable(
    sets: Sequence[Sequence[Problem]], builder: PromptBuilder, target: Target, where: str
) -> tuple[list[list[Problem]], list[PromptSize]]:
    """The problems of each set that fit, and the sizes of all their prompts; no pixel is decoded. What does not fit is
    counted by the builder. Raises InputError, which begins with `where`, if none fits."""
    fitting, sizes = [], []
    for problems in sets:
        fitting.append([])
        for problem in problems:
            try:
                target(problem)
                sizes.append(builder.measure(problem))
                fitting[-1].append(problem)
            except BadInput as error:
                builder.skip(problem, error)
    if not sizes:
        raise InputError(f"{where}: no problem can be used: {builder.reasons()}")
    return fitting, sizes


class Maker:
    """Example number i of this process, in the data threads: a function of the number alone, so that a run goes on from
    a number, and any number of processes see the same problems in the same steps.

    A problem whose image turns out to be broken is counted, and the one that comes a step later takes its place: in a
    curriculum, one that is about as hard. Where a fixed order has the same problem there, a neighbour takes it.

    Args:
        order: the stage's problems without end, by number.
        prompts: of a step, in all processes; `updates`: the updates that they are split into.
        where: the stage, for messages.
    """

    def __init__(
        self, order: Sequence[Problem], builder: PromptBuilder, target: Target, prompts: int, updates: int, where: str
    ):
        self._order, self._builder, self._target, self._where = order, builder, target, where
        self._prompts, self._updates = prompts, updates
        self._process, self._processes = jax.process_index(), jax.process_count()
        self.local = prompts // self._processes  # examples of a batch that are this process's
        # Not the builder's count: a resumed run may begin here, without what other stages could not use.
        self._unusable: set[Problem] = set()

    def number(self, index: int) -> int:
        """Where this process's example `index` stands in the order: of each update's prompts it has its share."""
        batch, at = divmod(index, self.local)
        share = self.local // self._updates
        update, within = divmod(at, share)
        return batch * self._prompts + (update * self._processes + self._process) * share + within

    def __call__(self, index: int) -> Example:
        number = self.number(index)
        for attempt in range(1000):
            problem = self._order[number + attempt * self._prompts + attempt // 2]
            if problem in self._unusable:
                continue
            try:
                return Example(problem, self._builder.build(problem), self._target(problem))
            except BadInput as error:
                self._unusable.add(problem)
                self._builder.skip(problem, error)
        raise InputError(f"{self._where}: no problem can be used: {self._builder.reasons()}")


def batches(make: Callable[[int], Any], size: int, *, start: int = 0, threads: int = 2) -> Iterator[list[Any]]:
    """Batches of `size` examples make(0), make(1), ..., prepared ahead in threads; from batch number `start` on.

    Batches run across the borders of epochs, so none is ever partial.
    """
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * size)
    numbers = grain.MapDataset.range(start * size, sys.maxsize // 2)
    return iter(numbers.map(make).to_iter_dataset(options).batch(size, batch_fn=list))
