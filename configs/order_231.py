"""Table 5, order 2-3-1: perception last, after textual and visual reasoning.

python -m capcur_jax.main --config=configs/order_231.py
"""

from capcur_jax import presets


def get_config(preset: str = "laptop"):
    return presets.get(preset, order=("text", "visual", "perception"))
