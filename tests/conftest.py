"""Shared fixtures: small random checkpoints in the Hugging Face format, every parameter perturbed."""

from __future__ import annotations

import functools
import os

# Before torch loads its OpenMP: idle threads that spin take the cores from JAX.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import jax
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from capcur_jax.models import config as config_lib
from capcur_jax.models import fresh, huggingface
from capcur_jax.models.inputs import Processor

TEXTS = ["What shape is in the image?", "The shape is a red circle. 3 x 4 = 12.", "user\nassistant\nsystem\n", "boxed{}"]


def architecture(tied: bool = True, depth: int = 3, deepstack: tuple[int, ...] = (0, 1), kv_heads: int = 2) -> dict:
    """A Qwen3-VL small enough for float32 parity in a second."""
    rope = {"rope_type": "default", "mrope_section": [4, 2, 2], "mrope_interleaved": True}
    return {
        "vocabulary": 320,
        "tied": tied,
        "min_pixels": 256,
        "max_pixels": 16384,
        "text": {
            "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": depth, "num_attention_heads": 4,
            "num_key_value_heads": kv_heads, "head_dim": 16, "max_position_embeddings": 512, "rope_theta": 10000.0,
            "rope_scaling": rope,
        },
        "vision": {
            "depth": 3, "hidden_size": 24, "intermediate_size": 40, "num_heads": 2, "patch_size": 4,
            "spatial_merge_size": 2, "temporal_patch_size": 2, "num_position_embeddings": 49,
            "deepstack_visual_indexes": list(deepstack),
        },
    }  # fmt: skip


def random_checkpoint(directory, seed: int = 0, **kinds):
    """A checkpoint directory with weights in float32; no parameter is left a constant 0 or 1."""
    source = fresh.write_skeleton(directory.with_name(directory.name + "-skeleton"), TEXTS * 5, architecture(**kinds))
    config = config_lib.from_directory(source)
    parameters = nnx.state(huggingface.create(config, seed))
    random = np.random.default_rng(seed + 1)

    def perturb(value):
        return value + 0.1 * random.standard_normal(value.shape).astype(np.float32)

    huggingface.save(directory, jax.tree.map(perturb, parameters), config, source, dtype=np.float32)
    return directory


def random_image(width: int, height: int, seed: int = 0) -> Image.Image:
    """Smooth noise: resizing keeps it an image, not gray."""
    random = np.random.default_rng(seed)
    coarse = random.integers(0, 255, (5, 5, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """Tied embeddings, two DeepStack layers."""
    return random_checkpoint(tmp_path_factory.mktemp("checkpoints") / "tied")


@pytest.fixture(scope="session")
def untied_checkpoint(tmp_path_factory):
    """A head of its own, one DeepStack layer, one kv head."""
    path = tmp_path_factory.mktemp("checkpoints") / "untied"
    return random_checkpoint(path, seed=5, tied=False, depth=2, deepstack=(1,), kv_heads=1)


@pytest.fixture(scope="session")
def model(checkpoint):
    return huggingface.load(checkpoint)


@pytest.fixture(scope="session")
def processor(checkpoint):
    return Processor.from_directory(checkpoint)


@pytest.fixture(scope="session")
def untied_model(untied_checkpoint):
    return huggingface.load(untied_checkpoint)


@pytest.fixture(scope="session")
def make_image():
    return random_image


@pytest.fixture(scope="session")
def transformers_model():
    """`transformers_model(directory, dtype="float32")`: PyTorch's model of that very checkpoint, loaded once."""
    # Imported here: the tests of data and rewards run without PyTorch's seconds.
    import torch
    from transformers import Qwen3VLForConditionalGeneration

    torch.set_num_threads(1)

    @functools.cache
    def load(directory, dtype: str = "float32"):
        kinds = dict(dtype=getattr(torch, dtype), attn_implementation="eager")
        return Qwen3VLForConditionalGeneration.from_pretrained(str(directory), **kinds).eval()

    return load
