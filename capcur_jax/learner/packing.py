"""Rollouts -> update batches of static shape: prompt rows once a group, response rows sorted into length buckets.

A mini-batch (one optimizer update) is split into micro-batches (one gradient each). Its groups are sorted by length
first, so that a micro-batch's groups are alike. The rows of each group are sorted too: the shortest of all groups make
one slab, the longest another, each as long as its own longest row needs (config.packing.slabs). None of this changes
loss or gradient: every row carries its weight in the whole mini-batch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from capcur_jax.axes import Bool, Float, Int, checked
from capcur_jax.errors import InputError
from capcur_jax.models.qwen_vl import PromptBatch


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Slab:
    """R response rows of one length; row r answers prompt r // (R / B). Arrays that an objective does not use are None
    (targets have neither advantages nor the sampler's log-probs)."""

    tokens: Any  # [R, T] int32, padded on the right
    lengths: Any  # [R] int32
    weights: Any  # [R] float32: the loss is the sum of weight x the sum over the row's tokens
    advantages: Any = None  # [R] float32
    sampler_logprobs: Any = None  # [R, T] float32
    old_logprobs: Any = None  # [R, T]; None: one update per rollout batch, the policy's own with stopped gradient
    own: Any = None  # [R] bool: of the first update of several, the policy's own instead of `old_logprobs`
    reference_logprobs: Any = None  # [R, T]; None: no KL term

    @classmethod
    @checked
    def of(
        cls,
        tokens: Int[np.ndarray, "R T"],
        lengths: Int[np.ndarray, " R"],
        weights: Float[np.ndarray, " R"],
        advantages: Float[np.ndarray, " R"] | None = None,
        sampler_logprobs: Float[np.ndarray, "R T"] | None = None,
        old_logprobs: Float[np.ndarray, "R T"] | None = None,
        own: Bool[np.ndarray, " R"] | None = None,
        reference_logprobs: Float[np.ndarray, "R T"] | None = None,
    ) -> Slab:
        """Makes a slab from arrays on the host and checks their shapes. The constructor checks none: JAX calls it, too,
        with tracers, shapes or shardings in the fields."""
        return cls(tokens, lengths, weights, advantages, sampler_logprobs, old_logprobs, own, reference_logprobs)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class UpdateBatch:
    """B prompts and all their responses, in slabs."""

    prompts: PromptBatch
    slabs: tuple[Slab, ...]


class Row(NamedTuple):
    """One response as a step packs it."""

    tokens: np.ndarray  # [t]
    weight: float
    advantage: float = 0.0
    logprobs: np.ndarray | None = None  # [t], the sampler's


def ranks(group: int, slabs: Sequence[int]) -> tuple[int, ...]:
    """How many rows of each group go to which slab, shortest rows first. Raises InputError."""
    if not slabs or group == 1:
        return (group,)
    if sum(slabs) != group or min(slabs) < 1:
        raise InputError(
            f"config.packing.slabs = {tuple(slabs)} must be whole numbers that add up to {group} responses"
        )
    return tuple(slabs)


def smallest_lengths(buckets: Sequence[Sequence[int]], needed: Sequence[int], counts: Sequence[int]) -> tuple[int, ...]:
    """The declared lengths of the slabs that hold rows of these lengths with the fewest slots.

    Raises:
        InputError: no bucket does; names config.packing.buckets.
    """
    fitting = [tuple(b) for b in buckets if all(have >= need for have, need in zip(b, needed, strict=True))]
    if not fitting:
        raise InputError(f"config.packing.buckets = {tuple(buckets)} has none for rows of {tuple(needed)}; declare one")
    return min(fitting, key=lambda bucket: sum(n * length for n, length in zip(counts, bucket, strict=True)))


def sort_key(prompt_tokens: int, rows: Sequence[Row], counts: Sequence[int]) -> tuple[int, ...]:
    """Groups in this order have neighbours of like length, the longest slab first."""
    return (*needed_lengths([rows], counts)[::-1], prompt_tokens)


def in_ranks(rows: Sequence[Row]) -> list[int]:
    """The rows of a group from the shortest to the longest, by number."""
    return sorted(range(len(rows)), key=lambda r: len(rows[r].tokens))


def needed_lengths(groups: Sequence[Sequence[Row]], counts: Sequence[int]) -> tuple[int, ...]:
    """The longest row of each slab."""
    lengths = np.sort([[len(row.tokens) for row in group] for group in groups], axis=1)
    ends = np.cumsum(counts)
    return tuple(int(lengths[:, end - 1].max()) for end in ends)


def pack_rows(rows: Sequence[np.ndarray], length: int, fill: float | int, dtype: Any) -> np.ndarray:
    """Ragged rows -> [R, length], padded on the right with `fill`."""
    packed = np.full((len(rows), length), fill, dtype)
    for i, row in enumerate(rows):
        packed[i, : len(row)] = row
    return packed


def pack(
    groups: Sequence[Sequence[Row]], counts: Sequence[int], lengths: Sequence[int], pad: int, sampled: bool = True
) -> tuple[Slab, ...]:
    """Responses of B prompts, group after group -> slabs of the given lengths (see `smallest_lengths`)."""
    slabs, start = [], 0
    for count, length in zip(counts, lengths, strict=True):
        chosen = [group[r] for group in groups for r in in_ranks(group)[start : start + count]]
        start += count
        extra = {}
        if sampled:
            extra["advantages"] = np.array([row.advantage for row in chosen], np.float32)
            extra["sampler_logprobs"] = pack_rows([row.logprobs for row in chosen], length, 0.0, np.float32)
        slabs.append(
            Slab.of(
                tokens=pack_rows([row.tokens for row in chosen], length, pad, np.int32),
                lengths=np.array([len(row.tokens) for row in chosen], np.int32),
                weights=np.array([row.weight for row in chosen], np.float32),
                **extra,
            )
        )
    return tuple(slabs)


def blank(
    rows: int,
    counts: Sequence[int],
    lengths: Sequence[int],
    *,
    sampled: bool,
    old: bool = False,
    reference: bool = False,
) -> tuple[Slab, ...]:
    """Slabs of that shape with nothing in them: what a warm-up compiles for. `rows`: prompts."""
    slabs = []
    for count, length in zip(counts, lengths, strict=True):
        R = rows * count
        zeros = np.zeros((R, length), np.float32)
        slabs.append(
            Slab.of(
                tokens=np.zeros((R, length), np.int32),
                lengths=np.ones(R, np.int32),
                weights=zeros[:, 0],
                advantages=zeros[:, 0] if sampled else None,
                sampler_logprobs=zeros if sampled else None,
                old_logprobs=zeros if old else None,
                own=np.zeros(R, bool) if old else None,
                reference_logprobs=zeros if reference else None,
            )
        )
    return tuple(slabs)


SLOTS = ("real", "computed", "full", "patches", "patch_slots")


def slots(batches: Sequence[UpdateBatch]) -> np.ndarray:
    """Counts in the order of SLOTS of these batches (numpy): real tokens, token slots computed, tokens of full
    sequences (each response with its prompt in front), real patches, patch slots."""
    counts = np.zeros(len(SLOTS), np.int64)
    for batch in batches:
        prompts, vision = np.asarray(batch.prompts.lengths), batch.prompts.vision
        counts[:2] += prompts.sum(), batch.prompts.tokens.size
        for slab in batch.slabs:
            tokens = slab.lengths.sum()
            group = len(slab.lengths) // len(prompts)
            counts[:3] += tokens, slab.tokens.size, tokens + prompts.sum() * group
        if vision is not None:
            counts[3:] += (vision.segments > 0).sum(), vision.segments.size
    return counts


def shares(counts: np.ndarray) -> dict[str, float]:
    """From `slots`' counts: padding's share in what is computed, and real tokens divided by those of full sequences."""
    real, computed, full, patches, slots_ = (float(count) for count in counts)
    record = {"token_padding": 1 - real / computed, "packing": real / full}
    if slots_:
        record["patch_padding"] = 1 - patches / slots_
    return record
