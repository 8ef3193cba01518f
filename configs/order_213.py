"""Table 5, order 2-1-3: textual reasoning before visual perception.

python -m capcur_jax.main --config=configs/order_213.py
"""

from capcur_jax import presets


def get_config(preset: str = "laptop"):
    return presets.get(preset, order=("text", "perception", "visual"))
