"""The declared shapes of a stage's batches: known before any prompt or response is there."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from capcur_jax.devices import sharding
from capcur_jax.errors import InputError
from capcur_jax.learner import objectives, packing
from capcur_jax.learner.packing import Row, UpdateBatch
from capcur_jax.models.batching import BatchShape, Buckets, PromptSize
from capcur_jax.models.inputs import Processor
from capcur_jax.schedule import Stage


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a stage's batches lie on the device rows of this process. `of` makes it from a stage and a config."""

    buckets: Buckets
    processor: Processor
    mesh: Mesh
    images: bool  # whether any of the stage's prompts has one
    sampled: bool  # see objectives.Objective
    updates: int  # in a step
    shards: int  # device rows of this process
    micro: int  # its prompts in a micro-batch
    counts: tuple[int, ...]  # rows of a prompt in each slab
    lengths: tuple[tuple[int, ...], ...]  # declared, of the slabs
    old: bool  # whether the old policy's log-probs are needed
    reference: bool  # whether the reference policy's are

    @classmethod
    def of(
        cls, stage: Stage, config: ConfigDict, buckets: Buckets, processor: Processor, mesh: Mesh, images: bool
    ) -> Layout:
        """The stage's. Raises InputError where the config's numbers do not divide."""
        sampled = objectives.of_stage(stage).sampled
        updates = config.objective.updates_per_batch if sampled else 1
        shards, rows = sharding.local_row_shards(mesh), sharding.row_shards(mesh)
        counts = packing.ranks(config.rollout.group if sampled else 1, config.packing.slabs)
        # One slab takes its length from the longest of each bucket: targets, or groups that are not split.
        lengths = sorted({tuple(bucket)[-len(counts) :] for bucket in config.packing.buckets})
        if any(len(bucket) != len(counts) for bucket in lengths):
            raise InputError(
                f"config.packing.buckets = {tuple(config.packing.buckets)}: each needs a length for each of "
                f"config.packing.slabs = {tuple(config.packing.slabs)}"
            )
        if max(bucket[0] for bucket in lengths) < config.rollout.max_new_tokens:
            raise InputError("config.packing.buckets: one must hold config.rollout.max_new_tokens in every slab")
        if stage.prompts % (updates * rows):
            raise InputError(
                f"config.stages.{stage.name}.prompts = {stage.prompts} can't be split into {updates} equal updates "
                f"over {rows} device rows (config.objective.updates_per_batch, config.mesh): make it a multiple of "
                f"{updates * rows}"
            )
        here = stage.prompts // updates // rows  # prompts of an update on a device row
        micro = min(config.packing.micro_prompts or here, here)
        if here % micro:
            raise InputError(
                f"config.packing.micro_prompts = {config.packing.micro_prompts} prompts for each device row do not "
                f"divide the {here} that an update of stage {stage.name} has there"
            )
        return cls(
            buckets, processor, mesh, images, sampled, updates, shards, shards * micro, counts, tuple(lengths),
            old=sampled and updates > 1, reference=sampled and needs_reference(config),
        )  # fmt: skip

    @property
    def scores(self) -> bool:
        """Whether a score pass is needed at all."""
        return self.old or self.reference

    def blanks(self, sizes: Sequence[PromptSize], *, passes: bool) -> Iterator[UpdateBatch]:
        """An abstract batch of every shape that micro-batches of such prompts can take; `passes`: as the score pass
        sees it, else as the gradient does, with old and reference log-probs."""
        for shape in self.shapes(sizes):
            for lengths in self.lengths:
                yield self.blank(shape, lengths, passes=passes)

    def blank(self, shape: BatchShape, lengths: Sequence[int], *, passes: bool) -> UpdateBatch:
        """One of them."""
        known, extra = self.processor, {} if passes else {"old": self.old, "reference": self.reference}
        prompts = self.buckets.blank(shape, known.config, known.pad_token)
        slabs = packing.blank(self.micro, self.counts, lengths, sampled=self.sampled, **extra)
        return sharding.abstract(self.mesh, UpdateBatch(prompts, slabs))

    def shapes(self, sizes: Sequence[PromptSize]) -> list[BatchShape]:
        """Those that a micro-batch of such prompts can take."""
        return self.buckets.shapes(sizes, self.images, self.micro, self.shards)

    def needs(self, sizes: Sequence[PromptSize], groups: Sequence[Sequence[Row]]) -> np.ndarray:
        """What a micro-batch of these prompts and their rows needs: its shape, then the longest row of each slab."""
        shape = self.buckets.shape(sizes, self.images, self.micro, self.shards)
        return np.array([*shape, *packing.needed_lengths(groups, self.counts)])

    def fitting(self, needs: Sequence[int]) -> tuple[BatchShape, tuple[int, ...]]:
        """The shape of the prompts and the declared lengths of the slabs for such needs. Raises InputError."""
        return BatchShape(*needs[:4]), packing.smallest_lengths(self.lengths, needs[4:], self.counts)


def needs_reference(config: ConfigDict) -> bool:
    """Whether the objective's settings have a KL to a reference policy."""
    settings = config.objective
    return settings.kl_coefficient != 0 and settings.kl_estimator != "none"
