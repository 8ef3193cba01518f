"""Stages 1-2-3 that switch by a rule instead of a count: perception and text end when three quarters of what they
sample are right, and the stages after them get the steps that are left, so that the run is as long as the staged one.
A row of our own, not of the paper.

    python -m capcur_jax.main --config=configs/adaptive.py
    python -m capcur_jax.main --config=configs/adaptive.py --config.stages.text.switch.rule=plateau \\
        --config.validation.every=20
"""

from capcur_jax import presets


def get_config(preset: str = "laptop"):
    config = presets.get(preset, order=("perception", "text", "visual"))
    for name in config.order[:-1]:
        # On the laptop's 80 steps the text stage has that after half of them, perception never (docs/ablations.md).
        config.stages[name].switch.update({"rule": "mastered", "above": 0.75})
    return config
