"""Stages and their order: which data, which objective, for how many steps (the paper's ablations). No JAX in here."""

from __future__ import annotations

import dataclasses
import math

from ml_collections import ConfigDict

from capcur_jax.data.curriculum import Curriculum
from capcur_jax.errors import InputError

LEARNING_RATE_SCHEDULES = ("constant", "linear", "cosine")


@dataclasses.dataclass(frozen=True)
class Stage:
    """One run of its own inside the schedule: the reference policy and the optimizer state start anew with it."""

    name: str
    data: tuple[str, ...]  # names of config.data's sets; several are one shuffled pool (merged training)
    objective: str  # a name in learner/objectives.OBJECTIVES
    steps: int  # rollout batches (grpo) or updates (sft); 0 where epochs are given, until the data is known
    prompts: int  # in one rollout batch (grpo) or one update (sft)
    learning_rate: float
    learning_rate_schedule: str
    warmup_steps: int
    freeze: str  # parameters whose path this regular expression finds get no gradient and no optimizer state
    epochs: int = 0  # 0 where steps are given
    curriculum: Curriculum = dataclasses.field(default_factory=Curriculum)

    def learning_rate_at(self, step: int, updates: int) -> float:
        """The learning rate of update `step` (from 0) of `updates` in all, at least one."""
        warm = min(1.0, (step + 1) / self.warmup_steps) if self.warmup_steps else 1.0
        if self.learning_rate_schedule == "constant":
            return self.learning_rate * warm
        if self.learning_rate_schedule == "linear":
            return self.learning_rate * warm * (1 - step / updates)
        return self.learning_rate * warm * 0.5 * (1 + math.cos(math.pi * step / updates))


def stages(config: ConfigDict) -> list[Stage]:
    """The stages of `config.order`, checked. Raises InputError naming the key and the remedy."""
    if not config.order:
        raise InputError("config.order is empty: name at least one of config.stages, " + ", ".join(config.stages))
    if len(set(config.order)) < len(config.order) or {"base", "final"} & set(config.order):
        raise InputError(
            f"config.order = {tuple(config.order)}: a stage may come once (give a copy in config.stages another name), "
            "and none may be called base or final, which name moments of the run"
        )
    result = []
    for name in config.order:
        if name not in config.stages:
            raise InputError(
                f"config.order names '{name}', which config.stages lacks; it has {', '.join(config.stages)}"
            )
        given, where = config.stages[name], f"config.stages.{name}"
        curriculum = Curriculum.from_config(given.curriculum, f"{where}.curriculum", len(given.data))
        stage = Stage(name=name, **given.to_dict() | {"data": tuple(given.data), "curriculum": curriculum})
        if stage.learning_rate_schedule not in LEARNING_RATE_SCHEDULES:
            raise InputError(
                f"{where}.learning_rate_schedule = {stage.learning_rate_schedule!r}; "
                f"choose one of {', '.join(LEARNING_RATE_SCHEDULES)}"
            )
        if min(stage.steps, stage.epochs) < 0 or bool(stage.steps) == bool(stage.epochs):
            raise InputError(
                f"{where}.steps = {stage.steps} and epochs = {stage.epochs}: one must be at least 1, the other 0 "
                "(a stage that is not wanted is left out of config.order)"
            )
        missing = [name for name in stage.data if name not in config.data.sets]
        if missing or not stage.data:
            raise InputError(f"{where}.data = {stage.data}: config.data.sets has {', '.join(config.data.sets)}")
        result.append(stage)
    return result
