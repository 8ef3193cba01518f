"""Table 5, order 3-1-2: visual reasoning first, then perception, then text.

python -m capcur_jax.main --config=configs/order_312.py
"""

from capcur_jax import presets


def get_config(preset: str = "laptop"):
    return presets.get(preset, order=("visual", "perception", "text"))
