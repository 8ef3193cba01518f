"""A stage's problems, made ready for its steps: what of them fits, examples by number, batches prepared ahead."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import grain
import numpy as np

from capcur_jax.data.problem import Problem
from capcur_jax.models.inputs import Prompt


class Example(NamedTuple):
    """A problem ready for a step; `target` is an sft row's response."""

    problem: Problem
    prompt: Prompt
    target: np.ndarray | None


def batches(make: Callable[[int], Any], size: int, *, start: int = 0, threads: int = 2) -> Iterator[list[Any]]:
    """Batches of `size` examples make(0), make(1), ..., prepared ahead in threads; from batch number `start` on.

    Batches run across the borders of epochs, so none is ever partial.
    """
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * size)
    numbers = grain.MapDataset.range(start * size, sys.maxsize // 2)
    return iter(numbers.map(make).to_iter_dataset(options).batch(size, drop_remainder=True, batch_fn=list))
