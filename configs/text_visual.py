"""Reasoning only, 2-3 (Figure 3): textual, then visual reasoning; perception is left out.

python -m capcur_jax.main --config=configs/text_visual.py
"""

from capcur_jax import presets


def get_config(preset: str = "laptop"):
    return presets.get(preset, order=("text", "visual"))
