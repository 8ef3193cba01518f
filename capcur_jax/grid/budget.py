"""What a row of the grid trains on and how much, so that rows that are compared differ in what they are about alone."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence

from ml_collections import ConfigDict

from capcur_jax import presets, schedule
from capcur_jax.schedule import Stage

IMITATION = "sft"  # the objective whose step is one update, and which samples nothing
CAPTIONS = "captions"  # stands for perception where that is learned by imitation
# Problems of the paper's sets, as its steps of an epoch imply them: 6, 25 and 31 of 512 prompts. How many captions the
# release imitated is not known.
PAPER_ROWS = {"perception": 6 * 512, "text": 25 * 512, "visual": 31 * 512, CAPTIONS: math.nan}


@dataclasses.dataclass(frozen=True)
class Budget:
    """Facts of a run; `differences` compares them.

    Attributes:
      prompts: of each set that are seen; NaN where that depends on a file. Of stages that a rule ends: by their steps.
      updates: of the weights.
      rates: the sum of the learning rate over the updates.
      tower: whether what has images trains the vision tower: "trained", "frozen", or "trained, frozen".
      references: how often reference and optimizer start anew.
      order: of the sets; "+" joins those that are shuffled together, "x 15" is how often the whole order comes.
      within: a set's own order.
      objectives: of each set.
      selection: what is left out.
      rules: what ends a stage.
    """

    prompts: Mapping[str, float]
    updates: float
    rates: float
    tower: str
    references: int
    order: str
    within: str
    objectives: Mapping[str, str]
    selection: str
    rules: str


def of(config: ConfigDict) -> Budget:
    """The run's. Raises InputError for a config that is none."""
    stages = schedule.stages(config)
    prompts: dict[str, float] = {}
    updates = rates = 0.0
    for stage in stages:
        seen = seen_by(stage)
        for name, count in seen.items():
            prompts[_capability(name)] = prompts.get(_capability(name), 0.0) + count
        count = steps_of(stage) * _updates(stage, config)
        updates += count
        rates += _rates(stage, count)
    pictured = [stage for stage in stages if set(stage.data) != {"text"}]  # texts give the tower no gradient
    return Budget(
        prompts=prompts,
        updates=updates,
        rates=rates,
        tower=_joined("frozen" if stage.freeze else "trained" for stage in pictured),
        references=len(stages),
        order=" > ".join(map(_order, stages)),
        within=_joined(stage.curriculum.order for stage in stages),
        objectives={_capability(name): stage.objective for stage in stages for name in stage.data},
        selection=_joined(_selection(stage) for stage in stages),
        rules=_joined(stage.switch.described() for stage in stages),
    )


def differences(one: Budget, other: Budget) -> frozenset[str]:
    """The facts that differ; of objectives those of sets that both use."""
    both = one.objectives.keys() & other.objectives.keys()
    one, other = (
        dataclasses.replace(budget, objectives={name: budget.objectives[name] for name in both})
        for budget in (one, other)
    )
    return frozenset(
        field.name
        for field in dataclasses.fields(Budget)
        if not _same(getattr(one, field.name), getattr(other, field.name))
    )


def _same(one: object, other: object) -> bool:
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=1e-9)
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    return one == other


def rows_of(stage: Stage) -> dict[str, float]:
    """Problems of each of its sets: those that the curriculum takes, else the paper's."""
    return {name: float(stage.curriculum.rows or PAPER_ROWS[name]) for name in stage.data}


def steps_of(stage: Stage) -> float:
    """Its steps; NaN where they are epochs of sets of unknown size."""
    return float(stage.steps) if stage.steps else sum(rows_of(stage).values()) * stage.epochs // stage.prompts


def seen_by(stage: Stage) -> dict[str, float]:
    """Prompts of each set. Of an epoch that is not whole each set has its share of a shuffled or rated pool, and in
    the order of the sets what comes first."""
    rows, total = rows_of(stage), steps_of(stage) * stage.prompts
    if stage.curriculum.weights:
        weights = dict(zip(stage.data, stage.curriculum.weights, strict=True))
        return {name: total * weight / sum(weights.values()) for name, weight in weights.items()}
    epoch = sum(rows.values())
    if stage.curriculum.drop_last:
        epoch = epoch // stage.prompts * stage.prompts
    epochs, rest = divmod(total, epoch)
    seen, share = {}, epoch / sum(rows.values())
    for name, count in rows.items():
        part = min(rest, count) if stage.curriculum.by_set else rest * count / sum(rows.values())
        rest -= part if stage.curriculum.by_set else 0
        seen[name] = epochs * count * share + part
    return seen


def _updates(stage: Stage, config: ConfigDict) -> int:
    return 1 if stage.objective == IMITATION else config.objective.updates_per_batch


def _rates(stage: Stage, updates: float) -> float:
    """The sum of the learning rate; NaN where the updates are not known."""
    if math.isnan(updates):
        return math.nan
    return math.fsum(stage.learning_rate_at(number, int(updates)) for number in range(int(updates)))


def _order(stage: Stage) -> str:
    names = list(map(_capability, stage.data))
    if len(names) == 1 or not stage.curriculum.by_set:
        return " + ".join(names)
    epochs = steps_of(stage) * stage.prompts / sum(rows_of(stage).values())
    return " > ".join(names) + (f" x {epochs:.3g}" if epochs > 1 else "")


def _selection(stage: Stage) -> str:
    left_out = {"pass rate 1": stage.curriculum.drop_all_right, "pass rate 0": stage.curriculum.drop_all_wrong}
    least, most = stage.curriculum.pass_rates
    return ", ".join(
        [*(f"no {what}" for what, out in left_out.items() if out)]
        + ([f"pass rates {least:g} to {most:g}"] if (least, most) != (0, 1) else [])
    )


def _capability(name: str) -> str:
    return "perception" if name == CAPTIONS else name


def _joined(words: Iterable[str]) -> str:
    """The different ones, in their order."""
    return "; ".join(filter(None, dict.fromkeys(words)))


# ---------------------------------------------------------------------- for people

HEAD = ("row", *presets.CAPABILITIES, "updates", "sum of rates", "tower", "differs from", "in")


def described(names: Sequence[str], budgets: Mapping[str, Budget], compared: Mapping[str, Sequence[str]]) -> list[list]:
    """Table rows under HEAD: what each row sees, and in what it differs from those that it is compared with.

    Args:
      budgets: of all rows, by name.
      compared: row -> the rows that it is compared with.
    """
    rows = []
    for name in names:
        budget = budgets[name]
        seen = [_number(budget.prompts.get(capability, 0.0)) for capability in presets.CAPABILITIES]
        facts = [*seen, _number(budget.updates), _number(budget.rates, ".3g"), budget.tower]
        others = list(compared[name]) or [""]
        for number, other in enumerate(others):
            said = ", ".join(sorted(differences(budget, budgets[other]))) if other else ""
            rows.append([*([name, *facts] if not number else [""] * (1 + len(facts))), other, said])
    return rows


def _number(value: float, form: str = ",.0f") -> str:
    return "?" if math.isnan(value) else f"{value:{form}}"
