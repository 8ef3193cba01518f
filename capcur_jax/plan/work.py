"""What a step computes of given lengths: micro-batches as the trainer packs them, prefills and turns of decoding as the
local sampler makes them. Counts alone, no seconds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from capcur_jax.learner.layout import Layout
from capcur_jax.learner.minibatches import Micro, packed
from capcur_jax.learner.packing import Item, Row
from capcur_jax.models.batching import Buckets, PromptSize
from capcur_jax.models.config import ModelConfig
from capcur_jax.models.inputs import Prompt
from capcur_jax.models.packed_rows import RowShape
from capcur_jax.plan.lengths import Group
from capcur_jax.rollout.local.bursts import BURST
from capcur_jax.rollout.local.places import Places, Pool

# ---------------------------------------------------------------------- trainer


def updates(groups: Sequence[Group], layout: Layout) -> list[list[Micro]]:
    """The micro-batches of each update of a step, all device rows'."""
    items = items_of(groups)
    size = len(items) // layout.updates
    return [packed(items[at : at + size], layout) for at in range(0, len(items), size)]


def items_of(groups: Sequence[Group]) -> list[Item]:
    """Stand-ins that have lengths but no content."""
    return [Item(_prompt(size), [Row(np.zeros(n, np.int32), 1.0) for n in lengths]) for size, lengths in groups]


def tokens(micro: Micro) -> int:
    """That a pass computes."""
    return len(micro.rows) * micro.shape.length


def pairs(micro: Micro) -> float:
    """(query, key) pairs of its attention that the layout has; what kernels compute beside them is in their rates."""
    total = 0.0
    for item in (item for row in micro.rows for item in row):
        S, lengths = len(item.prompt), np.array([len(row.tokens) for row in item.rows])
        total += S * S / 2 + (S * lengths + lengths**2 / 2).sum()
    return total


def patch_pairs(micro: Micro) -> int:
    """Pairs of patches of one image in it."""
    images = [PromptSize.of(item.prompt).images for row in micro.rows for item in row]
    return sum(n * n for each in images for n in each)


def _prompt(size: PromptSize) -> Prompt:
    empty = np.zeros(0, np.int32)
    return Prompt(np.zeros(size.tokens, np.int32), empty, 0, empty, empty, tuple((1, 1, n) for n in size.images))


# ---------------------------------------------------------------------- local sampler


class Slots(NamedTuple):
    """Of a device row of the local engine."""

    rows: int  # responses that decode together; 0: servers sample
    each: int  # prompts that one prefill takes, at most
    pool: Pool


class Sampled(NamedTuple):
    """What the local engine's programs do in a step."""

    admissions: tuple[tuple[RowShape, float], ...]  # the prefills' shapes, and (query, key) pairs of their prompts
    bursts: tuple[tuple[int, int], ...]  # rows of a device row, and turns of the loop
    live: float  # tokens whose keys and values a device row reads in all, on average
    evicted: int  # responses that had to wait for pages

    @property
    def steps(self) -> int:
        """Turns in all."""
        return sum(steps for _, steps in self.bursts)


def sampled(
    groups: Sequence[Group], buckets: Buckets, shards: int, slots: Slots, longest: int, images: bool
) -> Sampled:
    """Runs the engine's bookkeeping (rollout/local/places.py) with these lengths.

    Args:
        shards: device rows.
        longest: tokens of a response at most.
    """
    sizes, (rows, each, pool) = [size for size, _ in groups], slots
    n = len(groups[0][1])
    places = Places(sizes, n, shards, rows, each, buckets.row, pool, longest, BURST)
    lengths = np.array([length for _, responses in groups for length in responses])
    drawn = np.zeros(len(lengths), int)
    admissions, bursts, live = [], [], 0
    while places.unfinished():
        while places.worthwhile():
            parts = places.admit()
            read = [[sizes[one.prompt] for one in part] for part in parts]
            admissions.append((buckets.shape(read, images), sum(size.tokens**2 / 2 for row in read for size in row)))
            for shard, part in enumerate(parts):
                for one in part:
                    drawn[list(one.responses)] = 1
                    for response, slot in zip(one.responses, one.slots, strict=True):
                        if lengths[response] <= 1:
                            places.release(shard, slot)
        places.reserve()
        running = places.running >= 0
        if not running.any():
            continue
        size, few, wanted = places.burst(int(running.sum(1).max()), bool(places.waiting))
        left = np.where(running, (lengths - drawn)[places.running], 0)
        # Between two ends nothing changes: the turn after which the burst ends is that of some response's end.
        ends = np.unique(np.minimum(left[running], BURST))
        over = [(left <= turn).sum(1) - (rows - size) for turn in ends]
        stops = [bool((free >= wanted).any() or (free >= size - few).all()) for free in over]
        steps = int(min([*(turn for turn, stop in zip(ends, stops, strict=True) if stop), BURST, left.max()]))
        for shard, slot in np.argwhere(running):
            response, made = places.running[shard, slot], int(min(left[shard, slot], steps))
            prompt = sizes[response // n].tokens
            live += made * (prompt + drawn[response]) + made * (made - 1) // 2
            drawn[response] += made
            places.drew(shard, slot, made)
            if drawn[response] == lengths[response]:
                places.release(shard, slot)
        bursts.append((size, steps))
    return Sampled(tuple(admissions), tuple(bursts), live / shards, places.evicted)


# ---------------------------------------------------------------------- FLOPs of real tokens


class Useful(NamedTuple):
    """One forward pass of a step's real tokens and patches, each prompt once."""

    tokens: int  # prompts once and responses
    prompts: int
    responses: int
    full: int  # tokens of full sequences, each response with its prompt in front
    patches: int
    pairs: float  # causal
    patch_pairs: int


def useful(groups: Sequence[Group]) -> Useful:
    """Of a step."""
    prompts = np.array([size.tokens for size, _ in groups])
    rows = np.array([responses for _, responses in groups])
    images = np.array([n for size, _ in groups for n in size.images], np.int64)
    pairs = (prompts**2 / 2).sum() + (prompts[:, None] * rows + rows**2 / 2).sum()
    full = prompts.sum() * rows.shape[1] + rows.sum()
    total, drawn = int(prompts.sum()), int(rows.sum())
    return Useful(total + drawn, total, drawn, int(full), int(images.sum()), float(pairs), int((images * images).sum()))


def linear_flops(config: ModelConfig, useful: Useful) -> float:
    """Of the decoder: layers for every token, logits for those of responses."""
    text = config.text
    logits = 2 * text.width * text.vocabulary
    return useful.tokens * 2 * layer_parameters(config) + useful.responses * logits


def layer_parameters(config: ModelConfig) -> int:
    """Those of the decoder's layers that multiply."""
    text = config.text
    heads, kv = text.heads * text.head_dim, text.kv_heads * text.head_dim
    return text.depth * text.width * (2 * heads + 2 * kv + 3 * text.mlp_width)


def pair_flops(config: ModelConfig) -> int:
    """Of the decoder's attention, for a (query, key) pair."""
    return 4 * config.text.heads * config.text.head_dim * config.text.depth
