"""A step's groups or targets as the mini-batches of its updates, each split into micro-batches of declared shape."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict

from capcur_jax.devices import distributed
from capcur_jax.learner import objectives, packing
from capcur_jax.learner.layout import Layout
from capcur_jax.learner.packing import Row, UpdateBatch
from capcur_jax.models.batching import BatchShape, PromptSize
from capcur_jax.models.inputs import Prompt
from capcur_jax.rollout.engine import Sample


class Item(NamedTuple):
    """A prompt and what is to be learned from its responses."""

    prompt: Prompt
    rows: list[Row]  # weight: 1 if the row counts, 0 if not


def sampled_item(prompt: Prompt, samples: Sequence[Sample], advantages: np.ndarray, mask_truncated: bool) -> Item:
    """A group; `mask_truncated`: responses that hit the length limit count for nothing (TRL #6369)."""
    return Item(
        prompt,
        [
            Row(s.tokens, float(not (mask_truncated and s.finish == "length")), float(a), s.logprobs)
            for s, a in zip(samples, advantages, strict=True)
        ],
    )


def target_item(prompt: Prompt, target: np.ndarray) -> Item:
    """A target to imitate."""
    return Item(prompt, [Row(target, 1.0)])


def minibatches(items: Sequence[Item], layout: Layout, config: ConfigDict) -> list[list[UpdateBatch]]:
    """The step's updates, in order, each as its micro-batches (numpy, this process's rows)."""
    size = len(items) // layout.updates
    return [microbatches(items[at : at + size], layout, config) for at in range(0, len(items), size)]


def microbatches(items: Sequence[Item], layout: Layout, config: ConfigDict) -> list[UpdateBatch]:
    """The micro-batches of one update."""
    weighted = zip(items, _weighted(items, layout, config), strict=True)
    parts = grouped([Item(item.prompt, rows) for item, rows in weighted], layout)
    return [_batch(part, layout, *shape) for part, shape in zip(parts, agreed(parts, layout), strict=True)]


def grouped(items: Sequence[Item], layout: Layout) -> list[list[Item]]:
    """As many items as a micro-batch has, alike in length."""
    ordered = sorted(items, key=lambda item: packing.sort_key(len(item.prompt), item.rows, layout.counts))
    return [ordered[at : at + layout.micro] for at in range(0, len(ordered), layout.micro)]


def agreed(parts: Sequence[Sequence[Item]], layout: Layout) -> list[tuple[BatchShape, tuple[int, ...]]]:
    """The shape of each micro-batch: one program, so all processes take the largest of theirs."""
    needs = [layout.needs([PromptSize.of(i.prompt) for i in part], [i.rows for i in part]) for part in parts]
    return [layout.fitting(need) for need in distributed.exchange(np.array(needs)).max(0).tolist()]


def _batch(part: Sequence[Item], layout: Layout, shape: BatchShape, lengths: tuple[int, ...]) -> UpdateBatch:
    known, prompts = layout.processor, [item.prompt for item in part]
    collated = layout.buckets.collate(prompts, known.config, known.pad_token, shards=layout.shards, shape=shape)
    rows = [item.rows for item in part]
    return UpdateBatch(collated, packing.pack(rows, layout.counts, lengths, known.pad_token, layout.sampled))


def _weighted(items: Sequence[Item], layout: Layout, config: ConfigDict) -> Iterator[list[Row]]:
    """The rows with their weights in the loss of the whole mini-batch, all processes' included."""
    rows = [row for item in items for row in item.rows]
    lengths, counted = np.array([len(row.tokens) for row in rows]), np.array([row.weight > 0 for row in rows])
    tokens, number = distributed.exchange(np.array([(lengths * counted).sum(), counted.sum()])).sum(0).tolist()
    weights = objectives.row_weights(
        lengths,
        counted,
        config.objective.aggregation if layout.sampled else "token",
        total_tokens=tokens,
        total_rows=number,
        constant_length=config.rollout.max_new_tokens,
    )
    at = iter(weights.tolist())
    for item in items:
        yield [row._replace(weight=next(at)) for row in item.rows]
