"""Table 7, difficulty only, without what the base always answers right (pass rate 1).

    python -m capcur_jax.main --config=configs/difficulty_filtered.py --config.data.sets.perception.train=FILE ...

Every training row needs a pass rate, as in configs/difficulty.py.
"""

from capcur_jax import presets


def get_config(preset: str = "laptop"):
    config = presets.get(preset, order=("merged",))
    config.stages.merged.curriculum.update({"order": "easy_to_hard", "drop_all_right": True})
    return config
