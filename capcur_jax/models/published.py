"""The config.json of every published dense Qwen2.5-VL and Qwen3-VL: a plan needs no checkpoint.

Keys as the Instruct models were published with transformers 4.41 (Qwen2.5-VL) and 4.57 (Qwen3-VL); each size's
parameters, counted from it, equal its published total (tests/models/test_config.py).
"""

from __future__ import annotations

import copy
from typing import Any

from capcur_jax.errors import InputError

_QWEN2_5_VL = {
    "architectures": ["Qwen2_5_VLForConditionalGeneration"], "attention_dropout": 0.0, "bos_token_id": 151643,
    "eos_token_id": 151645, "vision_start_token_id": 151652, "vision_end_token_id": 151653, "vision_token_id": 151654,
    "image_token_id": 151655, "video_token_id": 151656, "hidden_act": "silu",
    "initializer_range": 0.02, "max_position_embeddings": 128000,
    "model_type": "qwen2_5_vl",
    "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "sliding_window": 32768,
    "torch_dtype": "bfloat16", "transformers_version": "4.41.2", "use_cache": True, "use_sliding_window": False,
    "vision_config": {
        "depth": 32, "hidden_act": "silu", "hidden_size": 1280, "num_heads": 16,
        "in_chans": 3, "patch_size": 14, "spatial_merge_size": 2, "spatial_patch_size": 14,
        "window_size": 112, "fullatt_block_indexes": [7, 15, 23, 31], "tokens_per_second": 2, "temporal_patch_size": 2,
    },
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
}  # fmt: skip
_QWEN3_VL = {
    "architectures": ["Qwen3VLForConditionalGeneration"],
    "image_token_id": 151655,
    "model_type": "qwen3_vl",
    "text_config": {
        "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 151643, "dtype": "bfloat16",
        "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu", "initializer_range": 0.02,
        "max_position_embeddings": 262144, "model_type": "qwen3_vl_text", "num_key_value_heads": 8,
        "rms_norm_eps": 1e-06,
        "rope_scaling": {"mrope_interleaved": True, "mrope_section": [24, 20, 20], "rope_type": "default"},
        "rope_theta": 5000000, "use_cache": True, "vocab_size": 151936,
    },
    "transformers_version": "4.57.0.dev0",
    "video_token_id": 151656,
    "vision_config": {
        "hidden_act": "gelu_pytorch_tanh", "in_channels": 3, "initializer_range": 0.02, "model_type": "qwen3_vl",
        "num_heads": 16, "num_position_embeddings": 2304, "patch_size": 16, "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    },
    "vision_end_token_id": 151653,
    "vision_start_token_id": 151652,
}  # fmt: skip
# D, L, N, K, F, V, tied, F of the vision tower
_QWEN2_5_VL_SIZES = {
    "3b": (2048, 36, 16, 2, 11008, 151936, True, 3420),
    "7b": (3584, 28, 28, 4, 18944, 152064, False, 3420),
    "32b": (5120, 64, 40, 8, 27648, 152064, False, 3456),
    "72b": (8192, 80, 64, 8, 29568, 152064, False, 3456),
}
# D, L, N, F, tied, the vision tower's depth, D and F, DeepStack's blocks
_QWEN3_VL_SIZES = {
    "2b": (2048, 28, 16, 6144, True, (24, 1024, 4096), (5, 11, 17)),
    "4b": (2560, 36, 32, 9728, True, (24, 1024, 4096), (5, 11, 17)),
    "8b": (4096, 36, 32, 12288, False, (27, 1152, 4304), (8, 16, 24)),
    "32b": (5120, 64, 64, 25600, False, (27, 1152, 4304), (8, 16, 24)),
}
NAMES = (*(f"qwen2_5_vl_{size}" for size in _QWEN2_5_VL_SIZES), *(f"qwen3_vl_{size}" for size in _QWEN3_VL_SIZES))


def config(name: str) -> dict[str, Any]:
    """A fresh copy of the config.json, e.g. of "qwen3_vl_8b". Raises InputError for an unknown name."""
    if name not in NAMES:
        raise InputError(f"unknown architecture '{name}'; published are {', '.join(NAMES)}")
    family, _, size = name.rpartition("_")
    if family == "qwen3_vl":
        result = copy.deepcopy(_QWEN3_VL)
        width, depth, heads, wide, tied, (vision_depth, vision_width, vision_wide), deepstack = _QWEN3_VL_SIZES[size]
        text = result["text_config"]
        result["vision_config"].update(
            depth=vision_depth, hidden_size=vision_width, deepstack_visual_indexes=list(deepstack)
        )
    else:
        result = copy.deepcopy(_QWEN2_5_VL)
        width, depth, heads, kv_heads, wide, vocabulary, tied, vision_wide = _QWEN2_5_VL_SIZES[size]
        text = result
        text.update(num_key_value_heads=kv_heads, vocab_size=vocabulary, max_window_layers=depth)
    text.update(hidden_size=width, num_hidden_layers=depth, num_attention_heads=heads, intermediate_size=wide)
    result["vision_config"].update(intermediate_size=vision_wide, out_hidden_size=width)
    result["tie_word_embeddings"] = tied
    return result
