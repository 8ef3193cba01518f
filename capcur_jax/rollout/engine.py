"""What a rollout engine is. The trainer knows this file alone, not which engine answers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from ml_collections import ConfigDict

from capcur_jax.axes import Float, Int, checked
from capcur_jax.errors import InputError
from capcur_jax.models.batching import PromptSize
from capcur_jax.models.inputs import Prompt


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How to sample. temperature 0 is greedy; log-probs are then those at temperature 1."""

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # likeliest tokens that may be sampled; 0: all

    def __post_init__(self):
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens = {self.max_new_tokens}; it must be at least 1")
        if not self.temperature >= 0:  # catches NaN too
            raise ValueError(f"temperature = {self.temperature}; it must be 0 (greedy) or more")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p = {self.top_p}; it must be in (0, 1]")
        if self.top_k < 0:
            raise ValueError(f"top_k = {self.top_k}; it must be 0 (all tokens) or more")


class Span(NamedTuple):
    """Tokens [start, end) of a response and the version of the weights that made them."""

    version: int
    start: int
    end: int


@dataclasses.dataclass(frozen=True)
class Sample:
    """One response. Training uses these very tokens: re-tokenised text drifts (TRL #5224)."""

    tokens: np.ndarray  # [t] int32, the end token included where it came
    logprobs: np.ndarray  # [t] float32, of the sampled tokens over the full softmax at the sampling temperature
    finish: str  # "stop" (an end token came) or "length"
    spans: tuple[Span, ...]  # over all tokens, in order; several where the weights changed while it was sampled

    @property
    def version(self) -> int:
        """Of the oldest weights that made a part of it."""
        return min(span.version for span in self.spans)

    @classmethod
    @checked
    def whole(
        cls, tokens: Int[np.ndarray, " T"], logprobs: Float[np.ndarray, " T"], finish: str, version: int
    ) -> Sample:
        """One that a single version made."""
        return cls(tokens, logprobs, finish, (Span(version, 0, len(tokens)),))


Told = Callable[[int, list[Sample]], None]  # of a prompt's number in a call, and its samples


@dataclasses.dataclass(frozen=True)
class Health:
    """What an engine is doing now; may be asked from any thread while it generates."""

    version: int  # of the weights that the next token comes from
    running: int = 0  # responses being decoded
    queued: int = 0  # responses that wait for a place
    tokens_per_second: float = 0.0  # of the call that runs or ran last, so far
    servers: int = 0  # that belong to the engine; 0: it is in this process
    alive: int = 0  # of them answering
    refusal: str = ""  # why the last prompt that got no answer was refused


class Engine(Protocol):
    def update_weights(self, parameters: Any, version: int) -> dict[str, float]:
        """Every token sampled after this returns comes from these parameters; returns seconds by phase.

        Raises RolloutError if that can't be achieved; samples then still carry the version that made them.
        """

    def warm_up(self, sizes: Sequence[PromptSize], sampling: Sampling, n: int, images: bool | None = None) -> None:
        """Does now what would make `generate` slow when it is first called with prompts of these sizes."""

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        n: int,
        seed: int,
        images: bool | None = None,
        done: Told | None = None,
    ) -> list[list[Sample]]:
        """`n` samples for each prompt, in the prompts' order; none for a prompt that the engine refuses to answer, for
        a reason that `health` has.

        `images`: whether images may come in calls like this one, so that one without any is served by the same program.
        None: whether this one has any. `done` is told of each prompt that has all its samples, while others are still
        sampled; from any thread, and it must return at once. Raises RolloutError when an engine can't go on.
        """

    def health(self) -> Health:
        """Cheap; no server is asked."""

    def counters(self) -> dict[str, int]:
        """Counts of failures that were recovered from in this process since the start, such as retries and restarts."""

    def release(self) -> None:
        """Gives its device memory to the trainer until `resume`, where the two take turns on the same devices."""

    def resume(self) -> None:
        """Takes its device memory back; `update_weights` must follow before `generate`."""

    def close(self) -> None:
        """Releases what the engine holds."""


def sampling_of(config: ConfigDict, key: str) -> Sampling:
    try:
        settings = config[key]
        return Sampling(config.rollout.max_new_tokens, settings.temperature, settings.top_p, settings.get("top_k", 0))
    except ValueError as error:
        raise InputError(f"config.{key}: {error}") from None
