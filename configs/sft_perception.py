"""Table 6: perception by imitation. The first stage learns to describe images (caption SFT) instead of being rewarded
for answers; textual and visual reasoning follow as in the paper's method.

    python -m capcur_jax.main --config=configs/sft_perception.py
    python -m capcur_jax.main --config=configs/sft_perception.py:qwen3_vl_8b \\
        --config.data.sets.captions.train=captions/train.jsonl ...

The captions are rows whose `response` is the caption (python -m capcur_jax.data build docci); the laptop's are of the
same images as its questions. The stage has the steps and the learning rate of the perception
stage that it replaces.
"""

from capcur_jax import presets


def get_config(preset: str = "laptop"):
    config = presets.get(preset, order=("captions", "text", "visual"))
    with config.unlocked():
        source = {"source": "tiny_base" if preset == "laptop" else "", "train": "", "validation": "", "test": ""}
        config.data.sets.captions = source
        config.stages.captions = config.stages.perception.copy_and_resolve_references()
        config.stages.captions.update({"data": ("captions",), "objective": "sft"})
    return config
