"""The paper's numbers, keys that follow another, and what is said of a config that can't be read."""

import pytest

from capcur_jax import checks, presets
from capcur_jax.errors import InputError
from capcur_jax.rollout.engine import sampling_of

REFUSED = "the config has no such key, or it holds another type of value: "


def new_key(config):
    config.sed = 1


def strange_key(config):
    config.prompt.zzzz = 1


def read_key(config):
    return config.prompt.max_token


def other_type(config):
    config.seed = "a"


def deleted_key(config):
    config.rollout.sglang.router = "python"


@pytest.mark.parametrize(
    ("mistake", "said"),
    [
        (new_key, f'{REFUSED}Key "sed" does not exist and cannot be added since the config is locked; Did you mean'),
        (strange_key, f'{REFUSED}Key "zzzz" does not exist and cannot be added since the config is locked'),
        (read_key, f"{REFUSED}'max_token'; Did you mean \"max_tokens\""),
        (other_type, f"{REFUSED}Could not override field 'seed'"),
        (deleted_key, "config.rollout.sglang.router was removed: "),
    ],
)
def test_a_mistake_gets_one_short_line(mistake, said):
    with pytest.raises((AttributeError, KeyError, TypeError)) as caught:
        mistake(presets.get("laptop"))
    line = presets.explained(caught.value)
    assert line.startswith(said) and "\n" not in line and len(line) < 250


@pytest.mark.parametrize("key", presets.DELETED)
def test_a_deleted_key_is_told_what_does_its_work(key):
    *sections, name = key.split(".")
    section = presets.get("laptop")
    for part in sections:
        section = section[part]
    with pytest.raises((AttributeError, KeyError, TypeError)) as caught:
        setattr(section, name, 1)
    said, _, instead = presets.explained(caught.value).partition(": ")
    assert said == f"config.{key} was removed" and "config." in instead


def test_a_mistake_inside_a_config_file_keeps_its_own_line():
    with pytest.raises(KeyError) as caught:
        _ = {}["a"]
    with pytest.raises(KeyError) as again:
        presets.explained(caught.value)
    assert again.value is caught.value


SIZES = ("qwen3_vl_8b", "qwen2_5_vl_7b", "qwen3_vl_8b_split", "qwen2_5_vl_7b_turns")


@pytest.mark.parametrize("preset", SIZES)
def test_the_paper_evaluates_greedily_and_validates_as_the_release(preset):
    config = presets.get(preset)
    evaluation, validation = sampling_of(config, "evaluation"), sampling_of(config, "validation")
    assert (evaluation.temperature, evaluation.top_p) == (0.0, 1.0)
    assert (validation.temperature, validation.top_p) == (0.6, 0.95)


def placements(config):
    return config.prompt.instruction, config.evaluation.instruction, config.evaluation.base_instruction


def test_the_release_trains_with_a_suffix_asks_trained_models_by_a_system_turn_and_the_base_without():
    assert {placements(presets.get(name)) for name in SIZES} == {("suffix", "system", "none")}
    assert placements(presets.get("laptop")) == ("suffix", "suffix", "suffix")


def test_evaluation_asks_as_training_does_until_it_is_told_otherwise():
    config = presets.get("laptop")
    config.prompt.instruction = "none"
    assert placements(config) == ("none", "none", "none")
    config.evaluation.instruction = "system"
    assert placements(config) == ("none", "system", "system")
    config.evaluation.base_instruction = "suffix"
    config.prompt.instruction = "system"
    assert placements(config) == ("system", "system", "suffix")
    assert placements(presets.get("laptop")) == ("suffix", "suffix", "suffix")  # no other config changed
    assert config.to_dict()["evaluation"]["base_instruction"] == "suffix"


@pytest.mark.parametrize("key", ["prompt.instruction", "evaluation.instruction", "evaluation.base_instruction"])
def test_a_place_that_there_is_not_is_refused_by_its_key(key):
    config = presets.get("laptop")
    config.update_from_flattened_dict({key: "prefix"})
    with pytest.raises(InputError, match=rf"config\.{key} = 'prefix'; choose one of suffix, system, none"):
        checks._check_together(config, [])
