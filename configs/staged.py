"""The paper's method: visual perception, then textual reasoning, then visual reasoning, each a GRPO run of its own.

python -m capcur_jax.main --config=configs/staged.py                 # laptop, two CPU cores
python -m capcur_jax.main --config=configs/staged.py:qwen3_vl_8b     # the paper's run

What the laptop run takes and what it gains: the README, and docs/figures.md with the conditions.
"""

from capcur_jax import presets


def get_config(preset: str = "laptop"):
    return presets.get(preset, order=("perception", "text", "visual"))
