"""Merged training with the vision encoder trained, as the staged run trains it. The paper froze it in the merged run
alone, so its comparison changes two things at once.

    python -m capcur_jax.main --config=configs/merged_trained.py
"""

from capcur_jax import presets


def get_config(preset: str = "laptop"):
    config = presets.get(preset, order=("merged",))
    config.stages.merged.freeze = ""
    return config
