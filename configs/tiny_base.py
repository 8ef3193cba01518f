"""The small base checkpoint of the laptop run: SFT from random weights on captions and sums, then briefly on questions
about images. It answers about half of the questions: it has not been shown enough of them to do better.

    python -m capcur_jax.main --config=configs/tiny_base.py --workdir=runs/tiny_base
    cp runs/tiny_base/checkpoints/final/* capcur_jax/assets/tiny_qwen3_vl/

600 updates on captions and sums, then 150 on everything: about 7 minutes on two CPU cores.
"""

from capcur_jax import presets


def get_config():
    config = presets.get("laptop")
    with config.unlocked():
        config.checkpoint = ""
        config.export.dtype = "bfloat16"
        config.create = {
            "vocabulary": 640,
            "tied": True,
            "min_pixels": 4096,
            "max_pixels": 4096,
            "text": {
                "hidden_size": 128,
                "intermediate_size": 352,
                "num_hidden_layers": 4,
                "num_attention_heads": 4,
                "num_key_value_heads": 1,
                "head_dim": 32,
                "max_position_embeddings": 4096,
                "rope_theta": 10000.0,
                "rope_scaling": {"rope_type": "default", "mrope_section": [8, 4, 4], "mrope_interleaved": True},
            },
            "vision": {
                "depth": 3,
                "hidden_size": 96,
                "intermediate_size": 256,
                "num_heads": 4,
                "patch_size": 8,
                "spatial_merge_size": 2,
                "temporal_patch_size": 2,
                "num_position_embeddings": 64,
                "deepstack_visual_indexes": [0, 1],
            },
        }
        files = presets.problem_set("tiny_base")
        config.data.sets.update({"captions": files, "sums": files, "base": files})
        sft = {"objective": "sft", "warmup_steps": 50}
        config.stages = {  # eyes and sums first: questions alone teach them slowly
            "first": presets.stage(("captions", "sums"), 600, 64, 1.5e-3) | sft,
            "answers": presets.stage(("base",), 150, 64, 1e-3) | sft,
        }
        config.order = ("first", "answers")
        config.packing.update({"shapes": tuple((tokens, 16, 64) for tokens in (768, 896, 1024)), "groups": 16})
    return config
