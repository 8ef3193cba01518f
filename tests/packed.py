"""Packed rows of prompts and responses, and prompts each in a row of its own, for tests of what reads them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from capcur_jax.learner.packing import Item, Row, collate
from capcur_jax.models.batching import PromptSize
from capcur_jax.models.image_rows import ImagePacker, blank_vision, place_images, rows_of
from capcur_jax.models.inputs import Processor, Prompt
from capcur_jax.models.packed_rows import Bounds, RowShape, blank_rows
from capcur_jax.models.qwen_vl import PackedBatch


def packed(
    prompts: Sequence[Prompt], responses: Sequence[np.ndarray], processor: Processor, patch_row: int = 64
) -> PackedBatch:
    """One packed row of all prompts with their responses, as many of each, and some padding."""
    G, tokens = len(responses) // len(prompts), [len(row) for row in responses]
    items = [
        Item(prompt, [Row(np.asarray(row), 1.0) for row in responses[b * G : (b + 1) * G]])
        for b, prompt in enumerate(prompts)
    ]
    rows = rows_of(place_images([PromptSize.of(prompt).images for prompt in prompts], patch_row))
    shape = RowShape(sum(item.tokens for item in items) + 5, rows, patch_row)
    bounds = Bounds(len(prompts), G, max(map(len, prompts)), max(tokens))
    return collate([items], shape, bounds, processor.config, processor.pad_token, sampled=False).rows


def of_responses(x: jax.Array, batch: PackedBatch) -> jax.Array:
    """What lies at the response tokens of one packed row: [1, W, ...] -> [R, T, ...]."""
    at = batch.places.response_start[0][:, None] + jnp.arange(batch.response)
    return x[0][jnp.minimum(at, x.shape[1] - 1)]


def padded(
    prompts: Sequence[Prompt], processor: Processor, tokens: int, patches: tuple[int, int] = (0, 0)
) -> PackedBatch:
    """Each prompt in a row of its own, padded to so many tokens: arrays [B, T, ...] of one device row. `patches`: rows
    that all images share, and their length; (0, 0): no vision arrays."""
    config, vision = processor.config, blank_vision(*patches, processor.config.vision) if patches[0] else None
    batch = blank_rows(len(prompts), RowShape(tokens), Bounds(1, 0, tokens, 0), config, processor.pad_token)
    batch = dataclasses.replace(batch, vision=vision)
    packer = ImagePacker(vision, config.vision, patches[0])
    places = iter(place_images([PromptSize.of(prompt).images for prompt in prompts], patches[1]) if vision else ())
    for row, prompt in enumerate(prompts):
        here = slice(len(prompt))
        batch.tokens[row, here], batch.positions[row, :, here] = prompt.tokens, prompt.positions
        batch.places.prompt_length[row] = len(prompt)
        if prompt.grids:
            index, shown = packer.place(prompt, [next(places) for _ in prompt.grids]), prompt.visual_index >= 0
            batch.visual_index[row, here][shown] = index[prompt.visual_index[shown]]
    return batch


def lengths_of(batch: PackedBatch) -> np.ndarray:
    """Of such prompts [B]."""
    return batch.places.prompt_length[:, 0]
