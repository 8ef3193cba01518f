"""Stages and their order: which data, which objective, for how many steps (the paper's ablations). No JAX in here."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from ml_collections import ConfigDict

from capcur_jax.data.curriculum import Curriculum
from capcur_jax.errors import InputError

LEARNING_RATE_SCHEDULES = ("constant", "linear", "cosine")
RULES = ("none", "plateau", "mastered")


@dataclasses.dataclass(frozen=True)
class Switch:
    """`config.stages.NAME.switch`: what ends a stage before its steps are done; presets.py says what the keys do."""

    rule: str = "none"
    checks: int = 3
    window: int = 20
    above: float = 0.8

    def over(self, steps: Sequence[float], validations: Sequence[float]) -> bool:
        """Whether the stage ends here.

        Args:
          steps: of each step of the stage so far, the share of right responses; -inf where there is none.
          validations: the accuracy of each of its validations so far.
        """
        if self.rule == "plateau" and validations:
            return len(validations) - 1 - validations.index(max(validations)) >= self.checks
        if self.rule == "mastered" and len(steps) >= self.window:
            return sum(steps[-self.window :]) / self.window >= self.above
        return False

    def described(self) -> str:
        """In a few words, for people; nothing of a stage that has its steps alone."""
        return {
            "plateau": f"until {self.checks} validations in a row were no better",
            "mastered": f"until {self.above:.0%} of the responses of {self.window} steps are right",
        }.get(self.rule, "")


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
    switch: Switch = dataclasses.field(default_factory=Switch)

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
        made = {"data": tuple(given.data), "curriculum": curriculum, "switch": Switch(**given.switch.to_dict())}
        stage = Stage(name=name, **given.to_dict() | made)
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
    _check_rules(result)
    return result


def _check_rules(stages: Sequence[Stage]) -> None:
    """That what a stage leaves can be used by those after it. Raises InputError."""
    for stage, following in zip(stages, [*stages[1:], None], strict=True):
        where = f"config.stages.{stage.name}.switch.rule = {stage.switch.rule!r}"
        if stage.switch.rule not in RULES:
            raise InputError(f"{where}; choose one of {', '.join(RULES)}")
        if stage.switch.rule == "none":
            continue
        if following is None:
            raise InputError(f"{where}: no stage comes after it that could have the steps it leaves; set it to 'none'")
        if following.prompts != stage.prompts:
            raise InputError(
                f"{where}: the steps that it leaves go to stage '{following.name}', whose steps have "
                f"{following.prompts} prompts instead of {stage.prompts}; give both the same"
            )


def with_what_is_left(stages: Sequence[Stage], number: int, before: int) -> Stage:
    """Stage `number` with its own steps and those that the stages before it left; they made `before` steps."""
    return dataclasses.replace(stages[number], steps=sum(stage.steps for stage in stages[: number + 1]) - before)
