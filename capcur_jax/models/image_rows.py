"""Images -> rows of patches of declared shape, which images of several prompts share.

Shapes are declared for a device row: so many rows of so many patches each. On accelerators that is one row, which may
hold many images, since their kernels skip what is not an image's own. XLA computes whole rows: on a CPU a row is best
as long as an image.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence

import numpy as np

from capcur_jax.errors import InputError
from capcur_jax.models.config import VisionConfig
from capcur_jax.models.inputs import Prompt, coordinates, table_taps, window_order
from capcur_jax.models.vision import VisionBatch


def assign_rows(sizes: Sequence[int], length: int) -> list[tuple[int, int]]:
    """(row, offset) of each image in rows of `length` patches.

    The largest comes first, each goes to the fullest row that holds it; in a row they lie in the order of their
    numbers. Raises InputError for one longer than a row.
    """
    free: list[int] = []
    rows = [0] * len(sizes)
    for image in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        size = sizes[image]
        if size > length:
            raise InputError(
                f"an image of {size} patches is longer than the longest row of patches, which has {length}: declare a "
                "longer one in config.prompt.patch_buckets and config.packing.shapes"
            )
        fitting = [row for row, left in enumerate(free) if left >= size]
        row = min(fitting, key=free.__getitem__, default=len(free))
        if row == len(free):
            free.append(length)
        rows[image] = row
        free[row] -= size
    places, used = [], [0] * len(free)
    for row, size in zip(rows, sizes, strict=True):
        places.append((row, used[row]))
        used[row] += size
    return places


def place_images(prompts: Sequence[Sequence[int]], length: int) -> list[tuple[int, int]]:
    """(row, offset) of each image of several prompts, given as patches of each, one prompt after the other.

    All images together as in `assign_rows`, or, where that needs fewer rows, each prompt's in rows of their own: so a
    batch never needs more rows than its prompts do alone, which `most_rows` counts on.
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


def one_kind(buckets: Sequence[tuple[int, int]]) -> bool:
    """Whether such (rows, patches of a row) are single rows of any length, or any number of rows of one length: else
    none of two need be the larger one."""
    return all(rows == 1 for rows, _ in buckets) or len({length for _, length in buckets}) < 2


