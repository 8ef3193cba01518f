"""Every number of a config has bounds, and is held to them before a run starts."""

import math

import pytest

from capcur_jax import bounds, checks, presets, schedule
from capcur_jax.data.sets import Sets
from capcur_jax.errors import InputError


def test_every_number_of_every_preset_has_bounds_and_keeps_them():
    for name in presets.PRESETS:
        config = presets.get(name)
        assert not {key for key, _ in bounds.numbers(config)} - set_of(config), name
        bounds.check(config)


def set_of(config):
    return {key for key, _ in bounds.numbers(config) if bounds.general(key) in bounds.BOUNDS}


def test_no_bounds_are_of_a_key_that_is_not_there():
    keys = presets.get("laptop")
    for key in bounds.BOUNDS:
        section = keys
        for part in key.replace("*", "text").split("."):
            assert part in section, key
            section = section[part]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("stages.text.learning_rate", math.nan), ("stages.text.learning_rate", -1e-4),
        ("stages.text.learning_rate", 0.0), ("stages.text.learning_rate", math.inf), ("stages.text.warmup_steps", -1),
        ("optimizer.beta1", 1.5), ("optimizer.beta2", 1.0), ("optimizer.epsilon", 0.0),
        ("optimizer.max_gradient_norm", -1.0), ("optimizer.weight_decay", -0.1), ("objective.clip_low", math.nan),
        ("objective.clip_high", -0.1), ("objective.clip_dual", 1.0), ("objective.kl_coefficient", math.inf),
        ("objective.sampler_cap", 0.5), ("rollout.top_p", 0.0), ("rollout.top_p", 1.1), ("rollout.temperature", -1.0),
        ("rollout.max_new_tokens", 0), ("reward.format_weight", math.nan), ("reward.timeout_s", 0.0), ("seed", -1),
        ("model.lora.alpha", 0.0), ("mesh.tensor", 0), ("prompt.patch_buckets", ((0, 64),)),
        ("prompt.token_buckets", (0, 96)), ("packing.shapes", ((16, 4, -1),)), ("rollout.sglang.port", 65536),
    ],
)  # fmt: skip
def test_a_number_out_of_bounds_ends_a_run_before_its_start(tmp_path, key, value):
    config = presets.get("laptop")
    config.update_from_flattened_dict({key: value})
    with pytest.raises(InputError, match=rf"^config\.{key} = \S+: it must lie in [\[(0-9-]"):
        checks.check(config, schedule.stages(config), Sets(config.data, tmp_path))


def test_all_of_them_are_named_at_once():
    config = presets.get("laptop")
    config.optimizer.beta1, config.stages.text.prompts = 1.5, 0
    with pytest.raises(InputError) as caught:
        bounds.check(config)
    assert str(caught.value).splitlines() == [
        "config.optimizer.beta1 = 1.5: it must lie in [0, 1)",
        "config.stages.text.prompts = 0: it must lie in [1, inf)",
    ]


@pytest.mark.parametrize(
    ("interval", "inside", "outside"),
    [
        ("[0, 1)", (0, 0.5), (-1e-9, 1, math.nan)), ("(0, inf)", (1e-300, 1e300), (0, math.inf, -1)),
        ("0 or (1, inf)", (0, 1.5), (1, 0.5, -1)), ("-1 or [1, inf)", (-1, 1), (0, -2)),
    ],
)  # fmt: skip
def test_intervals(interval, inside, outside):
    assert all(bounds.inside(value, interval) for value in inside)
    assert not any(bounds.inside(value, interval) for value in outside)
