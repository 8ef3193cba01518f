"""Stages 1-3: perception, then visual reasoning; textual reasoning is left out.

python -m capcur_jax.main --config=configs/perception_visual.py
"""

from capcur_jax import presets


def get_config(preset: str = "laptop"):
    return presets.get(preset, order=("perception", "visual"))
