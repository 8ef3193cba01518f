"""Lengths of prompts, images and responses that a plan computes with: drawn from a named distribution, or recorded."""

from __future__ import annotations

import collections
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from capcur_jax.errors import InputError
from capcur_jax.learner import objectives
from capcur_jax.models.batching import PromptSize
from capcur_jax.records.jsonl import read_jsonl
from capcur_jax.schedule import Stage

_SHORT = 8  # a response of the smallest step is this part of the longest
Group = tuple[PromptSize, list[int]]  # a prompt's size and its responses' lengths, in tokens
Lengths = Callable[[Stage, bool], list[Group]]  # those of a step of a stage, whose prompts have images or not


class Drawn(NamedTuple):
    """Log-normal images and responses, even texts. All in tokens; `sigma`: of the logarithm."""

    image: int  # the median; 0: none
    image_sigma: float
    image_ends: tuple[int, int]
    text: tuple[int, int]  # at least, less than
    response: int  # the mean, before the longest are cut
    between: float  # sigma of groups
    within: float  # sigma of the responses of a group


NAMES = {
    "paper": Drawn(520, 0.45, (256, 1150), (60, 201), 550, 0.45, 0.35),
    "mathvision": Drawn(1000, 0.1, (1, 10**6), (60, 151), 400, 0.35, 0.35),
    "geo3k": Drawn(280, 0.15, (256, 600), (80, 160), 350, 0.4, 0.35),
    "text": Drawn(0, 0.0, (0, 0), (80, 300), 700, 0.45, 0.35),
}


def draw(kind: Drawn, prompts: int, group: int, longest: int, merge: int, random: np.random.Generator) -> list[Group]:
    """The groups of a step. `longest`: tokens of a response at most. `merge`: of a side's patches in an image token."""
    images = np.zeros(prompts, int)
    if kind.image:
        spread = np.exp(kind.image_sigma * random.standard_normal(prompts))
        images = np.clip(np.rint(kind.image * spread), *kind.image_ends).astype(int)
    texts = random.integers(*kind.text, prompts)
    shape = random.standard_normal((prompts, 1)), random.standard_normal((prompts, group))
    # Of a log-normal number with sigmas a and b the mean is median x exp((a^2 + b^2) / 2).
    median = kind.response * math.exp(-(kind.between**2 + kind.within**2) / 2)
    responses = np.rint(median * np.exp(kind.between * shape[0] + kind.within * shape[1]))
    responses = np.clip(responses, 1, longest).astype(int)
    sizes = [PromptSize(int(i + t), (int(i) * merge**2,) if i else ()) for i, t in zip(images, texts, strict=True)]
    return list(zip(sizes, responses.tolist(), strict=True))


def of(name: str, config: ConfigDict, merge: int) -> Lengths:
    """The lengths of `--lengths`. Raises InputError: neither a name nor a run's records."""
    longest = config.rollout.max_new_tokens
    if name in NAMES:

        def drawn(stage: Stage, images: bool) -> list[Group]:
            kind = NAMES[name] if images else NAMES["text"]
            return draw(kind, stage.prompts, _group(stage, config), longest, merge, np.random.default_rng(0))

        return drawn
    path = Path(name).expanduser()
    path = path / "rollouts.jsonl" if path.is_dir() else path
    if not path.is_file():
        raise InputError(
            f"--lengths={name}: neither one of {', '.join(NAMES)} nor a run's rollouts.jsonl or its work directory"
        )
    pools = _pools(path)

    def recorded(stage: Stage, images: bool) -> list[Group]:
        if stage.name not in pools:
            raise InputError(f"{path} has stages {', '.join(pools)}, none called {stage.name}: give --config.order")
        random, pool = np.random.default_rng(0), pools[stage.name]
        chosen = random.choice(len(pool), stage.prompts, replace=len(pool) < stage.prompts)
        groups, n = [pool[i] for i in chosen], _group(stage, config)
        return [
            (
                size if images else size._replace(images=()),
                np.minimum(random.choice(lengths, n, replace=len(lengths) < n), longest).tolist(),
            )
            for size, lengths in groups
        ]

    return recorded


def _pools(path: Path) -> dict[str, list[Group]]:
    """The recorded groups of each stage. Raises InputError."""
    pools: dict[str, list[Group]] = collections.defaultdict(list)
    try:
        lines: Sequence[dict[str, Any]] = read_jsonl(path)
        for number, line in enumerate(lines, 1):
            if "prompt_tokens" not in line:
                raise InputError(
                    f"{path}:{number} has no prompt_tokens, which plans draw prompts from: give the rollouts.jsonl of "
                    "a run of this version"
                )
            size = PromptSize(line["prompt_tokens"], tuple(line["image_patches"]))
            pools[line["stage"]].append((size, [sample["tokens"] for sample in line["samples"]]))
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is no rollouts.jsonl: {error}") from None
    if not pools:
        raise InputError(f"{path} has no rollouts")
    return pools


def declared(config: ConfigDict, merge: int, images: bool, choose: Callable[..., int]) -> PromptSize:
    """The largest (`choose`: max) or smallest (min) prompt that a plan is made for, with an image as large as there can
    be in it."""
    tokens = choose(config.prompt.max_tokens, -(-config.prompt.max_tokens // _SHORT))
    row = choose((length for _, length in config.prompt.patch_buckets), default=0)
    return PromptSize(tokens, (min(row, tokens * merge**2),) if images else ())


def extreme(config: ConfigDict, merge: int, largest: bool) -> Lengths:
    """All prompts of the largest (smallest) declared sizes; responses as long as may be (an eighth of that). `merge`:
    as in `draw`."""
    choose = max if largest else min
    length = config.rollout.max_new_tokens if largest else -(-config.rollout.max_new_tokens // _SHORT)

    def same(stage: Stage, images: bool) -> list[Group]:
        return [(declared(config, merge, images, choose), [length] * _group(stage, config))] * stage.prompts

    return same


def _group(stage: Stage, config: ConfigDict) -> int:
    return config.rollout.group if objectives.of_stage(stage).sampled else 1
