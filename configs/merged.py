"""Merged training, the paper's main comparison: one shuffled pool of all three sets, one reference, one optimizer,
the vision encoder frozen ("common practice"; --config.stages.merged.freeze='' trains it).

    python -m capcur_jax.main --config=configs/merged.py
"""

from capcur_jax import presets


def get_config(preset: str = "laptop"):
    return presets.get(preset, order=("merged",))
