"""Prompts -> arrays of declared shape: tokens in rows of a prompt each, the patches of all images packed together.

Shapes are declared, so that a run compiles a handful of programs: a batch takes the smallest one that holds it.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from capcur_jax.errors import InputError
from capcur_jax.models import ways
from capcur_jax.models.config import ModelConfig, VisionConfig
from capcur_jax.models.image_rows import ImagePacker, PatchBuckets, assign_rows, blank_vision, place_images, rows_of
from capcur_jax.models.inputs import Prompt
from capcur_jax.models.qwen_vl import PromptBatch

_ROUND = 128  # lengths that follow from prompts are rounded up to multiples of this: few shapes, few programs


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


@dataclasses.dataclass(frozen=True)
class Buckets:
    """The declared shapes of a batch of prompts (`config.prompt`): lengths of prompt rows, and what a device row's
    images take (`PatchBuckets`, which says what `patches` and `smallest` are, and raises InputError).

    `most`: images of a device row's prompts in all, at most; 0: nobody knows.
    """

    tokens: tuple[int, ...]
    patches: tuple[tuple[int, int], ...] = ()
    smallest: int = 4
    most: int = 0

    def __post_init__(self):
        _ = self.images

    @functools.cached_property
    def images(self) -> PatchBuckets:
        """Those of images."""
        return PatchBuckets(self.patches, self.smallest)

    @classmethod
    def of(cls, settings: Mapping[str, Any], vision: VisionConfig, min_pixels: int = 0) -> Buckets:
        """Those of `config.prompt`. `min_pixels`: of an image, where the settings leave that to the checkpoint.

        Raises:
          InputError: a row of patches that is no whole number of image tokens; names the config key.
        """
        merged, patches = vision.merge_size**2, tuple(map(tuple, settings["patch_buckets"]))
        fewest = (settings["min_pixels"] or min_pixels) // vision.patch_size**2
        buckets = cls(tuple(settings["token_buckets"]), patches, max(1, fewest // merged) * merged)
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
        lengths, images = sorted(size.tokens for size in sizes), [size.images for size in sizes]
        tokens = {*self.tokens, rounded_up(lengths[len(lengths) // 2], _ROUND), rounded_up(lengths[-1], _ROUND)}
        if lengths[-1] <= max(self.tokens, default=0):
            tokens = set(self.tokens)
        # Kernels have room for as many images as a row can hold.
        smallest = max(self.smallest, min((size for each in images for size in each), default=0))
        most = prompts * max(map(len, images))
        wider = dataclasses.replace(self, tokens=tuple(sorted(tokens)), smallest=smallest, most=most)
        try:
            wider.images.possible(images, prompts)
            return wider
        except InputError:
            counted = [wider.images.counted(each) for each in images]
        whole, longest = math.lcm(_ROUND, vision.merge_size**2), self.images.longest
        row = rounded_up(prompts * max(map(sum, counted)), whole)
        if self.patches:
            single = all(rows == 1 for rows, _ in self.patches)
        else:
            platform = {"gpu": "cuda"}.get(jax.default_backend(), jax.default_backend())
            shape = 1, row, vision.heads, vision.head_dim
            single = ways.of(platform, shape, dtype, attention).kernels is not None
        if single:
            patches = {*self.patches, *((1, n) for n in (row // 2, row) if n > longest)}
        else:
            largest = max(map(max, filter(None, counted)))
            row = longest if largest <= longest else rounded_up(largest, whole)
            rows = prompts * max(rows_of(assign_rows(each, row)) for each in counted)
            patches = {(-(-rows // 2), row), (rows, row)}
        return dataclasses.replace(wider, patches=tuple(sorted(patches)))

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
        J, P = max(self.images.bucket([size.images for size in part]) for part in _parts(sizes, B, shards))
        return BatchShape(B, T, shards * J, P)

    def shapes(self, sizes: Sequence[PromptSize], images: bool, rows: int, shards: int = 1) -> list[BatchShape]:
        """Every shape that a batch of at most `rows` prompts drawn from these sizes can take, whichever meet in it."""
        shapes = []
        for T in sorted({self.shape([size], False).tokens for size in sizes}):
            shown = [size.images for size in sizes if size.tokens <= T]
            declared = self.images.possible(shown, rows // shards) if images else [(0, 0)]
            shapes += [BatchShape(rows, T, shards * J, P) for J, P in declared]
        return shapes

    def blank(self, shape: BatchShape, config: ModelConfig, pad: int) -> PromptBatch:
        """A batch of that shape with nothing in it (numpy): what collate fills, and what a warm-up compiles for."""
        (B, T, J, P), vision = shape, None
        if J:
            vision = blank_vision(J, P, config.vision, self.smallest, self.most)
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
        packer = ImagePacker(batch.vision, config.vision, shape.patch_rows // shards)
        each = shape.prompts // shards
        for shard, part in enumerate(_parts(prompts, shape.prompts, shards)):
            counted = [self.images.counted(PromptSize.of(prompt).images) for prompt in part]
            places = iter(place_images(counted, shape.patches))
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


def padding(batches: Sequence[PromptBatch]) -> dict[str, float]:
    """Shares of token and patch slots of these batches that hold nothing."""
    shares = {"token_padding": 1 - sum(b.lengths.sum() for b in batches) / sum(b.tokens.size for b in batches)}
    shown = [batch.vision.segments for batch in batches if batch.vision is not None]
    if shown:
        shares["patch_padding"] = 1 - sum((s > 0).sum() for s in shown) / sum(s.size for s in shown)
    return {name: float(share) for name, share in shares.items()}
