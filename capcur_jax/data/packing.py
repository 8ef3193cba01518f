"""Rollouts -> an update batch of static shape: prompt rows once a group, response rows beside them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from capcur_jax.models.batching import smallest_bucket
from capcur_jax.models.qwen_vl import PromptBatch


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class UpdateBatch:
    """B prompts and their R = B x G responses; row r answers prompt r // G. Arrays that an objective does not use are
    None (an sft batch has neither advantages nor the sampler's log-probs)."""

    prompts: PromptBatch
    tokens: Any  # [R, T] int32, padded on the right
    lengths: Any  # [R] int32
    advantages: Any = None  # [R] float32
    sampler_logprobs: Any = None  # [R, T] float32
    old_logprobs: Any = None  # [R, T]; None: one update per rollout batch, the policy's own with stopped gradient
    reference_logprobs: Any = None  # [R, T]; None: no KL term


def pack_rows(rows: Sequence[np.ndarray], length: int, fill: float | int, dtype: Any) -> np.ndarray:
    """Ragged rows -> [R, length], padded on the right with `fill`."""
    packed = np.full((len(rows), length), fill, dtype)
    for i, row in enumerate(rows):
        packed[i, : len(row)] = row
    return packed


def pack(
    prompts: PromptBatch,
    tokens: Sequence[np.ndarray],
    response_buckets: Sequence[int],
    pad: int,
    *,
    advantages: np.ndarray | None = None,
    sampler_logprobs: Sequence[np.ndarray] | None = None,
) -> UpdateBatch:
    """Responses in the prompts' order, G after G, padded to the smallest declared bucket that holds the longest."""
    T = smallest_bucket(response_buckets, max(map(len, tokens)), "config.rollout.response_buckets")
    return UpdateBatch(
        prompts=prompts,
        tokens=pack_rows(tokens, T, pad, np.int32),
        lengths=np.array([len(row) for row in tokens], np.int32),
        advantages=advantages,
        sampler_logprobs=None if sampler_logprobs is None else pack_rows(sampler_logprobs, T, 0.0, np.float32),
    )
