"""Table 7, capability x difficulty as the paper's release runs it: one stage with one reference and one optimizer, the
vision encoder frozen; in each epoch perception, text, visual reasoning, each from easy to hard.

    python -m capcur_jax.main --config=configs/capability_x_difficulty_one_run.py \\
        --config.data.sets.perception.train=FILE ...

Every training row needs a pass rate, as in configs/difficulty.py.
"""

from capcur_jax import presets


def get_config(preset: str = "laptop"):
    config = presets.get(preset, order=("merged",))
    config.stages.merged.curriculum.update({"order": "easy_to_hard", "by_set": True})
    return config
