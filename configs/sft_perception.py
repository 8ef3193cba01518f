"""Table 6: perception by imitation. The first stage learns to describe images (caption SFT) instead of being rewarded
for answers; textual and visual reasoning follow as in the paper's method.

    python -m capcur_jax.main --config=configs/sft_perception.py
    python -m capcur_jax.main --config=configs/sft_perception.py:qwen3_vl_8b \\
        --config.data.sets.captions.train=captions/train.jsonl ...

The captions are rows whose `response` is the caption (python -m capcur_jax.data build docci); the laptop's are of the
same images as its questions.
"""

from capcur_jax import presets

# Neither paper nor release gives a number of this stage. The release has one command for it: LLaMA-Factory, full SFT,
# nothing else set. So these are that engine's defaults; but for `freeze` they are those of transformers'
# TrainingArguments. Optimizer and limits of the prompt are those of the other stages.
PAPER = presets.stage(
    ("captions",),
    steps=0,
    prompts=64,  # per_device_train_batch_size 8, on 8 GPUs; their number is a guess: that of the other stages
    learning_rate=5e-5,
    freeze="^visual",  # LLaMA-Factory's freeze_vision_tower and freeze_multi_modal_projector
) | {"objective": "sft", "epochs": 3, "learning_rate_schedule": "linear"}


def get_config(preset: str = "laptop"):
    config = presets.get(preset, order=("captions", "text", "visual"))
    laptop = preset.startswith("laptop")
    with config.unlocked():
        config.data.sets.captions = presets.problem_set("tiny_base" if laptop else "")
        config.stages.captions = _like(config.stages.perception, config) if laptop else PAPER
    return config


def _like(replaced, config) -> dict:
    """A guess: as many captions, in as many updates, at the rate of the stage that this one replaces. A step of an
    imitation is one update."""
    updates, entry = config.objective.updates_per_batch, replaced.to_dict()
    numbers = {"steps": entry["steps"] * updates, "prompts": entry["prompts"] // updates}
    return entry | {"data": ("captions",), "objective": "sft"} | numbers
