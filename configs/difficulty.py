"""Table 7, difficulty only: one pool of all three sets from easy to hard, one reference, one optimizer, the vision
encoder frozen.

    python -m capcur_jax.main --config=configs/difficulty.py --config.data.sets.perception.train=FILE ...

Every training row needs a pass rate: python -m capcur_jax.data difficulty (docs/data.md has the commands), or let
python -m capcur_jax.ablations --rows=difficulty make them.
"""

from capcur_jax import presets


def get_config(preset: str = "laptop"):
    config = presets.get(preset, order=("merged",))
    config.stages.merged.curriculum.order = "easy_to_hard"
    return config
