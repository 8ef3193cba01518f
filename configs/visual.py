"""Stage 3 alone: visual reasoning.

python -m capcur_jax.main --config=configs/visual.py
"""

from capcur_jax import presets


def get_config(preset: str = "laptop"):
    return presets.get(preset, order=("visual",))
