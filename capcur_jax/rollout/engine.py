"""What a rollout engine is. The trainer knows this file alone, not which engine answers."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from capcur_jax.models.batching import PromptSize
from capcur_jax.models.inputs import Prompt


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How to sample. temperature 0 is greedy; log-probs are then those at temperature 1."""

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0

    def __post_init__(self):
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens = {self.max_new_tokens}; it must be at least 1")
        if not self.temperature >= 0:  # catches NaN too
            raise ValueError(f"temperature = {self.temperature}; it must be 0 (greedy) or more")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p = {self.top_p}; it must be in (0, 1]")


@dataclasses.dataclass(frozen=True)
class Sample:
    """One response. Training uses these very tokens: re-tokenised text drifts (TRL #5224)."""

    tokens: np.ndarray  # [t] int32, the end token included where it came
    logprobs: np.ndarray  # [t] float32, of the sampled tokens over the full softmax at the sampling temperature
    finish: str  # "stop" (an end token came) or "length"
    version: int  # of the weights that made it


class Engine(Protocol):
    def update_weights(self, parameters: Any, version: int) -> None:
        """The next `generate` uses these parameters."""

    def warm_up(self, sizes: Sequence[PromptSize], sampling: Sampling, n: int, images: bool | None = None) -> None:
        """Does now what would make `generate` slow when it is first called with prompts of these sizes."""

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, n: int, seed: int, images: bool | None = None
    ) -> list[list[Sample]]:
        """`n` samples for each prompt, in the prompts' order.

        `images`: whether images may come in calls like this one, so that one without any is served by the same program.
        None: whether this one has any.
        """

    def close(self) -> None:
        """Releases what the engine holds."""
