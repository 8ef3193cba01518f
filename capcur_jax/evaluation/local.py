"""Questions to a rollout engine of this project, in batches: how training evaluates, and how benchmarks are asked."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

import jax

from capcur_jax.models.inputs import Processor, Prompt
from capcur_jax.rollout.engine import Engine, Sample, Sampling

_Item = TypeVar("_Item")


def seen(processor: Processor) -> dict[str, Any]:
    """How a checkpoint sees a question: conditions of a score."""
    limits, template = processor.images.size, str(processor.tokenizer.chat_template)
    return {
        "min_pixels": limits["shortest_edge"],
        "max_pixels": limits["longest_edge"],
        "image_encoding": "decoded by Pillow, resized as transformers does",
        "template": hashlib.sha256(template.encode("utf-8", "surrogatepass")).hexdigest()[:16],
    }


class Batch(NamedTuple):
    """Answers to a batch of questions."""

    size: int  # questions of it, over all processes
    answers: list  # (question, its sample or None where there is no prompt or the engine refused it), this process's


def answers(
    items: Sequence[_Item],
    *,
    engine: Engine,
    build: Callable[[_Item], Prompt | None],
    sampling: Sampling,
    seed: int,
    batch: int,
    images: bool,
    wanted: Sequence[bool] | None = None,
) -> Iterator[Batch]:
    """One answer to each question. Of several processes each asks its share; all of them sample together.

    Batches are cut from the whole list and seeded by their number, wanted or not: what is asked again later is asked in
    the same batch. One of which nothing is wanted is passed over. No more than a batch's prompts are in memory.

    Args:
      build: a question's prompt, or None where it has none; called in threads.
      images: whether any question has one.
      wanted: which are asked; None: all. The same in all processes.
    """
    for number, start in enumerate(range(0, len(items), batch)):
        part = [items[at] for at in range(start, min(start + batch, len(items))) if wanted is None or wanted[at]]
        if not part:
            continue
        mine = part[jax.process_index() :: jax.process_count()]
        with ThreadPoolExecutor() as pool:  # the workers that decode images are kept busy
            built = list(zip(mine, pool.map(build, mine), strict=True))
        ready = [prompt for _, prompt in built if prompt is not None]
        groups = iter(engine.generate(ready, sampling, 1, seed + number, images))
        samples: list[Sample | None] = []
        for _, prompt in built:
            group = next(groups) if prompt is not None else []
            samples.append(group[0] if group else None)
        yield Batch(len(part), [(item, sample) for (item, _), sample in zip(built, samples, strict=True)])
