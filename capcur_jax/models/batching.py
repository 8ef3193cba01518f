"""Prompts -> arrays of declared shape: tokens in rows of a prompt each, the patches of all images packed together.

Shapes are declared, so that a run compiles a handful of programs: a batch takes the smallest one that holds it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from capcur_jax.errors import InputError
from capcur_jax.models.config import ModelConfig, VisionConfig
from capcur_jax.models.inputs import Prompt, coordinates, table_taps, window_order
from capcur_jax.models.qwen_vl import PromptBatch
from capcur_jax.models.vision import VisionBatch


class PromptSize(NamedTuple):
    """The sizes of a prompt that decide the shape of its batch."""

    tokens: int
    images: tuple[int, ...] = ()  # patches of each

    @classmethod
    def of(cls, prompt: Prompt) -> PromptSize:
        return cls(len(prompt), tuple(math.prod(grid) for grid in prompt.grids))


class BatchShape(NamedTuple):
    """B prompts of T tokens; J rows of patches, 0: no vision arrays."""

    prompts: int
    tokens: int
    patch_rows: int


def smallest_bucket(buckets: Sequence[int], needed: int, key: str) -> int:
    """The smallest declared bucket that holds `needed`. Raises InputError naming the config key."""
    fitting = [bucket for bucket in buckets if bucket >= needed]
    if not fitting:
        raise InputError(f"{key} = {tuple(buckets)} has no bucket for {needed}; declare a larger one")
    return min(fitting)


def rounded_up(length: int, multiple: int) -> int:
    """The next multiple: where nothing is declared, sizes that are nearly alike share a program."""
    return -(-length // multiple) * multiple


def assign_rows(sizes: Sequence[int], length: int) -> list[tuple[int, int]]:
    """(row, offset) of each image in rows of `length` patches.

    The largest comes first, each goes to the fullest row that holds it. Raises InputError for one longer than a row.
    """
    free: list[int] = []
    places = [(0, 0)] * len(sizes)
    for image in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        size = sizes[image]
        if size > length:
            raise InputError(f"config.prompt.patch_row = {length} does not hold an image of {size} patches; raise it")
        fitting = [row for row, left in enumerate(free) if left >= size]
        row = min(fitting, key=free.__getitem__, default=len(free))
        if row == len(free):
            free.append(length)
        places[image] = (row, length - free[row])
        free[row] -= size
    return places


def place_images(prompts: Sequence[Sequence[int]], length: int) -> list[tuple[int, int]]:
    """(row, offset) of each image of several prompts, given as patches of each, one prompt after the other.

    All images together as in `assign_rows`, or, where that needs fewer rows, each prompt's in rows of their own: so a
    batch never needs more rows than its prompts do alone, which `Buckets.most_rows` counts on.
    """
    together = assign_rows([size for images in prompts for size in images], length)
    apart: list[tuple[int, int]] = []
    for images in prompts:
        first = rows_of(apart)
        apart += [(first + row, at) for row, at in assign_rows(images, length)]
    return min(together, apart, key=rows_of)


def rows_of(places: Sequence[tuple[int, int]]) -> int:
    """How many rows images at these places take."""
    return 1 + max((row for row, _ in places), default=-1)


@dataclasses.dataclass(frozen=True)
class Buckets:
    """The declared shapes of a batch of prompts (`config.prompt`).

    `tokens`: lengths of prompt rows. `patch_row`: patches in a row of the vision tower, at least the largest image's.
    `patch_rows`: how many such rows a prompt of the batch gets on average, for example (0.25, 0.5, 1.0).
    """

    tokens: tuple[int, ...]
    patch_row: int
    patch_rows: tuple[float, ...]

    def shape(
        self, sizes: Sequence[PromptSize], images: bool | None = None, rows: int = 0, shards: int = 1
    ) -> BatchShape:
        """The smallest declared shape that holds prompts of these sizes.

        Args:
          images: whether images may come in batches like this one; a batch without any then takes the same program.
            None: whether this one has any.
          rows: prompts of the batch; 0: as many as there are sizes.
          shards: equal parts, one after the other, each with its own rows of patches (see sharding.py).

        Raises:
          InputError: no bucket is large enough; names the config key.
        """
        B = rows or len(sizes)
        T = smallest_bucket(self.tokens, max((size.tokens for size in sizes), default=1), "config.prompt.token_buckets")
        if not (any(size.images for size in sizes) if images is None else images):
            return BatchShape(B, T, 0)
        needed = 0
        for part in _parts(sizes, B, shards):
            needed = max(needed, rows_of(place_images([size.images for size in part], self.patch_row)))
        return BatchShape(B, T, shards * min(self._holding(needed, B // shards)))

    def _holding(self, needed: int, prompts: int) -> list[int]:
        """The declared numbers of rows that are enough for so many prompts. Raises InputError if none is."""
        declared = self.patch_row_counts(prompts)
        if needed > declared[-1]:
            raise InputError(
                f"config.prompt.patch_rows = {self.patch_rows} gives {prompts} prompts at most {declared[-1]} rows of "
                f"patches, their images can need {needed}: declare {math.ceil(100 * needed / prompts) / 100:g} too, or "
                "raise config.prompt.patch_row"
            )
        return [count for count in declared if count >= needed]

    def patch_row_counts(self, prompts: int) -> list[int]:
        """The declared numbers of rows of patches for a batch of prompts, rising."""
        return sorted({math.ceil(share * prompts) for share in self.patch_rows} or {0})

    def shapes(self, sizes: Sequence[PromptSize], images: bool, rows: int, shards: int = 1) -> list[BatchShape]:
        """Every shape that a batch of `rows` prompts drawn from these sizes can take, whichever meet in it."""
        tokens = sorted({self.shape([size], False).tokens for size in sizes})
        if not images:
            return [BatchShape(rows, T, 0) for T in tokens]
        enough, declared = self.check(sizes, rows // shards), self.patch_row_counts(rows // shards)
        return [BatchShape(rows, T, shards * n) for T in tokens for n in declared if n <= enough]

    def check(self, sizes: Sequence[PromptSize], prompts: int) -> int:
        """The smallest declared number of rows of patches that holds any `prompts` prompts of these sizes. Raises
        InputError where none does: now, and not in the middle of a run."""
        return min(self._holding(self.most_rows(sizes, prompts), prompts))

    def most_rows(self, sizes: Sequence[PromptSize], prompts: int) -> int:
        """A bound on the rows of patches of any `prompts` prompts of these sizes, each as often as it likes (one may
        come twice at an epoch's end). The largest sum of patches is no such bound: a smaller one may pack worse."""
        P, images = self.patch_row, {size.images for size in sizes if size.images}
        if not images:
            return 0
        alone = prompts * max(rows_of(assign_rows(each, P)) for each in images)
        patches, count = prompts * max(map(sum, images)), prompts * max(map(len, images))
        largest = max(map(max, images))
        # `assign_rows` begins a row for an image that no other has room for. So all rows but one have more than
        # P - largest patches, and as many images as the largest would be in a row; and all but one are over half full.
        return min(
            alone, 1 + (patches - 1) // (P - largest + 1), -(-count // (P // largest)), max(1, -(-2 * patches // P))
        )

    def blank(self, shape: BatchShape, config: ModelConfig, pad: int) -> PromptBatch:
        """A batch of that shape with nothing in it (numpy): what collate fills, and what a warm-up compiles for."""
        (B, T, J), P, vision = shape, self.patch_row, None
        if J:
            vision = blank_vision(J, P, config.vision)
        return PromptBatch(
            tokens=np.full((B, T), pad, np.int32),
            lengths=np.ones(B, np.int32),
            positions=np.zeros((B, 3, T), np.int32),
            next_position=np.ones(B, np.int32),
            visual_index=np.full((B, T), -1, np.int32),
            vision=vision,
        )

    def collate(
        self,
        prompts: Sequence[Prompt],
        config: ModelConfig,
        pad: int,
        images: bool | None = None,
        rows: int = 0,
        shards: int = 1,
        shape: BatchShape | None = None,
    ) -> PromptBatch:
        """B prompts as numpy arrays of declared shape, tokens padded on the right.

        `images`, `rows`, `shards`: see `shape`, which is also what to fill if it is given (processes must agree on it).
        Rows without a prompt of their own repeat the last one, its images included, which are in each part once.
        """
        sizes = [PromptSize.of(prompt) for prompt in prompts]
        shape = shape or self.shape(sizes, images, rows, shards)
        batch = self.blank(shape, config, pad)
        if not prompts:
            return batch
        packer = ImagePacker(batch.vision, config.vision, shape.patch_rows // shards)
        each = shape.prompts // shards
        for shard, part in enumerate(_parts(prompts, shape.prompts, shards)):
            places = iter(place_images([PromptSize.of(prompt).images for prompt in part], self.patch_row))
            packer.start(shard)
            for row, prompt in enumerate(part, shard * each):
                length = len(prompt)
                batch.tokens[row, :length] = prompt.tokens
                batch.positions[row, :, :length] = prompt.positions
                batch.lengths[row], batch.next_position[row] = length, prompt.next_position
                if prompt.grids:
                    index = packer.place(prompt, [next(places) for _ in prompt.grids])
                    shown = prompt.visual_index >= 0
                    batch.visual_index[row, :length][shown] = index[prompt.visual_index[shown]]
            filled = slice(shard * each + len(part), (shard + 1) * each)
            for rowwise in (batch.tokens, batch.lengths, batch.next_position, batch.visual_index, batch.positions):
                rowwise[filled] = rowwise[filled.start - 1]
        return batch


def blank_vision(rows: int, length: int, config: VisionConfig) -> VisionBatch:
    """So many rows of so many patches with nothing in them (numpy)."""
    J, P = rows, length
    return VisionBatch(
        patches=np.zeros((J, P, config.patch_values), np.float32),
        table_index=np.zeros((J, P, 4), np.int32) if config.table_size else None,
        table_weight=np.zeros((J, P, 4), np.float32) if config.table_size else None,
        coordinates=np.zeros((J, P, 2), np.int32),
        segments=np.zeros((J, P), np.int32),
        windows=np.zeros((J, P), np.int32) if config.window else None,
    )


def _parts(items: Sequence[Any], rows: int, shards: int) -> Iterator[Sequence[Any]]:
    """What each of `shards` equal parts of `rows` rows holds of its own; a part that gets nothing has the last item."""
    each = rows // shards
    for at in range(0, rows, each):
        yield items[at : at + each] or items[-1:]


class ImagePacker:
    """Writes images into the rows of a vision batch, in window order; each frame of each image is an attention segment
    of its own, and so is each of its windows."""

    def __init__(self, vision: VisionBatch | None, config: VisionConfig, rows: int):
        self._vision, self._config, self._rows, self._first = vision, config, rows, 0  # rows of a part
        total = 0 if vision is None else len(vision.segments)
        self._segments, self._windows = np.zeros(total, np.int32), np.zeros(total, np.int32)  # used so far, by row

    def start(self, shard: int) -> None:
        """What is placed from now on belongs to this part."""
        self._first = shard * self._rows

    def place(self, prompt: Prompt, places: Sequence[tuple[int, int]]) -> np.ndarray:
        """Where among the flat merged features of its part each of the prompt's lies."""
        vision, config, merged = self._vision, self._config, self._config.merge_size**2
        index, start = [], 0
        for grid, (row, at) in zip(prompt.grids, places, strict=True):
            order, windows = window_order(grid, config)
            index.append(np.argsort(order) + (row * vision.segments.shape[1] + at) // merged)
            row += self._first
            patches = (order[:, None] * merged + np.arange(merged)).reshape(-1)
            here = (row, slice(at, at + len(patches)))
            vision.patches[here] = prompt.patches[start + patches]
            vision.coordinates[here] = coordinates(grid, config)[patches]
            vision.segments[here] = self._segments[row] + 1 + np.repeat(np.arange(grid[0]), grid[1] * grid[2])
            if config.table_size:
                taps, weights = table_taps(grid, config)
                vision.table_index[here], vision.table_weight[here] = taps[patches], weights[patches]
            if config.window:
                vision.windows[here] = self._windows[row] + 1 + np.repeat(windows, merged)
            self._segments[row] += grid[0]
            self._windows[row] += windows[-1] + 1
            start += len(patches)
        return np.concatenate(index)


def padding(batches: Sequence[PromptBatch]) -> dict[str, float]:
    """Shares of token and patch slots of these batches that hold nothing."""
    shares = {"token_padding": 1 - sum(b.lengths.sum() for b in batches) / sum(b.tokens.size for b in batches)}
    shown = [batch.vision.segments for batch in batches if batch.vision is not None]
    if shown:
        shares["patch_padding"] = 1 - sum((s > 0).sum() for s in shown) / sum(s.size for s in shown)
    return {name: float(share) for name, share in shares.items()}