@dataclasses.dataclass(frozen=True)
class PatchBuckets:
    """What a device row's images may take: (rows, patches of a row), either one row, ever longer, or ever more rows of
    one length. No image is longer than a row.

    `smallest`: patches that an image counts for at least. It bounds how many lie in a row. `key`: of the config.

    Raises:
      InputError: they are no such pairs; names the config key.
    """

    declared: tuple[tuple[int, int], ...] = ()
    smallest: int = 4
    key: str = "config.prompt.patch_buckets"

    def __post_init__(self):
        pairs = all(isinstance(bucket, tuple) and len(bucket) == 2 for bucket in self.declared)
        if not pairs or list(self.declared) != sorted(self.declared) or not one_kind(self.declared):
            raise InputError(
                f"{self.key} = {self.declared}: give (rows, patches of a row) of each, either one row, ever longer, as "
                "((1, 4096), (1, 8192)), or ever more rows of one length, as ((8, 64), (16, 64))"
            )

    @property
    def longest(self) -> int:
        """Patches that an image has at most."""
        return max((length for _, length in self.declared), default=0)

    def check_multiples(self, merged: int) -> None:
        """Raises InputError where a row is no whole number of image tokens, of so many patches each."""
        if any(length % merged for _, length in self.declared):
            raise InputError(
                f"{self.key} = {self.declared}: a row's patches must be a multiple of {merged}, those of an image token"
            )

    def fitting(self, prompts: Sequence[Sequence[int]]) -> int:
        """The number of the smallest bucket that holds the images of such prompts of a device row, given as patches of
        each; as many as are declared where none does."""
        counted = [self.counted(images) for images in prompts]
        largest = max((size for images in counted for size in images), default=0)
        for number, (rows, length) in enumerate(self.declared):
            if not largest or (largest <= length and rows_of(place_images(counted, length)) <= rows):
                return number
        return len(self.declared)

    def bucket(self, prompts: Sequence[Sequence[int]]) -> tuple[int, int]:
        """That bucket; (0, 0) where none is declared and there is no image. Raises InputError where none is enough."""
        number = self.fitting(prompts)
        if number < len(self.declared):
            return self.declared[number]
        counted = [self.counted(images) for images in prompts]
        if not any(counted):
            return 0, 0
        assign_rows([max(map(max, filter(None, counted)))], self.longest)
        raise self._too_few(len(prompts), sum(map(sum, counted)), rows_of(place_images(counted, self.longest)))

    def counted(self, images: Sequence[int]) -> tuple[int, ...]:
        """Patches of a prompt's images, as they are placed."""
        return tuple(max(size, self.smallest) for size in images)

    def slots(self, images: Sequence[int]) -> int:
        """Patches of a bucket that a prompt's images take, at most: where a row is alone that is all of theirs, else
        whole rows."""
        counted = self.counted(images)
        if all(rows == 1 for rows, _ in self.declared):
            return sum(counted)
        return rows_of(assign_rows(counted, self.longest)) * self.longest

    def possible(self, images: Collection[Sequence[int]], most: int, patches: int = 0) -> list[tuple[int, int]]:
        """The buckets that a device row's images can need; [(0, 0)] where none is declared and there is no image.

        Args:
          images: patches of each image of all prompts that can come, each as often as it likes (one may come twice at
            an epoch's end).
          most: prompts of a device row.
          patches: of all its images, at most; 0: as many as so many prompts may have.

        Raises:
          InputError: none holds any `most` of them: now, and not in the middle of a run.
        """
        counted = {self.counted(each) for each in images}
        if not any(counted):
            return list(self.declared[:1]) or [(0, 0)]
        largest = max(max(each, default=0) for each in counted)
        patches = patches or most * max(map(sum, counted))
        for number, (rows, length) in enumerate(self.declared):
            if largest <= length and most_rows(counted, most, patches, length) <= rows:
                return list(self.declared[: number + 1])
        assign_rows([largest], self.longest)
        raise self._too_few(most, patches, most_rows(counted, most, patches, self.longest))

    def _too_few(self, prompts: int, patches: int, rows: int) -> InputError:
        single = all(rows == 1 for rows, _ in self.declared)
        needed = (1, patches) if single else (rows, self.longest)
        return InputError(
            f"{self.key} = {self.declared}: the images of {prompts} prompts of a device row need more; declare {needed}"
        )


def most_rows(images: Collection[Sequence[int]], prompts: int, patches: int, length: int) -> int:
    """A bound on the rows of length `length` that any `prompts` prompts with such images take, which have `patches` in
    all at most. The largest sum of patches is no such bound: a smaller one may pack worse."""
    P = length
    alone = prompts * max(rows_of(assign_rows(each, P)) for each in images)
    sizes = [size for each in images for size in each]
    if patches <= P or not sizes:
        return 1
    largest, count = max(sizes), min(prompts * max(map(len, images)), patches // min(sizes))
    # `assign_rows` begins a row for an image that no other has room for. So all rows but one have more than
    # P - largest patches, and as many images as the largest would be in a row; and all but one are over half full.
    return min(alone, 1 + (patches - 1) // (P - largest + 1), -(-count // (P // largest)), -(-2 * patches // P))


# ---------------------------------------------------------------------- arrays


def blank_vision(rows: int, length: int, config: VisionConfig, smallest: int = 4, most: int = 0) -> VisionBatch:
    """So many rows of so many patches with nothing in them (numpy).

    Kernels have room for as many images as the tables, whether they are there or not. `smallest`: patches of an image
    at least; `most`: images of a row at most, 0: as many as its patches hold.
    """
    J, P, I = rows, length, max(1, length // smallest)  # noqa: E741
    I = min(I, most or I)  # noqa: E741
    return VisionBatch(
        patches=np.zeros((J, P, config.patch_bytes), np.uint8),
        table_index=np.zeros((J, P, 4), np.int32) if config.table_size else None,
        table_weight=np.zeros((J, P, 4), np.float32) if config.table_size else None,
        coordinates=np.zeros((J, P, 2), np.int32),
        segments=np.zeros((J, P), np.int32),
        starts=np.zeros((J, I), np.int32),
        lengths=np.zeros((J, I), np.int32),
        windows=np.zeros((J, P), np.int32) if config.window else None,
    )


class ImagePacker:
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
