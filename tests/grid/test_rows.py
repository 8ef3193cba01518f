"""Every row of the paper, at every size: rows that are compared differ in what they are about, and in nothing else."""

from __future__ import annotations

import collections
import functools
import math

import pytest

from capcur_jax import presets, schedule
from capcur_jax.checkpoints.checkpointing import _flat
from capcur_jax.data.problem import Problem
from capcur_jax.grid import budget
from capcur_jax.grid.rows import BASE, ROWS
from capcur_jax.learner.objectives import OBJECTIVES
from capcur_jax.presets import LAPTOP_PROMPTS, LAPTOP_STEPS

PAIRS = [(name, other) for name, row in ROWS.items() for other in row.compared]
MAY_DIFFER = ("order", "stages.", "data.sets.captions.")  # between two rows' configs


@functools.cache
def config_of(name, preset):
    return presets.read(ROWS[name].config(preset), [])


@functools.cache
def budget_of(name, preset):
    return budget.of(config_of(name, preset))


def test_every_row_is_there():
    orders = [f"order_{order}" for order in (132, 213, 231, 312, 321)]
    assert list(ROWS) == [
        "staged", *orders, "text_visual", "perception_visual", "visual", "perception", "merged", "merged_trained",
        "merged_in_order", "sft_perception", "difficulty", "difficulty_filtered", "capability_x_difficulty",
        "capability_x_difficulty_one_run", "adaptive",
    ]  # fmt: skip
    assert all(row.compared for row in ROWS.values()) and "base" not in ROWS and BASE.paper


@pytest.mark.parametrize("preset", presets.PRESETS)
@pytest.mark.parametrize("name", ROWS)
def test_every_row_can_be_built_at_every_size(name, preset):
    config, found = config_of(name, preset), budget_of(name, preset)
    stages = schedule.stages(config)
    assert config.is_locked and found.references == len(stages)
    assert all(stage.prompts % config.objective.updates_per_batch == 0 for stage in stages)
    assert set(found.prompts) <= set(presets.CAPABILITIES)
    if name.startswith("order_"):
        order = "".join(str(1 + presets.CAPABILITIES.index(stage.name)) for stage in stages)
        assert name == f"order_{order}"


@pytest.mark.parametrize(("name", "other"), PAIRS)
def test_rows_that_are_compared_differ_in_what_they_are_about(name, other):
    about, ever = ROWS[name].compared[other], set()
    for preset in presets.PRESETS:
        found = budget.differences(budget_of(name, preset), budget_of(other, preset))
        assert found <= about, (preset, found - about)
        assert found, preset
        ever |= found
        mine, theirs = (_flat(config_of(row, preset).to_dict()) for row in (name, other))
        changed = {key for key in mine.keys() | theirs.keys() if mine.get(key) != theirs.get(key)}
        assert all(key.startswith(MAY_DIFFER) for key in changed), changed
    assert ever == about  # nothing is announced that is never so


@pytest.mark.parametrize("name", ROWS)
def test_a_laptop_s_row_sees_as_much_of_each_set_that_it_uses_as_any_other(name):
    found, staged = budget_of(name, "laptop"), budget_of("staged", "laptop")
    assert all(math.isclose(count, staged.prompts[capability]) for capability, count in found.prompts.items())
    share = len(found.prompts) / len(staged.prompts)
    assert found.updates == share * staged.updates and math.isclose(found.rates, share * staged.rates)
    stages = schedule.stages(config_of(name, "laptop"))
    assert {(stage.learning_rate_schedule, stage.warmup_steps) for stage in stages} == {("constant", 0)}
    assert config_of(name, "laptop").objective.updates_per_batch > 1


@pytest.mark.parametrize(
    "name", ["merged", "merged_in_order", "difficulty", "sft_perception", "capability_x_difficulty"]
)
def test_what_a_budget_says_is_what_the_curriculum_gives(name):
    """The prompts of each set, counted."""
    config = config_of(name, "laptop")
    seen = collections.Counter()
    for stage in schedule.stages(config):
        sets = [
            [
                Problem(f"{kind}{n}", "?", "1", capability=kind, pass_rate=n % 4 / 4)
                for n in range(stage.curriculum.rows)
            ]
            for kind in stage.data
        ]
        order = stage.curriculum.arrange(sets, 0, stage.prompts)
        seen.update(order[number].capability for number in range(stage.steps * stage.prompts))
    seen["perception"] += seen.pop("captions", 0)
    assert seen == {kind: round(count) for kind, count in budget_of(name, "laptop").prompts.items()}


@pytest.mark.parametrize("kinds", [{}, {"by_set": True}, {"drop_last": True}, {"weights": (2.0, 1.0)}])
def test_parts_of_epochs_are_counted_too(kinds):
    config = presets.get("laptop", order=("merged",))
    config.stages.merged.update({"data": ("text", "visual"), "steps": 7, "prompts": 10})
    config.stages.merged.curriculum.update({"rows": 24, **kinds})
    (stage,) = schedule.stages(config)
    sets = [[Problem(f"{kind}{n}", "?", "1", capability=kind) for n in range(24)] for kind in stage.data]
    order = stage.curriculum.arrange(sets, 3, stage.prompts)
    seen = collections.Counter(order[number].capability for number in range(70))
    for kind, count in budget.seen_by(stage).items():
        assert abs(seen[kind] - count) <= (1 if kinds.get("by_set") or kinds.get("weights") else 6)


def test_one_objective_alone_has_one_update_a_step():
    assert [name for name, objective in OBJECTIVES.items() if not objective.sampled] == [budget.IMITATION]


def test_the_paper_s_rows_see_whole_epochs():
    for name in ("staged", "merged", "merged_in_order"):
        assert budget_of(name, "qwen3_vl_8b").prompts == {
            kind: 15 * rows for kind, rows in budget.PAPER_ROWS.items() if kind != budget.CAPTIONS
        }
    assert budget_of("merged_in_order", "qwen3_vl_8b").order == "perception > text > visual x 15"
    assert math.isnan(budget_of("sft_perception", "qwen3_vl_8b").updates)  # epochs of captions of unknown number


def test_the_paper_s_values_are_of_rows_and_models_that_there_are():
    for row in (BASE, *ROWS.values()):
        for value in row.paper:
            assert value.model in (None, "qwen3_vl_8b", "qwen2_5_vl_7b") and (value.table in row.tables or value.over)
            assert not value.over or value.over in ROWS or value.over == "base"


def test_a_description_has_a_line_for_each_comparison():
    names = ["merged_trained", "visual"]
    found = {name: budget_of(name, "laptop") for name in [*names, "staged", "merged"]}
    lines = budget.described(names, found, {name: list(ROWS[name].compared) for name in names})
    assert [line[-2:] for line in lines] == [
        ["staged", "order, references"], ["merged", "tower"], ["staged", "order, prompts, rates, references, updates"],
    ]  # fmt: skip
    prompts = f"{LAPTOP_STEPS * LAPTOP_PROMPTS:,}"
    assert lines[0][:4] == ["merged_trained", prompts, prompts, prompts] and lines[1][0] == "" and lines[2][1] == "0"
