"""A step's rollouts: groups of samples, their rewards and advantages, drawn again where groups teach nothing (DAPO)."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import itertools
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from capcur_jax.data.loader import Example
from capcur_jax.devices import distributed
from capcur_jax.models.batching import PromptSize
from capcur_jax.rewards.reward import Reward, Score
from capcur_jax.rollout.engine import Sample

_ENDS = ("reward_min", "advantage_min", "reward_max", "advantage_max", "staleness_max")


class Group(NamedTuple):
    """All responses to one example."""

    example: Example
    samples: Sequence[Sample]
    responses: Sequence[str]
    scores: Sequence[Score]
    advantages: np.ndarray  # [G]

    @property
    def rewards(self) -> np.ndarray:
        return np.array([score.reward for score in self.scores], np.float32)

    @property
    def equal(self) -> bool:
        """All rewards are the same: the group has no advantage to learn from."""
        return bool(self.rewards.max() == self.rewards.min())


# A group that is being graded: its responses and their scores.
Grade = concurrent.futures.Future[tuple[Sequence[str], Sequence[Score]]]


class Grading:
    """Rewards and advantages of a rollout batch. Groups are graded in threads of its own, each as soon as `begin` is
    told of it, unless the reward wants a batch as a whole. One that takes long or fails keeps no other waiting.

    Args:
        decode: a response's tokens as text.
        advantages: of rewards [B, G], inside each group [B, G].
    """

    def __init__(
        self,
        reward: Reward,
        decode: Callable[[np.ndarray], str],
        advantages: Callable[[np.ndarray], jax.Array],
    ):
        self._reward, self._decode, self._advantages = reward, decode, advantages
        self._threads: concurrent.futures.ThreadPoolExecutor | None = None
        if reward.parallel:
            self._threads = concurrent.futures.ThreadPoolExecutor(reward.parallel, "grading")

    def begin(self, example: Example, samples: Sequence[Sample]) -> Grade | None:
        """Starts to grade a group, from any thread; None where the reward wants its batch as a whole."""
        return None if self._threads is None else self._threads.submit(self._grade, example, samples)

    def __call__(
        self, examples: Sequence[Example], drawn: Sequence[Sequence[Sample]], begun: Sequence[Grade | None]
    ) -> list[Group]:
        """One group for each of B examples, from G samples each. `begun`: what `begin` gave for them; None: it was not
        asked. Raises RuntimeError where the user's function failed for all of them, or no worker can be started."""
        if self._threads is None:
            graded = self._at_once(examples, drawn)
        else:
            grades = [
                grade or self._threads.submit(self._grade, example, samples)
                for example, samples, grade in zip(examples, drawn, begun, strict=True)
            ]
            graded = [grade.result() for grade in grades]
            self._reward.check([score for _, scores in graded for score in scores])
        rewards = np.array([[score.reward for score in scores] for _, scores in graded], np.float32)
        advantages = np.asarray(self._advantages(rewards))
        return [
            Group(example, samples, *graded[b], advantages[b])
            for b, (example, samples) in enumerate(zip(examples, drawn, strict=True))
        ]

    def _grade(self, example: Example, samples: Sequence[Sample]) -> tuple[list[str], list[Score]]:
        responses = [self._decode(sample.tokens) for sample in samples]
        return responses, self._reward.score([example.problem] * len(samples), responses)

    def _at_once(
        self, examples: Sequence[Example], drawn: Sequence[Sequence[Sample]]
    ) -> list[tuple[list[str], list[Score]]]:
        responses = [[self._decode(sample.tokens) for sample in samples] for samples in drawn]
        problems = [example.problem for example, samples in zip(examples, drawn, strict=True) for _ in samples]
        scores = iter(self._reward(problems, [response for group in responses for response in group]))
        return [(group, list(itertools.islice(scores, len(group)))) for group in responses]

    def close(self) -> None:
        """Begins no grade any more; those that run end with the reward's workers."""
        if self._threads is not None:
            self._threads.shutdown(wait=False, cancel_futures=True)

    def warm_up(self, prompts: int, group: int) -> None:
        """Compiles what so many prompts with so many responses need."""
        self._advantages(np.zeros((prompts, group), np.float32))


