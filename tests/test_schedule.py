"""Stages: what they take from the config, which mistakes are named by their key, and learning rates by hand."""

import dataclasses
import inspect
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from capcur_jax import presets, schedule
from capcur_jax.data.curriculum import Curriculum
from capcur_jax.errors import InputError

CONFIGS = Path(__file__).parents[1] / "configs"


@pytest.fixture
def config():
    return presets.get("laptop")


def test_stages_come_in_the_config_s_order_with_its_values():
    config = presets.get("laptop", order=("visual", "perception"))
    given = {"data": ("text", "visual"), "objective": "sft", "steps": 7, "prompts": 3, "learning_rate": 2e-5}
    given |= {"learning_rate_schedule": "cosine", "warmup_steps": 5, "freeze": "^visual"}
    config.stages.visual.update(given)
    first, second = schedule.stages(config)
    found = dataclasses.asdict(first)
    curriculum = Curriculum(rows=presets.LAPTOP_STEPS * presets.LAPTOP_PROMPTS)
    assert found.pop("curriculum") == dataclasses.asdict(curriculum) and found.pop("epochs") == 0
    assert found.pop("switch") == dataclasses.asdict(schedule.Switch())
    assert found == {"name": "visual", **given}
    assert (second.name, second.data) == ("perception", ("perception",))


def test_several_sets_make_one_stage():
    (stage,) = schedule.stages(presets.get("laptop", order=("merged",)))
    assert stage.data == presets.CAPABILITIES and stage.freeze == "^visual"


def test_each_of_a_stage_s_sets_has_a_weight():
    config = presets.get("laptop", order=("merged",))
    config.stages.merged.curriculum.weights = (2.0, 1.0, 1.0)
    (stage,) = schedule.stages(config)
    assert stage.curriculum.weights == (2.0, 1.0, 1.0)
    config.stages.merged.curriculum.weights = (2.0, 1.0)
    with pytest.raises(InputError, match=r"config\.stages\.merged\.curriculum\.weights = .* stage's 3 sets"):
        schedule.stages(config)


def test_the_paper_s_steps():
    steps = {stage.name: stage.steps for stage in schedule.stages(presets.get("qwen3_vl_8b"))}
    assert steps == {"perception": 90, "text": 375, "visual": 465} and sum(steps.values()) == 930
    (merged,) = schedule.stages(presets.get("qwen3_vl_8b", order=("merged",)))
    assert (merged.steps, merged.prompts, merged.learning_rate) == (930, 512, 1e-6)


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*.py")), ids=lambda file: file.stem)
def test_every_config_gives_stages_of_sets_that_it_has(file):
    get = runpy.run_path(str(file))["get_config"]
    presets_of = ("laptop", "qwen3_vl_8b", "qwen2_5_vl_7b_split") if inspect.signature(get).parameters else ()
    for config in [get(), *map(get, presets_of)]:
        assert [stage.name for stage in schedule.stages(config)] == list(config.order)
        assert config.is_locked


def test_the_sft_ablation_imitates_captions_with_numbers_of_its_own():
    get = runpy.run_path(str(CONFIGS / "sft_perception.py"))["get_config"]
    captions, text, visual = schedule.stages(get("qwen3_vl_8b"))
    assert (captions.objective, captions.data) == ("sft", ("captions",))
    # The defaults of LLaMA-Factory on 8 GPUs, which the release runs with nothing set.
    assert (captions.epochs, captions.steps, captions.prompts) == (3, 0, 8 * 8)
    assert (captions.learning_rate, captions.learning_rate_schedule, captions.warmup_steps) == (5e-5, "linear", 0)
    assert captions.freeze == "^visual" and not captions.curriculum.drop_last
    assert (text.objective, visual.objective) == ("grpo", "grpo")
    assert {(stage.learning_rate, stage.prompts) for stage in (text, visual)} == {(1e-6, 512)}
    config = get()
    laptop, replaced = schedule.stages(config)[0], config.stages.perception
    for key in ("learning_rate", "learning_rate_schedule", "warmup_steps", "freeze"):
        assert getattr(laptop, key) == replaced[key]
    # A step is one update there: as many of them, with as many captions in all.
    assert laptop.steps == replaced.steps * config.objective.updates_per_batch
    assert laptop.steps * laptop.prompts == replaced.steps * replaced.prompts
    for preset in ("laptop", "qwen3_vl_8b"):  # of another config of the same file
        before, changed = schedule.stages(get(preset))[0], get(preset)
        changed.stages.captions.learning_rate, changed.stages.captions.curriculum.drop_last = 1e-3, True
        assert schedule.stages(get(preset))[0] == before


