"""Which shapes batches of prompts take: declared ones, so that a run compiles a handful of programs. A batch takes the
smallest one that holds it.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import jax

from capcur_jax.errors import InputError
from capcur_jax.models import ways
from capcur_jax.models.config import ModelConfig, VisionConfig
from capcur_jax.models.image_rows import PatchBuckets, most_rows
from capcur_jax.models.inputs import Prompt
from capcur_jax.models.packed_rows import Bounds, RowPacker, RowShape, blank_rows
from capcur_jax.models.qwen_vl import PackedBatch

_NEARLY = 8  # prompts whose longest are nearly alike share programs
_ROUND = 128  # lengths that follow from prompts are rounded up to multiples of this: few shapes, few programs


class PromptSize(NamedTuple):
    """The sizes of a prompt that decide the shape of its batch."""

    tokens: int
    images: tuple[int, ...] = ()  # patches of each

    @classmethod
    def of(cls, prompt: Prompt) -> PromptSize:
        return cls(len(prompt), tuple(math.prod(grid) for grid in prompt.grids))


def smallest_bucket(buckets: Sequence[int], needed: int, key: str) -> int:
    """The smallest declared bucket that holds `needed`. Raises InputError naming the config key."""
    fitting = [bucket for bucket in buckets if bucket >= needed]
    if not fitting:
        raise InputError(f"{key} = {tuple(buckets)} has no bucket for {needed}; declare a larger one")
    return min(fitting)


def rounded_up(length: int, multiple: int) -> int:
    """The next multiple: where nothing is declared, sizes that are nearly alike share a program."""
    return -(-length // multiple) * multiple


@dataclasses.dataclass(frozen=True)
class Buckets:
    """The declared shapes of a batch of prompts (`config.prompt`): tokens of a device row, in which prompts lie one
    behind the other, and what their images take (`PatchBuckets`, which says what `patches` and `smallest` are, and
    raises InputError).

    `most`: images of a device row's prompts in all, at most; 0: nobody knows. `longest`: tokens of a prompt at most; 0:
    as many as a row has.
    """

    tokens: tuple[int, ...]
    patches: tuple[tuple[int, int], ...] = ()
    smallest: int = 4
    most: int = 0
    longest: int = 0

    def __post_init__(self):
        _ = self.images

    @functools.cached_property
    def images(self) -> PatchBuckets:
        """Those of images."""
        return PatchBuckets(self.patches, self.smallest)

    @property
    def row(self) -> int:
        """Tokens of the longest row."""
        return max(self.tokens, default=0)

    def bounds(self, prompts: int) -> Bounds:
        """What no row of at most so many prompts exceeds."""
        return Bounds(prompts, 0, self.longest or self.row, 0, self.smallest, self.most)

    @classmethod
    def of(cls, settings: Mapping[str, Any], vision: VisionConfig, min_pixels: int = 0) -> Buckets:
        """Those of `config.prompt`. `min_pixels`: of an image, where the settings leave that to the checkpoint.

        Raises:
          InputError: a row of patches that is no whole number of image tokens; names the config key.
        """
        merged, patches = vision.merge_size**2, tuple(map(tuple, settings["patch_buckets"]))
        fewest = (settings["min_pixels"] or min_pixels) // vision.patch_size**2
        smallest = max(1, fewest // merged) * merged
        buckets = cls(tuple(settings["token_buckets"]), patches, smallest, longest=settings["max_tokens"])
        buckets.images.check_multiples(merged)
        return buckets

    def holding(
        self, sizes: Collection[PromptSize], prompts: int, vision: VisionConfig, dtype: Any, attention: str = "auto"
    ) -> Buckets:
        """These shapes, or beside them such as hold the prompts, which are all that will come.

        Rows of patches are of the declared kind. Where none are declared, one row holds all images if a kernel skips
        what is not an image's own. XLA computes scores of all patches of a row: for it a row is as long as the longest
        image.

        Args:
          sizes: of the prompts, one at least.
          prompts: of a device row at once.
          vision, dtype, attention: of the model that runs on this process's devices (`attention`: see ways.of).
        """
        lengths, images = [size.tokens for size in sizes], [size.images for size in sizes]
        longest, tokens = max(lengths), set(self.tokens)
        if longest > self.row:
            usual = prompts * sum(lengths) // len(lengths)
            tokens |= {rounded_up(longest, _ROUND), rounded_up(max(longest, usual), _ROUND)}
        # Kernels have room for as many images as a row can hold.
        smallest = max(self.smallest, min((size for each in images for size in each), default=0))
        most = prompts * max(map(len, images))
        wider = dataclasses.replace(
            self, tokens=tuple(sorted(tokens)), smallest=smallest, most=most, longest=rounded_up(longest, _NEARLY)
        )
        try:
            wider.possible(sizes, prompts)
            return wider
        except InputError:
            counted, *bounds = wider._drawn(sizes, prompts, wider.row)
        whole, declared = math.lcm(_ROUND, vision.merge_size**2), self.images.longest
        row = rounded_up(bounds[1], whole)
        if self.patches:
            single = all(rows == 1 for rows, _ in self.patches)
        else:
            platform = {"gpu": "cuda"}.get(jax.default_backend(), jax.default_backend())
            shape = 1, row, vision.heads, vision.head_dim
            single = ways.of(platform, shape, dtype, attention).kernels is not None
        if single:
            patches = {*self.patches, *((1, n) for n in (rounded_up(row // 2, whole), row) if n > declared)}
        else:
            largest = max(map(max, filter(None, counted)))
            row = declared if largest <= declared else rounded_up(largest, whole)
            rows = most_rows(counted, *bounds, row)
            patches = {(-(-rows // 2), row), (rows, row)}
        return dataclasses.replace(wider, patches=tuple(sorted(patches)))

    def _drawn(self, sizes: Collection[PromptSize], prompts: int, row: int) -> tuple[set[tuple[int, ...]], int, int]:
        """Of a row of so many tokens, in which any `prompts` of these may meet that it holds: images of those that may
        be there, how many at most, and patches of all of them at most."""
        fitting = [size for size in sizes if size.tokens <= row] or list(sizes)
        counted = [self.images.counted(size.images) for size in fitting]
        most = max(1, min(prompts, row // min(size.tokens for size in fitting)))
        # An image's tokens lie in the row, too: who has most patches a token may fill it.
        each = (sum(mine) * row / size.tokens for mine, size in zip(counted, fitting, strict=True))
        return set(counted), most, min(most * max(map(sum, counted)), math.ceil(max(each)))

    def possible(self, sizes: Collection[PromptSize], prompts: int, row: int = 0) -> list[tuple[int, int]]:
        """The buckets that the images of a row can need, whichever `prompts` of these meet in it.

        Args:
          row: tokens of it; 0: of the longest.

        Raises:
          InputError: none holds them: now, and not in the middle of a run.
        """
        return self.images.possible(*self._drawn(sizes, prompts, row or self.row))

    def shape(self, rows: Sequence[Sequence[PromptSize]], images: bool | None = None) -> RowShape:
        """The smallest declared shape that holds prompts of these sizes, those of each device row.

        Args:
          images: whether images may come in batches like this one; a batch without any then takes the same program.
            None: whether this one has any.

        Raises:
          InputError: no bucket is large enough; names the config key.
        """
        needed = max((sum(size.tokens for size in row) for row in rows), default=1)
        length = smallest_bucket(self.tokens, needed, "config.prompt.token_buckets")
        shown = [[size.images for size in row] for row in rows]
        if not (any(map(any, shown)) if images is None else images):
            return RowShape(length)
        return RowShape(length, *max(map(self.images.bucket, shown), default=(0, 0)))

    def shapes(self, sizes: Collection[PromptSize], images: bool, prompts: int) -> list[RowShape]:
        """Every shape that rows of at most `prompts` prompts drawn from these sizes can take, whichever meet there."""
        lengths, found = [size.tokens for size in sizes], []
        if not lengths:
            return []
        fewest, most = min(lengths), max(max(lengths), min(prompts * max(lengths), self.row))
        fewest, most = (smallest_bucket(self.tokens, n, "config.prompt.token_buckets") for n in (fewest, most))
        for length in sorted({n for n in self.tokens if fewest <= n <= most}):
            buckets = self.possible(sizes, prompts, length) if images else [(0, 0)]
            found += [RowShape(length, *bucket) for bucket in buckets]
        return found

    def blank(self, rows: int, shape: RowShape, prompts: int, config: ModelConfig, pad: int) -> PackedBatch:
        """Rows of that shape with nothing in them (numpy): what collate fills, and what a warm-up compiles for."""
        return blank_rows(rows, shape, self.bounds(prompts), config, pad)

    def collate(
        self, rows: Sequence[Sequence[Prompt]], shape: RowShape, prompts: int, config: ModelConfig, pad: int
    ) -> PackedBatch:
        """The prompts of each device row as packed rows of that shape (numpy), with room for `prompts` each.

        Several processes must agree on the shape.
        """
        batch = self.blank(len(rows), shape, prompts, config, pad)
        packer = RowPacker(batch, shape, self.bounds(prompts), config.vision)
        for number, row in enumerate(rows):
            packer.start(number, row)
            at = 0
            for prompt in row:
                at = packer.put(prompt, at)
        return batch
