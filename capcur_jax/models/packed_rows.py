"""Prompts -> packed rows of declared shape: one behind the other, each with room for its responses behind it.

A trainer's rows hold prompts with responses, a sampler's prompts alone. Arrays are numpy's here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from capcur_jax.models.attention import Places
from capcur_jax.models.config import ModelConfig, VisionConfig
from capcur_jax.models.image_rows import ImagePacker, blank_vision, place_images
from capcur_jax.models.inputs import Prompt
from capcur_jax.models.qwen_vl import PackedBatch


class RowShape(NamedTuple):
    """Of each device row: tokens, and rows of patches with their length (0: no vision arrays)."""

    length: int
    patch_rows: int = 0
    patches: int = 0


class Bounds(NamedTuple):
    """What no packed row exceeds."""

    groups: int  # of a row: prompts, with their responses
    group: int  # responses of a group
    prompt: int  # tokens
    response: int  # tokens
    image: int = 4  # patches that one counts for at least, which bounds how many share a row of patches
    images: int = 0  # of all groups of a row; 0: nobody knows


def blank_rows(rows: int, shape: RowShape, bounds: Bounds, config: ModelConfig, pad: int = 0) -> PackedBatch:
    """So many packed rows with nothing in them."""
    B, R, vision = bounds.groups, bounds.groups * bounds.group, None
    if shape.patch_rows:
        vision = blank_vision(rows * shape.patch_rows, shape.patches, config.vision, bounds.image, bounds.images)
    return PackedBatch(
        tokens=np.full((rows, shape.length), pad, np.int32),
        positions=np.zeros((rows, 3, shape.length), np.int32),
        visual_index=np.full((rows, shape.length), -1, np.int32),
        vision=vision,
        places=Places(*(np.zeros((rows, n), np.int32) for n in (B, B, R, R))),
        prompt=bounds.prompt,
        response=bounds.response,
    )


class RowPacker:
    """Writes prompts into a batch of packed rows, and their images into the rows of patches of each."""

    def __init__(self, batch: PackedBatch, shape: RowShape, bounds: Bounds, config: VisionConfig):
        self._batch, self._patches, self._smallest = batch, shape.patches, bounds.image
        self._images = ImagePacker(batch.vision, config, shape.patch_rows)

    def start(self, row: int, prompts: Sequence[Prompt]) -> None:
        """What is put from now on belongs to this row: these prompts, in their order."""
        counted = [[max(math.prod(grid), self._smallest) for grid in prompt.grids] for prompt in prompts]
        self._row, self._number = row, 0
        self._at = iter(place_images(counted, self._patches))
        self._images.start(row)

    def put(self, prompt: Prompt, at: int) -> int:
        """The next prompt, from that place of the row on. Returns the place behind it."""
        batch, a = self._batch, self._row
        here = slice(at, at + len(prompt))
        batch.tokens[a, here], batch.positions[a, :, here] = prompt.tokens, prompt.positions
        if prompt.grids:
            index = self._images.place(prompt, [next(self._at) for _ in prompt.grids])
            shown = prompt.visual_index >= 0
            batch.visual_index[a, here][shown] = index[prompt.visual_index[shown]]
        batch.places.prompt_start[a, self._number], batch.places.prompt_length[a, self._number] = at, len(prompt)
        self._number += 1
        return here.stop
