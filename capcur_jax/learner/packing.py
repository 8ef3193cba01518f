"""Groups -> the arrays of a micro-batch: packed rows of tokens, and what the loss knows of each response.

A mini-batch (one optimizer update) is split into micro-batches (one gradient each) of one packed row for each device
row. Which groups share a row, and in what order, changes neither loss nor gradient: every response carries its weight
in the whole mini-batch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from capcur_jax.axes import Bool, Float, checked
from capcur_jax.models.batching import PromptSize
from capcur_jax.models.config import ModelConfig
from capcur_jax.models.inputs import Prompt
from capcur_jax.models.packed_rows import Bounds, RowPacker, RowShape, blank_rows
from capcur_jax.models.qwen_vl import PackedBatch


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Responses:
    """What the loss knows of R responses of at most T tokens; those that are absent have weight 0 and no token. Arrays
    that an objective does not use are None (targets have neither advantages nor the sampler's log-probs)."""

    weights: Any  # [R] float32: the loss is the sum of weight x the sum over the response's tokens
    advantages: Any = None  # [R] float32
    sampler_logprobs: Any = None  # [R, T] float32
    old_logprobs: Any = None  # [R, T]; None: one update per rollout batch, the policy's own with stopped gradient
    own: Any = None  # [R] bool: of the first update of several, the policy's own instead of `old_logprobs`
    reference_logprobs: Any = None  # [R, T]; None: no KL term

    @classmethod
    @checked
    def of(
        cls,
        weights: Float[np.ndarray, " R"],
        advantages: Float[np.ndarray, " R"] | None = None,
        sampler_logprobs: Float[np.ndarray, "R T"] | None = None,
        old_logprobs: Float[np.ndarray, "R T"] | None = None,
        own: Bool[np.ndarray, " R"] | None = None,
        reference_logprobs: Float[np.ndarray, "R T"] | None = None,
    ) -> Responses:
        """Makes them from arrays on the host and checks their shapes. The constructor checks none: JAX calls it, too,
        with tracers, shapes or shardings in the fields."""
        return cls(weights, advantages, sampler_logprobs, old_logprobs, own, reference_logprobs)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class UpdateBatch:
    """A micro-batch: A packed rows, and their responses, those of one row behind those of another."""

    rows: PackedBatch
    responses: Responses


class Row(NamedTuple):
    """One response as a step packs it."""

    tokens: np.ndarray  # [t]
    weight: float
    advantage: float = 0.0
    logprobs: np.ndarray | None = None  # [t], the sampler's


class Item(NamedTuple):
    """A prompt and what is to be learned from its responses, or a part of them."""

    prompt: Prompt
    rows: list[Row]  # weight: 1 if the row counts, 0 if not; in a micro-batch that in the mini-batch's loss
    again: bool = False  # whether other responses to the prompt lie in another row, which counts the prompt's tokens

    @property
    def tokens(self) -> int:
        """How many it has."""
        return len(self.prompt) + sum(len(row.tokens) for row in self.rows)

    def parts(self, longest: int) -> Iterator[Item]:
        """It, or where it is longer than that, its responses in several parts, each with the prompt."""
        room, parts = longest - len(self.prompt), [[]]
        for r in sorted(range(len(self.rows)), key=lambda r: (-len(self.rows[r].tokens), r)):
            length = len(self.rows[r].tokens)
            used = [sum(len(self.rows[i].tokens) for i in part) for part in parts]
            chosen = next((part for part, n in zip(parts, used, strict=True) if n + length <= room), None)
            if chosen is None:
                parts.append(chosen := [])
            chosen.append(r)
        for number, part in enumerate(parts):
            yield Item(self.prompt, [self.rows[r] for r in sorted(part)], number > 0)


# ---------------------------------------------------------------------- arrays


def blank(
    rows: int,
    shape: RowShape,
    bounds: Bounds,
    known: ModelConfig,
    pad: int = 0,
    *,
    sampled: bool,
    old: bool = False,
    reference: bool = False,
) -> UpdateBatch:
    """A batch of that shape with nothing in it (numpy): what `collate` fills, and what a warm-up compiles for."""
    R = bounds.groups * bounds.group
    zeros = np.zeros((rows * R, bounds.response), np.float32)
    return UpdateBatch(
        blank_rows(rows, shape, bounds, known, pad),
        Responses.of(
            weights=zeros[:, 0].copy(),
            advantages=zeros[:, 0].copy() if sampled else None,
            sampler_logprobs=zeros.copy() if sampled else None,
            old_logprobs=zeros if old else None,
            own=np.zeros(rows * R, bool) if old else None,
            reference_logprobs=zeros if reference else None,
        ),
    )


def collate(
    rows: Sequence[Sequence[Item]],
    shape: RowShape,
    bounds: Bounds,
    known: ModelConfig,
    pad: int,
    *,
    sampled: bool,
) -> UpdateBatch:
    """The packed rows of these items as numpy arrays; each row's items lie in it in their order."""
    batch = blank(len(rows), shape, bounds, known, pad, sampled=sampled)
    packed, responses, G = batch.rows, batch.responses, bounds.group
    packer = RowPacker(packed, shape, bounds, known.vision)
    for a, items in enumerate(rows):
        packer.start(a, [item.prompt for item in items])
        at = 0
        for b, (prompt, members, _) in enumerate(items):
            at = packer.put(prompt, at)
            for r, row in enumerate(members, b * G):
                length, number = len(row.tokens), a * bounds.groups * G + r
                here = slice(at, at + length)
                packed.tokens[a, here] = row.tokens
                packed.positions[a, :, here] = prompt.next_position + np.arange(length)
                packed.places.response_start[a, r], packed.places.response_length[a, r] = at, length
                responses.weights[number] = row.weight
                if sampled:
                    responses.advantages[number] = row.advantage
                    responses.sampler_logprobs[number, :length] = row.logprobs
                at = here.stop
    return batch


# ---------------------------------------------------------------------- counts

SLOTS = ("real", "computed", "full", "patches", "patch_slots")


def slots(rows: Sequence[Sequence[Item]], shape: RowShape) -> np.ndarray:
    """Counts of a micro-batch in the order of SLOTS: real tokens, each prompt once; token slots computed; tokens of
    full sequences, each response with its prompt in front; real patches; patch slots."""
    counts = np.zeros(len(SLOTS), np.int64)
    counts[1], counts[4] = len(rows) * shape.length, len(rows) * shape.patch_rows * shape.patches
    for item in (item for row in rows for item in row):
        prompt, size = PromptSize.of(item.prompt), item.tokens
        once = not item.again
        full = size + (len(item.rows) - 1) * prompt.tokens
        counts += size - prompt.tokens * (not once), 0, full, once * sum(prompt.images), 0
    return counts


def shares(counts: np.ndarray) -> dict[str, float]:
    """From `slots`' counts: padding's share in what is computed, and real tokens divided by those of full sequences."""
    real, computed, full, patches, slots_ = (float(count) for count in counts)
    record = {"token_padding": 1 - real / computed, "packing": real / full}
    if slots_:
        record["patch_padding"] = 1 - patches / slots_
    return record
