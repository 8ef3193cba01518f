"""Stages 1-2-3 that switch by a rule instead of a count: perception and text end when most of what they sample is
right, and the stages after them get the steps that are left, so that the run is as long as the staged one. A row of our
own, not of the paper.

    python -m capcur_jax.main --config=configs/adaptive.py
    python -m capcur_jax.main --config=configs/adaptive.py --config.stages.text.switch.rule=plateau \\
        --config.validation.every=20
"""

from capcur_jax import presets


def get_config(preset: str = "laptop"):
    config = presets.get(preset, order=("perception", "text", "visual"))
    for name in config.order[:-1]:
        config.stages[name].switch.rule = "mastered"
    return config