MISTAKES = {
    "order": ("order", (), r"config\.order is empty.*perception"),
    "unknown stage": ("order", ("text", "vision"), r"config\.order names 'vision'.*perception, text, visual"),
    "stage twice": ("order", ("text", "visual", "text"), r"config\.order = .* a stage may come once"),
    "stage called base": ("order", ("base",), r"config\.order = .* called base or final"),
    "stage called final": ("order", ("text", "final"), r"config\.order = .* called base or final"),
    "schedule": ("stages.text.learning_rate_schedule", "square", r"stages\.text\.learning_rate_schedule.*constant"),
    "no steps": ("stages.text.steps", 0, r"config\.stages\.text\.steps = 0.*at least 1"),
    "negative steps": ("stages.text.steps", -1, r"config\.stages\.text\.steps = -1.*at least 1"),
    "both": ("stages.text.epochs", 2, r"config\.stages\.text\.steps = \d+ and epochs = 2"),
    "unknown set": ("stages.text.data", ("words",), r"config\.stages\.text\.data.*words.*perception, text, visual"),
    "no set": ("stages.text.data", (), r"config\.stages\.text\.data"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_an_error_that_names_the_key_and_the_choices(config, mistake):
    key, value, message = MISTAKES[mistake]
    config.update_from_flattened_dict({key: value})
    with pytest.raises(InputError, match=message):
        schedule.stages(config)


def test_only_stages_of_the_order_are_checked():
    config = presets.get("laptop", order=("visual",))
    config.stages.text.steps = 0
    assert [stage.name for stage in schedule.stages(config)] == ["visual"]


def _rates(updates, **changes):
    stage = schedule.Stage("s", ("s",), "grpo", updates, 1, 0.8, "constant", 0, "")
    stage = dataclasses.replace(stage, **changes)
    return [stage.learning_rate_at(step, updates) for step in range(updates)]


def test_constant_learning_rate():
    assert _rates(5) == [0.8] * 5


def test_warm_up_rises_linearly_and_is_never_zero():
    assert _rates(6, warmup_steps=4) == pytest.approx([0.2, 0.4, 0.6, 0.8, 0.8, 0.8])


def test_linear_falls_from_the_full_rate_to_one_step_before_zero():
    assert _rates(4, learning_rate_schedule="linear") == pytest.approx([0.8, 0.6, 0.4, 0.2])
    assert _rates(4, learning_rate_schedule="linear", warmup_steps=2) == pytest.approx([0.4, 0.6, 0.4, 0.2])


def test_cosine_falls_from_the_full_rate_towards_zero():
    # 0.8 x (1 + cos(pi x step / 4)) / 2
    assert _rates(4, learning_rate_schedule="cosine") == pytest.approx([0.8, 0.6828427, 0.4, 0.1171573])
    rates = _rates(200, learning_rate_schedule="cosine")
    assert rates == sorted(rates, reverse=True) and 0 < rates[-1] < 1e-3


def test_warm_up_and_cosine_multiply():
    assert _rates(4, learning_rate_schedule="cosine", warmup_steps=2) == pytest.approx([0.4, 0.6828427, 0.4, 0.1171573])


def test_configs_are_read_without_jax():
    """A mistyped flag should not wait for it."""
    code = "import sys; from capcur_jax import main, presets; presets.get('laptop'); sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, cwd=CONFIGS.parent).returncode == 0
