"""A model of the smallest decoder and tower whose processor cuts images as a published Qwen3-VL does."""

ARCHITECTURE = {
    "vocabulary": 300, "tied": True, "min_pixels": 65_536, "max_pixels": 4_194_304,
    "text": {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 32768, "rope_theta": 5e6,
        "rope_scaling": {"rope_type": "default", "mrope_section": [4, 2, 2], "mrope_interleaved": True},
    },
    "vision": {
        "depth": 1, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "patch_size": 16,
        "spatial_merge_size": 2, "temporal_patch_size": 2, "num_position_embeddings": 2304,
        "deepstack_visual_indexes": [],
    },
}  # fmt: skip
