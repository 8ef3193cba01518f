"""A step's groups or targets as the mini-batches of its updates, each split into micro-batches of declared shape."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence

import numpy as np
from ml_collections import ConfigDict

from capcur_jax.devices import distributed
from capcur_jax.learner import bins, objectives, packing
from capcur_jax.learner.layout import Layout
from capcur_jax.learner.packing import Item, Row, UpdateBatch
from capcur_jax.models.batching import PromptSize
from capcur_jax.models.inputs import Prompt
from capcur_jax.models.packed_rows import RowShape
from capcur_jax.rollout.engine import Sample


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


@dataclasses.dataclass(frozen=True)
class Micro:
    """A micro-batch whose arrays are not made yet: those of a whole step would take gigabytes."""

    layout: Layout
    shape: RowShape
    rows: list[list[Item]]  # of each device row of this process

    def batch(self) -> UpdateBatch:
        """Its arrays (numpy)."""
        return self.layout.collate(self.rows, self.shape)

    @property
    def responses(self) -> tuple[int, int]:
        """How many responses its arrays have room for, and tokens of each."""
        bounds = self.layout.bounds
        return len(self.rows) * bounds.groups * bounds.group, bounds.response

    def slots(self) -> np.ndarray:
        """See packing.slots; of this process."""
        return packing.slots(self.rows, self.shape)


def minibatches(items: Sequence[Item], layout: Layout, config: ConfigDict) -> list[list[Micro]]:
    """The step's updates, in order, each as its micro-batches (this process's rows)."""
    size = len(items) // layout.updates
    parts = [items[at : at + size] for at in range(0, len(items), size)]
    return [packed(list(_weighted(part, layout, config)), layout) for part in parts]


def packed(items: Sequence[Item], layout: Layout) -> list[Micro]:
    """The micro-batches of one update: rows of as few tokens in all as hold the items, as alike in patches as may be.

    All processes take rows of the same shapes: the first that hold what each of them has.
    """
    parts = [part for item in items for part in item.parts(max(layout.lengths))]
    images = [PromptSize.of(part.prompt).images for part in parts]

    def bucket(members: Sequence[int]) -> int:
        return layout.patches.fitting([images[i] for i in members])

    sizes, declared = [part.tokens for part in parts], layout.patches.declared
    slots = [layout.patches.slots(each) for each in images]
    room = {
        length: [math.prod(shape[1:]) for shape in layout.shapes if shape.length == length] for length in layout.lengths
    }
    most = max(map(math.prod, declared))
    fewest = max(-(-len(parts) // layout.bounds.groups), sum(slots) // max(most, 1), 1)
    sums = -(-np.array([sum(sizes), fewest, sum(slots)]) // layout.shards)
    needed, least, patches = distributed.exchange(sums).max(0).tolist()
    rooms, filled, lengths = [], [], ()
    for lengths in bins.sums(layout.lengths, needed, least):  # without an end: each item has room in a row of its own
        rooms = [length for length in lengths for _ in range(layout.shards)]
        found = bins.fill(sizes, rooms, layout.bounds.groups, lambda members: bucket(members) < len(declared))
        if distributed.exchange(np.array(found is not None)).all():
            filled = found or []
            break
    if patches:
        each = [n for n in bins.capacities(lengths, patches, room) for _ in range(layout.shards)]
        levelled = bins.level(filled, sizes, rooms, slots, each, layout.bounds.groups)
        # What each prompt's images take alone is a bound, and capacities may be too small for all of them.
        filled = levelled if all(bucket(members) < len(declared) for members in levelled) else filled
    # Rows with many images share a micro-batch.
    order = sorted(range(len(rooms)), key=lambda b: (-rooms[b], -bucket(filled[b]), b))
    batches = [order[at : at + layout.shards] for at in range(0, len(order), layout.shards)]
    needs = np.array([max(bucket(filled[b]) for b in batch) for batch in batches])
    shapes = [
        layout.shape(rooms[batch[0]], declared[number])
        for batch, number in zip(batches, distributed.exchange(needs).max(0).tolist(), strict=True)
    ]
    return [
        Micro(layout, shape, [[parts[i] for i in filled[b]] for b in batch])
        for shape, batch in zip(shapes, batches, strict=True)
    ]


def _weighted(items: Sequence[Item], layout: Layout, config: ConfigDict) -> Iterator[Item]:
    """The items whose rows have their weights in the loss of the whole mini-batch, all processes' included."""
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
        yield item._replace(rows=[row._replace(weight=next(at)) for row in item.rows])
