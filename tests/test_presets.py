"""What is said of a config that can't be read."""

import pytest

from capcur_jax import presets

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


def test_a_mistake_inside_a_config_file_keeps_its_own_line():
    with pytest.raises(KeyError) as caught:
        _ = {}["a"]
    with pytest.raises(KeyError) as again:
        presets.explained(caught.value)
    assert again.value is caught.value