@dataclasses.dataclass
class Rollout:
    """The groups that a step trains on (this process's), and what was drawn for them."""

    groups: list[Group]
    drawn: int  # groups, those that were drawn again included
    dropped_equal: int  # of them left out because they had no advantage
    capabilities: tuple[str, ...] = ()  # of the stage, in an order that all processes share
    batches: int = 0  # rollout batches that were consumed for it
    version: int = 0  # of the weights that train on them
    refused: Sequence[str] = ()  # ids of problems whose prompts the engine refused; others took their places
    renewed: int = 0  # groups that were sampled again because they were too old
    tokens_per_second: float = 0.0  # of this process's last call of the sampler

    @property
    def samples(self) -> list[Sample]:
        return [sample for group in self.groups for sample in group.samples]

    def metrics(self) -> dict[str, float]:
        """What the step record says about the rollouts, over all processes."""
        sums: dict[str, tuple[float, int]] = {}  # and of how many values

        def add(name: str, values: Sequence[float]) -> None:
            sums[name] = float(np.sum(values)), len(values)

        scores = [score for group in self.groups for score in group.scores]
        lengths = [len(sample.tokens) for sample in self.samples]
        rewards = np.concatenate([group.rewards for group in self.groups])
        advantages = np.concatenate([group.advantages for group in self.groups])
        add("reward", rewards)
        add("reward_square", rewards**2)
        add("advantage", advantages)
        add("advantage_square", advantages**2)
        add("advantage_positive", advantages > 0)
        add("accuracy", [score.accuracy for score in scores])
        add("format", [score.format for score in scores])
        add("response_length", lengths)
        add("timed_out", [score.timed_out for score in scores])
        add("truncated", [sample.finish == "length" for sample in self.samples])
        add("equal_groups", [group.equal for group in self.groups])
        add("right_groups", [group.equal and group.scores[0].accuracy > 0 for group in self.groups])
        add("drawn_groups", [self.drawn])
        add("dropped_groups", [self.dropped_equal])
        add("refused_prompts", [len(self.refused)])
        add("renewed_groups", [self.renewed])
        add("rollout_tokens_per_second", [self.tokens_per_second])
        ages = np.array([self.version - sample.version for sample in self.samples])
        add("staleness", ages)
        for capability in self.capabilities:
            mine = [group for group in self.groups if group.example.problem.capability == capability]
            add(f"response_length/{capability}", [len(s.tokens) for group in mine for s in group.samples])
        total = dict(zip(sums, distributed.exchange(np.array(list(sums.values()))).sum(0).tolist(), strict=True))
        low = np.array([rewards.min(), advantages.min(), -rewards.max(), -advantages.max(), -ages.max()])
        ends = dict(zip(_ENDS, distributed.exchange(low).reshape(-1, len(_ENDS)).min(0).tolist(), strict=True))
        mean = {name: value / count for name, (value, count) in total.items() if count}
        for name in ("reward", "advantage"):
            mean[f"{name}_std"] = float(np.sqrt(max(mean.pop(f"{name}_square") - mean[name] ** 2, 0.0)))
        mean |= {name: 0.0 - value if name.endswith("_max") else value for name, value in ends.items()}
        for name in (
            "drawn_groups",
            "dropped_groups",
            "refused_prompts",
            "renewed_groups",
            "rollout_tokens_per_second",
        ):
            mean[name] = total[name][0]
        return {name: float(value) for name, value in mean.items()}

    def shown(self, prompts: int, workdir: Path) -> list[dict[str, Any]]:
        """The first groups as records for rollouts.jsonl; images by their path from the work directory."""
        lines = []
        for group in self.groups[:prompts]:
            problem, size = group.example.problem, PromptSize.of(group.example.prompt)
            samples = [
                {
                    "response": response,
                    "reward": score.reward,
                    "accuracy": score.accuracy,
                    "format": score.format,
                    "timed_out": score.timed_out,
                    "advantage": float(advantage),
                    "tokens": len(sample.tokens),
                    "finish": sample.finish,
                    "weights": [list(span) for span in sample.spans],
                }
                for response, score, advantage, sample in zip(
                    group.responses, group.scores, group.advantages, group.samples, strict=True
                )
            ]
            lines.append(
                {
                    "id": problem.id,
                    "problem": problem.problem,
                    "answer": problem.answer,
                    "images": [os.path.relpath(image, workdir) for image in problem.images],
                    "prompt_tokens": size.tokens,
                    "image_patches": list(size.images),
                    "samples": samples,
                }
            )
        return lines
