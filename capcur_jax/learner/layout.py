"""The declared shapes of a stage's batches: known before any prompt or response is there."""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Iterator, Sequence

from jax.sharding import Mesh
from ml_collections import ConfigDict

from capcur_jax.devices import sharding
from capcur_jax.errors import InputError
from capcur_jax.learner import objectives, packing
from capcur_jax.learner.packing import Item, UpdateBatch
from capcur_jax.models.batching import Buckets, PromptSize, rounded_up
from capcur_jax.models.image_rows import PatchBuckets, one_kind
from capcur_jax.models.inputs import Processor
from capcur_jax.models.packed_rows import Bounds, RowShape
from capcur_jax.schedule import Stage

_KEY = "config.packing.shapes"
_TILE = 128  # of an accelerator's matrix units: other lengths would have each product's operands padded by a copy
_PATCHES = f"the patches of {_KEY}"
_NEARLY = 8  # stages whose longest prompts are nearly alike share programs


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a stage's batches lie on the device rows of this process. `of` makes it from a stage and a config."""

    buckets: Buckets
    processor: Processor
    mesh: Mesh
    sampled: bool  # see objectives.Objective
    updates: int  # in a step
    shards: int  # device rows of this process
    shapes: tuple[RowShape, ...]  # of packed rows, each a program of each pass; see `declared`
    bounds: Bounds
    old: bool  # whether the old policy's log-probs are needed
    reference: bool  # whether the reference policy's are

    @classmethod
    def of(
        cls,
        stage: Stage,
        config: ConfigDict,
        buckets: Buckets,
        processor: Processor,
        mesh: Mesh,
        images: bool,
        sizes: Sequence[PromptSize] = (),
    ) -> Layout:
        """The stage's. Raises InputError where the config's numbers do not go together, or where a prompt does not fit.

        Args:
            images: whether any of the stage's prompts has one.
            sizes: of all prompts of the stage, where they are known; else they may be as large as the config allows.
        """
        sampled = objectives.of_stage(stage).sampled
        updates = config.objective.updates_per_batch if sampled else 1
        rows = sharding.row_shards(mesh)
        if stage.prompts % (updates * rows):
            raise InputError(
                f"config.stages.{stage.name}.prompts = {stage.prompts} can't be split into {updates} equal updates "
                f"over {rows} device rows (config.objective.updates_per_batch, config.mesh): make it a multiple of "
                f"{updates * rows}"
            )
        longest = max((size.tokens for size in sizes), default=config.prompt.max_tokens)
        most = max((len(size.images) for size in sizes), default=0)
        bounds = Bounds(
            config.packing.groups, config.rollout.group if sampled else 1, rounded_up(longest, _NEARLY),
            rounded_up(config.rollout.max_new_tokens, _NEARLY), buckets.smallest, config.packing.groups * most,
        )  # fmt: skip
        accelerated = isinstance(mesh, Mesh) and mesh.devices.flat[0].platform != "cpu"
        layout = cls(
            buckets, processor, mesh, sampled, updates, sharding.local_row_shards(mesh),
            declared(config.packing.shapes, images, _TILE if accelerated else 1), bounds,
            old=sampled and updates > 1, reference=sampled and needs_reference(config),
        )  # fmt: skip
        layout._check(longest + config.rollout.max_new_tokens, sizes)
        if images and not sizes:
            layout._check_largest(config.prompt)
        return layout

    def _check(self, longest: int, sizes: Sequence[PromptSize]) -> None:
        """Raises InputError where a row can't hold a prompt with one response, or its images: now, and not in the
        middle of a run."""
        if max(self.lengths, default=0) < longest:
            raise InputError(
                f"{_KEY}: the longest row has {max(self.lengths, default=0)} tokens, and must hold a prompt and a "
                f"response, {longest} (config.prompt.max_tokens + config.rollout.max_new_tokens)"
            )
        self.patches.check_multiples(self.processor.config.vision.merge_size**2)
        for size in sizes:
            self.patches.bucket([size.images])

    def _check_largest(self, prompt: ConfigDict) -> None:
        """Raises InputError where an image that the settings of prompts allow is longer than a row of patches: else a
        stage whose data has one would end the run when it begins."""
        vision, longest = self.processor.config.vision, self.patches.longest
        largest = min(self.buckets.images.longest, prompt.max_tokens * vision.merge_size**2)
        if largest > longest and prompt.max_pixels:
            largest = min(largest, prompt.max_pixels // vision.patch_size**2)
        if largest > longest:
            raise InputError(
                f"{self.patches.key} = {self.patches.declared}: an image may have {largest} patches "
                f"(config.prompt.patch_buckets, config.prompt.max_pixels), which the trainer's rows must hold, too: "
                f"declare one of {largest} patches, or lower config.prompt.max_pixels to "
                f"{longest * vision.patch_size**2}"
            )

    @property
    def scores(self) -> bool:
        """Whether a score pass is needed at all."""
        return self.old or self.reference

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of a row, rising."""
        return tuple(sorted({shape.length for shape in self.shapes}))

    @functools.cached_property
    def patches(self) -> PatchBuckets:
        """Rows of patches that are declared beside a row of any length."""
        return PatchBuckets(tuple(sorted({shape[1:] for shape in self.shapes})), self.buckets.smallest, _PATCHES)

    def shape(self, length: int, patches: tuple[int, int]) -> RowShape:
        """The smallest of this length that has so many rows of patches, (rows, patches of a row)."""
        return next(
            shape for shape in self.shapes if shape.length == length and all(map(operator.ge, shape[1:], patches))
        )

    def blanks(self, *, passes: bool) -> Iterator[UpdateBatch]:
        """An abstract batch of each shape; `passes`: as the score pass sees it, else as the gradient does, with old and
        reference log-probs."""
        return (self.blank(shape, passes=passes) for shape in self.shapes)

    def blank(self, shape: RowShape, *, passes: bool) -> UpdateBatch:
        """One of them."""
        extra = {} if passes else {"old": self.old, "reference": self.reference}
        made = packing.blank(self.shards, shape, self.bounds, self.processor.config, sampled=self.sampled, **extra)
        return sharding.abstract(self.mesh, made)

    def collate(self, rows: Sequence[Sequence[Item]], shape: RowShape) -> UpdateBatch:
        """The batch of these items, a row for each device row of this process (numpy)."""
        known = self.processor
        return packing.collate(rows, shape, self.bounds, known.config, known.pad_token, sampled=self.sampled)


def declared(shapes: Sequence[Sequence[int]], images: bool, tile: int = 1) -> tuple[RowShape, ...]:
    """The shapes of `config.packing.shapes`, rising: lengths in whole tiles; where there are no images, without rows of
    patches.

    Raises:
      InputError: they are no such shapes, or a length lacks the one with the most patches, which its groups may need.
    """
    whole = all(isinstance(shape, (tuple, list)) and all(isinstance(n, int) for n in shape) for shape in shapes)
    if not whole or not all(len(shape) == 3 and shape[0] > 0 for shape in shapes):
        raise InputError(
            f"{_KEY} = {shapes}: give (tokens, rows of patches, patches of a row) of each, as ((1024, 4, 64), "
            "(1280, 8, 64)), or of a single one, as ((1280, 8, 64),)"
        )
    if not one_kind([tuple(shape[1:]) for shape in shapes]):
        raise InputError(
            f"{_KEY} = {shapes}: rows of patches must be single ones, of any length, as in ((1024, 1, 4096), "
            "(1024, 1, 8192)), or any number of one length, as in ((1024, 4, 64), (1024, 8, 64))"
        )
    found = {RowShape(rounded_up(shape[0], tile), *(shape[1:] if images else ())) for shape in shapes}
    most = max((shape[1:] for shape in found), default=())
    if lacking := sorted({RowShape(shape.length, *most) for shape in found} - found):
        raise InputError(
            f"{_KEY}: each length must be declared with the most patches, too, which its images may need: add "
            f"{', '.join(str(tuple(shape)) for shape in lacking)}"
        )
    return tuple(sorted(found))


def needs_reference(config: ConfigDict) -> bool:
    """Whether the objective's settings have a KL to a reference policy."""
    settings = config.objective
    return settings.kl_coefficient != 0 and settings.kl_estimator != "none"
