"""Settings that can't work are refused before anything starts."""

import pytest

from capcur_jax import checks, presets
from capcur_jax.errors import InputError


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rollout.async_steps": 2}, "async_steps = 2; choose 0"),
        ({"rollout.async_steps": 1}, "needs config.rollout.engine = 'sglang'"),
        ({"rollout.engine": "sglang"}, "config.rollout.sglang.python"),
        ({"rollout.engine": "sglang", "rollout.sglang.python": "p"}, "the trainer would take GPUs"),
        (
            {
                "rollout.engine": "sglang", "rollout.sglang.python": "p", "mesh.gpus": (0, 1),
                "rollout.sglang.gpus": (1,),
            },
            "servers have .1, config",
        ),
        (
            {
                "rollout.engine": "sglang", "rollout.sglang.python": "p", "rollout.sglang.device": "cpu",
                "rollout.async_steps": 1,
            },
            "sampler_correction",
        ),
        (
            {
                "rollout.engine": "sglang", "rollout.sglang.python": "p", "rollout.async_steps": 1,
                "objective.sampler_correction": "truncate", "rollout.sglang.colocate": True,
            },
            "take turns; choose one",
        ),
    ],
)  # fmt: skip
def test_settings_that_do_not_go_together_are_refused(changes, message):
    config = presets.laptop()
    config.update_from_flattened_dict(changes)
    with pytest.raises(InputError, match=message):
        checks._check_numbers(config, [])


def test_the_presets_of_a_host_with_eight_gpus_differ_in_who_has_which():
    for name in ("qwen3_vl_8b", "qwen2_5_vl_7b"):
        split, turns = presets.get(f"{name}_split"), presets.get(f"{name}_turns")
        for config in (split, turns):
            with config.unlocked():
                config.rollout.sglang.python = "python"
            checks._check_numbers(config, [])
        assert not set(split.mesh.gpus) & set(split.rollout.sglang.gpus) and len(split.mesh.gpus) == 4
        assert turns.mesh.gpus == () and turns.rollout.sglang.servers == 8 and turns.rollout.sglang.colocate
