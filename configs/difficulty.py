"""Table 7, difficulty only: one pool of all three sets from easy to hard, one reference, one optimizer, the vision
encoder frozen.

    python -m capcur_jax.main --config=configs/difficulty.py --config.data.sets.perception.train=FILE ...

Every training row needs a pass rate: python -m capcur_jax.data difficulty (docs/data.md has the commands).
--config.stages.merged.curriculum.drop_all_right=True leaves out what the base always answers right.
"""

from capcur_jax import presets


def get_config(preset: str = "laptop"):
    config = presets.get(preset, order=("merged",))
    for name in config.order:
        config.stages[name].curriculum.order = "easy_to_hard"
    return config
