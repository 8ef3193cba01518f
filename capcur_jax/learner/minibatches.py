"""A step's groups or targets as the mini-batches of its updates, each split into micro-batches of declared shape."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from capcur_jax.devices import distributed, sharding
from capcur_jax.errors import InputError
from capcur_jax.learner import objectives, packing
from capcur_jax.learner.packing import Row, UpdateBatch
from capcur_jax.models.batching import BatchShape, Buckets, PromptSize
from capcur_jax.models.inputs import Processor, Prompt
from capcur_jax.rollout.engine import Sample
from capcur_jax.schedule import Stage


class Item(NamedTuple):
    """A prompt and what is to be learned of its responses."""

    prompt: Prompt
    rows: list[Row]  # weight: 1 if the row counts, 0 if not


def grpo_item(prompt: Prompt, samples: Sequence[Sample], advantages: np.ndarray, mask_truncated: bool) -> Item:
    """A group; `mask_truncated`: responses that hit the length limit count for nothing (TRL #6369)."""
    return Item(
        prompt,
        [
            Row(s.tokens, float(not (mask_truncated and s.finish == "length")), float(a), s.logprobs)
            for s, a in zip(samples, advantages, strict=True)
        ],
    )


def sft_item(prompt: Prompt, target: np.ndarray) -> Item:
    return Item(prompt, [Row(target, 1.0)])


class Packer:
    """Splits a stage's steps into batches of declared shape, for this process's device rows.

    Args:
        images: whether any of the stage's prompts has one.
    """

    def __init__(
        self, stage: Stage, config: ConfigDict, buckets: Buckets, processor: Processor, mesh: Mesh, images: bool
    ):
        self._config, self._buckets, self._processor, self._mesh = config, buckets, processor, mesh
        self._images, self._grpo = images, stage.objective == "grpo"
        self.updates = config.objective.updates_per_batch if self._grpo else 1
        self._shards = sharding.local_row_shards(mesh)
        self._counts = packing.ranks(config.rollout.group if self._grpo else 1, config.packing.slabs)
        # One slab takes its length from the longest of each bucket: sft rows, or groups that are not split.
        self._lengths = sorted({tuple(b)[-len(self._counts) :] for b in config.packing.buckets})
        if any(len(bucket) != len(self._counts) for bucket in self._lengths):
            raise InputError(
                f"config.packing.buckets = {tuple(config.packing.buckets)}: each needs a length for each of "
                f"config.packing.slabs = {tuple(config.packing.slabs)}"
            )
        if max(bucket[0] for bucket in self._lengths) < config.rollout.max_new_tokens:
            raise InputError("config.packing.buckets: one must hold config.rollout.max_new_tokens in every slab")
        mini = self._share(stage.prompts, self.updates, f"config.stages.{stage.name}.prompts")
        here = mini // self._shards
        self._micro = self._shards * min(config.packing.micro_prompts or here, here)
        if mini % self._micro:
            raise InputError(
                f"config.packing.micro_prompts = {config.packing.micro_prompts} prompts for each device row do not "
                f"divide the {mini // self._shards} that an update of stage {stage.name} has there"
            )
        self.old = self._grpo and self.updates > 1
        self.reference = needs_reference(config) and self._grpo

    def _share(self, prompts: int, updates: int, key: str) -> int:
        """This process's prompts in an update."""
        rows = sharding.row_shards(self._mesh)
        if prompts % (updates * rows):
            raise InputError(
                f"{key} = {prompts} can't be split into {updates} equal updates over {rows} device rows "
                f"(config.objective.updates_per_batch, config.mesh): make it a multiple of {updates * rows}"
            )
        return prompts // updates // rows * self._shards

    # ------------------------------------------------------------------ shapes

    def blanks(self, sizes: Sequence[PromptSize], *, passes: bool) -> Iterator[UpdateBatch]:
        """An abstract batch of every shape that micro-batches of such prompts can take; `passes`: as the score pass
        sees it, else as the gradient does, with old and reference log-probs."""
        known, extra = self._processor, {} if passes else {"old": self.old, "reference": self.reference}
        for shape in self._buckets.shapes(sizes, self._images, self._micro, self._shards):
            prompts = self._buckets.blank(shape, known.config, known.pad_token)
            for lengths in self._lengths:
                slabs = packing.blank(self._micro, self._counts, lengths, grpo=self._grpo, **extra)
                yield sharding.abstract(self._mesh, UpdateBatch(prompts, slabs))

    @property
    def scores(self) -> bool:
        """Whether a score pass is needed at all."""
        return self.old or self.reference

    # ------------------------------------------------------------------ batches

    def minibatches(self, items: Sequence[Item]) -> list[list[UpdateBatch]]:
        """The step's updates, in order, each as its micro-batches (numpy, this process's rows)."""
        size = len(items) // self.updates
        return [self._microbatches(items[at : at + size]) for at in range(0, len(items), size)]

    def _microbatches(self, items: Sequence[Item]) -> list[UpdateBatch]:
        items = [Item(item.prompt, rows) for item, rows in zip(items, self._weighted(items), strict=True)]
        items.sort(key=lambda item: packing.sort_key(len(item.prompt), item.rows, self._counts))
        parts = [items[at : at + self._micro] for at in range(0, len(items), self._micro)]
        return [self._batch(part, *shape) for part, shape in zip(parts, self._agreed(parts), strict=True)]

    def _agreed(self, parts: Sequence[Sequence[Item]]) -> list[tuple[BatchShape, tuple[int, ...]]]:
        """The shape of each micro-batch: one program, so all processes take the largest of theirs."""
        needs = []
        for part in parts:
            sizes = [PromptSize.of(item.prompt) for item in part]
            shape = self._buckets.shape(sizes, self._images, self._micro, self._shards)
            needs.append([*shape, *packing.needed_lengths([item.rows for item in part], self._counts)])
        agreed = distributed.exchange(np.array(needs)).max(0).tolist()
        return [
            (BatchShape(*need[:3]), packing.smallest_lengths(self._lengths, need[3:], self._counts)) for need in agreed
        ]

    def _batch(self, part: Sequence[Item], shape: BatchShape, lengths: tuple[int, ...]) -> UpdateBatch:
        known = self._processor
        prompts = self._buckets.collate(
            [item.prompt for item in part], known.config, known.pad_token, shards=self._shards, shape=shape
        )
        rows = [item.rows for item in part]
        return UpdateBatch(prompts, packing.pack(rows, self._counts, lengths, known.pad_token, self._grpo))

    def _weighted(self, items: Sequence[Item]) -> Iterator[list[Row]]:
        """The rows with their weights in the loss of the whole mini-batch, all processes' included."""
        rows = [row for item in items for row in item.rows]
        lengths, counted = np.array([len(row.tokens) for row in rows]), np.array([row.weight > 0 for row in rows])
        tokens, number = distributed.exchange(np.array([(lengths * counted).sum(), counted.sum()])).sum(0).tolist()
        weights = objectives.row_weights(
            lengths,
            counted,
            self._config.objective.aggregation if self._grpo else "token",
            total_tokens=tokens,
            total_rows=number,
            constant_length=self._config.rollout.max_new_tokens,
        )
        at = iter(weights.tolist())
        for item in items:
            yield [row._replace(weight=next(at)) for row in item.rows]


def needs_reference(config: ConfigDict) -> bool:
    settings = config.objective
    return settings.kl_coefficient != 0 and settings.kl_estimator != "none"
