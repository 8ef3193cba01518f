"""The merged pool in the order of the capabilities: perception, text, visual reasoning in each epoch, under one
reference and one optimizer, the vision encoder frozen. The release's single-file script of "capability only" does this.

    python -m capcur_jax.main --config=configs/merged_in_order.py
"""

from capcur_jax import presets


def get_config(preset: str = "laptop"):
    config = presets.get(preset, order=("merged",))
    config.stages.merged.curriculum.by_set = True
    return config
