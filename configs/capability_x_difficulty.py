"""Table 7, capability x difficulty: perception, then text, then visual reasoning, each stage from easy to hard.

    python -m capcur_jax.main --config=configs/capability_x_difficulty.py --config.data.sets.perception.train=FILE ...

Every training row needs a pass rate, as in configs/difficulty.py. The paper's release runs this as one stage:
configs/capability_x_difficulty_one_run.py.
"""

from capcur_jax import presets


def get_config(preset: str = "laptop"):
    config = presets.get(preset, order=("perception", "text", "visual"))
    for name in config.order:
        config.stages[name].curriculum.order = "easy_to_hard"
    return config
