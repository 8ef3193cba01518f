"""Packed rows of prompts and responses, for tests of what reads them."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from capcur_jax.learner.packing import Bounds, Item, Row, RowShape, collate
from capcur_jax.models.batching import PromptSize
from capcur_jax.models.image_rows import place_images, rows_of
from capcur_jax.models.inputs import Processor, Prompt
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
