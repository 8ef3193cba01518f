"""What a step computes of given lengths: micro-batches as the trainer packs them, prefills and turns of decoding as the
local sampler makes them. Counts alone, no seconds."""

from __future__ import annotations

import types
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from capcur_jax.learner import packing
from capcur_jax.learner.layout import Layout
from capcur_jax.learner.minibatches import Item, agreed, grouped
from capcur_jax.learner.packing import Row, UpdateBatch
from capcur_jax.models.batching import BatchShape, Buckets, PromptSize
from capcur_jax.models.config import ModelConfig
from capcur_jax.models.inputs import Prompt
from capcur_jax.plan.lengths import Group
from capcur_jax.rollout.local.places import LOOK, Places

# ---------------------------------------------------------------------- trainer


class Micro(NamedTuple):
    """A micro-batch, of all device rows."""

    shape: BatchShape
    lengths: tuple[int, ...]  # of the slabs
    counts: tuple[int, ...]  # rows of a prompt in each
    slots: np.ndarray  # in the order of packing.SLOTS

    def tokens(self) -> int:
        """That a pass computes: of the last one of a response nothing is asked."""
        rows = sum(n * (length - 1) for n, length in zip(self.counts, self.lengths, strict=True))
        return self.shape.prompts * (self.shape.tokens + rows)

    def pairs(self, whole_rows: bool) -> float:
        """(query, key) pairs of its attention. `whole_rows`: a response's queries stand behind as many empty ones as
        its prompt has places (cuDNN's way)."""
        T = self.shape.tokens
        own = [(T + x) ** 2 / 2 if whole_rows else T * x + x * x / 2 for x in self.lengths]
        rows = sum(n * pairs for n, pairs in zip(self.counts, own, strict=True))
        return self.shape.prompts * (T * T / 2 + rows)


def updates(groups: Sequence[Group], layout: Layout) -> Iterator[list[Micro]]:
    """The micro-batches of each update of a step."""
    items = items_of(groups)
    size = len(items) // layout.updates
    for at in range(0, len(items), size):
        parts = grouped(items[at : at + size], layout)
        yield [
            Micro(*shape, layout.counts, packing.slots([batch_of(part, layout, *shape)]))
            for part, shape in zip(parts, agreed(parts, layout), strict=True)
        ]


def items_of(groups: Sequence[Group]) -> list[Item]:
    """Stand-ins that have lengths but no content."""
    return [Item(_prompt(size), [Row(np.zeros(n, np.int32), 1.0) for n in lengths]) for size, lengths in groups]


def batch_of(part: Sequence[Item], layout: Layout, shape: BatchShape, lengths: tuple[int, ...]) -> UpdateBatch:
    """The micro-batch, with arrays of which only the size counts."""

    def slots(*shape):  # of any size, without memory
        return np.broadcast_to(np.int32(0), shape)

    vision = None
    if shape.patch_slots:
        segments = np.zeros(shape.patch_slots, np.int8)
        segments[: sum(sum(PromptSize.of(item.prompt).images) for item in part)] = 1
        vision = types.SimpleNamespace(segments=segments)
    prompts = types.SimpleNamespace(
        lengths=np.array([len(item.prompt) for item in part]), tokens=slots(shape.prompts, shape.tokens),
        vision=vision,
    )  # fmt: skip
    return UpdateBatch(prompts, packing.pack([item.rows for item in part], layout.counts, lengths, 0, sampled=False))


def _prompt(size: PromptSize) -> Prompt:
    empty = np.zeros(0, np.int32)
    return Prompt(np.zeros(size.tokens, np.int32), empty, 0, empty, empty, tuple((1, 1, n) for n in size.images))


# ---------------------------------------------------------------------- local sampler


class Sampled(NamedTuple):
    """What the local engine's programs do in a step."""

    admissions: tuple[BatchShape, ...]  # the prefills' shapes
    calls: int  # of decoding
    steps: int  # turns of its loop in all
    slots: int


def sampled(groups: Sequence[Group], buckets: Buckets, shards: int, rows: int, each: int, images: bool) -> Sampled:
    """Runs the engine's bookkeeping (rollout/local/places.py) with these lengths.

    Args:
        shards: device rows.
        rows: slots of each.
        each: prompts of a device row that one prefill takes.
    """
    sizes, nobody = [size for size, _ in groups], PromptSize(1)
    places = Places(sizes, len(groups[0][1]), shards, rows, each)
    lengths = np.array([length for _, responses in groups for length in responses])
    left = np.zeros_like(places.running)
    admissions, calls, steps = [], 0, 0
    while places.unfinished():
        while places.worthwhile():
            flat = []
            for shard, part in enumerate(places.admit()):
                for _, slots in part:
                    left[shard, slots] = lengths[places.running[shard, slots]]
                flat += [*(sizes[prompt] for prompt, _ in part), *[nobody] * (each - len(part))]
            admissions.append(buckets.shape(flat, images, len(flat), shards))
        wanted, until = places.wanted() if places.waiting else rows + 1, steps + LOOK
        calls += 1
        while (busy := left > 0).any() and (~busy).sum(1).max() < wanted and steps < until:
            turns = min(int(left[busy].min()), until - steps)  # nothing changes before the next response ends
            left[busy] -= turns
            steps += turns
        places.running[left == 0] = -1
    return Sampled(tuple(admissions), calls, steps, places.running.size)


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
