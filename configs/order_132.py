"""Table 5, order 1-3-2: visual reasoning before textual reasoning.

python -m capcur_jax.main --config=configs/order_132.py
"""

from capcur_jax import presets


def get_config(preset: str = "laptop"):
    return presets.get(preset, order=("perception", "visual", "text"))
