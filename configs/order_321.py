"""Table 5, order 3-2-1: visual reasoning first, perception last.

python -m capcur_jax.main --config=configs/order_321.py
"""

from capcur_jax import presets


def get_config(preset: str = "laptop"):
    return presets.get(preset, order=("visual", "text", "perception"))
