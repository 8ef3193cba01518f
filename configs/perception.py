"""Stage 1 alone: visual perception.

python -m capcur_jax.main --config=configs/perception.py
"""

from capcur_jax import presets


def get_config(preset: str = "laptop"):
    return presets.get(preset, order=("perception",))
