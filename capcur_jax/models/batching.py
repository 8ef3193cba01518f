"""Prompts -> arrays of declared shape: tokens in rows of a prompt each, the patches of all images packed together.

Shapes are declared, so that a run compiles a handful of programs: a batch takes the smallest one that holds it.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
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
    """B prompts of T tokens; J rows of P patches, those of all parts together; both 0: no vision arrays."""

    prompts: int
    tokens: int
    patch_rows: int = 0
    patches: int = 0

    @property
    def patch_slots(self) -> int:
        """Patches that the vision tower computes."""
        return self.patch_rows * self.patches


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
            raise InputError(
                f"config.prompt.patch_buckets has no row for an image of {size} patches, the longest has {length}: "
                "declare a longer one"
            )
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
    batch never needs more rows than its prompts do alone, which `Buckets` counts on.
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


class Placed(NamedTuple):
    """Where the images of a device row lie: (row, offset) of each, in the declared bucket of this number."""

    bucket: int
    places: list[tuple[int, int]]


@dataclasses.dataclass(frozen=True)
class Buckets:
    """The declared shapes of a batch of prompts (`config.prompt`).

    `tokens`: lengths of prompt rows. `patches`: what a device row's images take, (rows, patches of a row), each with at
    least as many rows as the one before, and as long ones; no image is longer than a row. `smallest`: patches that the
    smallest image counts for. It bounds how many lie in a row.

    Raises:
      InputError: `patches` do not rise; names the config key.
    """

    tokens: tuple[int, ...]
    patches: tuple[tuple[int, int], ...] = ()
    smallest: int = 4

    def __post_init__(self):
        pairs = all(isinstance(bucket, tuple) and len(bucket) == 2 for bucket in self.patches)
        if not pairs or any(a[0] > b[0] or a[1] > b[1] for a, b in itertools.pairwise(self.patches)):
            raise InputError(
                f"config.prompt.patch_buckets = {self.patches}: give (rows, patches of a row) of each, with at least "
                "as many rows as the one before and as long ones, such as ((1, 4096), (1, 8192))"
            )

    @classmethod
    def of(cls, settings: Mapping[str, Any], vision: VisionConfig, min_pixels: int = 0) -> Buckets:
        """Those of `config.prompt`. `min_pixels`: of an image, where the settings leave that to the checkpoint.

        Raises:
          InputError: a row of patches that is no whole number of image tokens; names the config key.
        """
        merged, patches = vision.merge_size**2, tuple(map(tuple, settings["patch_buckets"]))
        fewest = (settings["min_pixels"] or min_pixels) // vision.patch_size**2
        buckets = cls(tuple(settings["token_buckets"]), patches, max(1, fewest // merged) * merged)
        if any(length % merged for _, length in patches):
            raise InputError(
                f"config.prompt.patch_buckets = {patches}: a row's patches must be a multiple of {merged}, those of an "
                "image token"
            )
        return buckets

    @property
    def longest_image(self) -> int:
        """Patches that an image has at most."""
        return max((length for _, length in self.patches), default=0)

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
            return BatchShape(B, T, 0, 0)
        number = max(self.placed([size.images for size in part]).bucket for part in _parts(sizes, B, shards))
        J, P = self.patches[number] if self.patches else (0, 0)
        return BatchShape(B, T, shards * J, P)

    def placed(self, prompts: Sequence[Sequence[int]]) -> Placed:
        """The images of a device row's prompts, given as patches of each image of each prompt, in the smallest declared
        bucket that holds them. Raises InputError where none does."""
        counted = [self._counted(images) for images in prompts]
        largest = max((size for images in counted for size in images), default=0)
        places: list[tuple[int, int]] = []
        if not largest:
            return Placed(0, places)
        for number, (rows, length) in enumerate(self.patches):
            if largest <= length and rows_of(places := place_images(counted, length)) <= rows:
                return Placed(number, places)
        assign_rows([largest], self.longest_image)
        raise self._too_few(len(prompts), rows_of(places))

    def _too_few(self, prompts: int, rows: int) -> InputError:
        return InputError(
            f"config.prompt.patch_buckets = {self.patches}: the images of {prompts} prompts of a device row need "
            f"{rows} rows of {self.longest_image} patches; declare ({rows}, {self.longest_image}), or longer rows"
        )

    def shapes(self, sizes: Sequence[PromptSize], images: bool, rows: int, shards: int = 1) -> list[BatchShape]:
        """Every shape that a batch of at most `rows` prompts drawn from these sizes can take, whichever meet in it."""
        shapes = []
        for T in sorted({self.shape([size], False).tokens for size in sizes}):
            fitting = [size for size in sizes if size.tokens <= T]
            declared = self.patch_buckets(fitting, rows // shards) if images else [(0, 0)]
            shapes += [BatchShape(rows, T, shards * J, P) for J, P in declared]
        return shapes

    def patch_buckets(self, sizes: Sequence[PromptSize], most: int, least: int = 0) -> list[tuple[int, int]]:
        """The declared (rows, patches of a row) that the images of a device row's prompts can need.

        Args:
          sizes: of all prompts that can come, each as often as it likes (one may come twice at an epoch's end).
          most, least: prompts of a device row.

        Raises:
          InputError: none holds any `most` of them: now, and not in the middle of a run.
        """
        images = {self._counted(size.images) for size in sizes}
        if not any(images):
            return list(self.patches[:1]) or [(0, 0)]
        fewest, largest = least * min(map(sum, images)), max(max(each, default=0) for each in images)
        for number, (rows, length) in enumerate(self.patches):
            if largest <= length and self._most_rows(images, most, length) <= rows:
                return [(J, P) for J, P in self.patches[: number + 1] if fewest <= J * P]
        assign_rows([largest], self.longest_image)
        raise self._too_few(most, self._most_rows(images, most, self.longest_image))

    def _counted(self, images: Sequence[int]) -> tuple[int, ...]:
        return tuple(max(size, self.smallest) for size in images)

    @staticmethod
    def _most_rows(images: Collection[Sequence[int]], prompts: int, P: int) -> int:
        """A bound on the rows of P patches that any `prompts` prompts with such images take. The largest sum of patches
        is no such bound: a smaller one may pack worse."""
        alone = prompts * max(rows_of(assign_rows(each, P)) for each in images)
        patches, count = prompts * max(map(sum, images)), prompts * max(map(len, images))
        if patches <= P:
            return 1
        largest = max(max(each, default=0) for each in images)
        # `assign_rows` begins a row for an image that no other has room for. So all rows but one have more than
        # P - largest patches, and as many images as the largest would be in a row; and all but one are over half full.
        return min(alone, 1 + (patches - 1) // (P - largest + 1), -(-count // (P // largest)), -(-2 * patches // P))

    def blank(self, shape: BatchShape, config: ModelConfig, pad: int) -> PromptBatch:
        """A batch of that shape with nothing in it (numpy): what collate fills, and what a warm-up compiles for."""
        (B, T, J, P), vision = shape, None
        if J:
            I = max(1, P // self.smallest)  # noqa: E741
            vision = VisionBatch(
                patches=np.zeros((J, P, config.vision.patch_bytes), np.uint8),
                table_index=np.zeros((J, P, 4), np.int32) if config.vision.table_size else None,
                table_weight=np.zeros((J, P, 4), np.float32) if config.vision.table_size else None,
                coordinates=np.zeros((J, P, 2), np.int32),
                segments=np.zeros((J, P), np.int32),
                starts=np.zeros((J, I), np.int32),
                lengths=np.zeros((J, I), np.int32),
                windows=np.zeros((J, P), np.int32) if config.vision.window else None,
            )
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
        shape = shape or self.shape([PromptSize.of(prompt) for prompt in prompts], images, rows, shards)
        batch = self.blank(shape, config, pad)
        if not prompts:
            return batch
        packer = _Packer(batch.vision, config.vision, shape.patch_rows // shards)
        each = shape.prompts // shards
        for shard, part in enumerate(_parts(prompts, shape.prompts, shards)):
            sizes = [PromptSize.of(prompt).images for prompt in part]
            places = iter(self.placed(sizes).places if any(sizes) else ())
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


def _parts(items: Sequence[Any], rows: int, shards: int) -> Iterator[Sequence[Any]]:
    """What each of `shards` equal parts of `rows` rows holds of its own; a part that gets nothing has the last item."""
    each = rows // shards
    for at in range(0, rows, each):
        yield items[at : at + each] or items[-1:]


class _Packer:
    """Writes images into the rows of a vision batch, in window order; each is an attention segment of its own, and so
    is each of its windows."""

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
            vision.starts[row, self._segments[row]], vision.lengths[row, self._segments[row]] = at, len(patches)
            self._segments[row] += 1
            vision.segments[here] = self._segments[row]
            if config.table_size:
                taps, weights = table_taps(grid, config)
                vision.table_index[here], vision.table_weight[here] = taps[patches], weights[patches]
            if config.window:
                vision.windows[here] = self._windows[row] + 1 + np.repeat(windows, merged)
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
