"""Shared fixtures: small random checkpoints in the Hugging Face format, every parameter perturbed.

Before all: the environment of every test and of the processes that tests start (tests/environment.py), and which tests
share a worker of pytest-xdist.
"""

# ruff: noqa: E402 (the environment comes before jax and torch)

from __future__ import annotations

import functools
import gc
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from tests import environment

environment.prepare()

import numpy as np
import pytest
from flax import nnx
from hypothesis import configuration, settings
from PIL import Image

from capcur_jax.models import config as config_lib
from capcur_jax.models import fresh, huggingface
from capcur_jax.models.inputs import Processor, Prompt
from capcur_jax.models.qwen_vl import QwenVL
from capcur_jax.models.vision import pixel_values

# The same examples in every run, none kept; what Hypothesis knows of our constants lies outside the tree.
settings.register_profile("capcur_jax", derandomize=True, deadline=None, max_examples=100, database=None)
settings.load_profile("capcur_jax")
configuration.set_hypothesis_home_dir(Path(tempfile.gettempdir()) / f"capcur_jax-hypothesis-{os.getuid()}")

# Servers and whole runs first, the longest ahead: a worker that gets one last makes the other wait for it. What comes
# between these files and the rest is marked e2e.
LONGEST = (
    "rollout/sglang",
    "test_processes",
    "test_ablations",
    "test_resume",
    "test_sharding",
    "test_slurm",
    "test_main",
    "test_plan",
    "test_notebooks",
)
TEXTS = [
    "What shape is in the image?",
    "The shape is a red circle. 3 x 4 = 12.",
    "user\nassistant\nsystem\n",
    "boxed{}",
]
# What writes to the vision tower's residual stream.
STREAM = ("visual.patch", "visual.table", "visual.blocks.attention.out", "visual.blocks.down")


def architecture(
    tied: bool = True,
    depth: int = 3,
    deepstack: tuple[int, ...] = (0, 1),
    kv_heads: int = 2,
    sections: tuple[int, int, int] = (4, 2, 2),
    merge: int = 2,
    vision_heads: int = 2,
    **text,
) -> dict:
    """A Qwen3-VL small enough for float32 parity in a second; `text` overrides keys of the text_config."""
    rope = {"rope_type": "default", "mrope_section": list(sections), "mrope_interleaved": True}
    return {
        "vocabulary": 320,
        "tied": tied,
        "min_pixels": 256,
        "max_pixels": 16384,
        "text": {
            "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": depth, "num_attention_heads": 4,
            "num_key_value_heads": kv_heads, "head_dim": 16, "max_position_embeddings": 512, "rope_theta": 10000.0,
            "rope_scaling": rope, **text,
        },
        "vision": {
            "depth": 3, "hidden_size": 24, "intermediate_size": 40, "num_heads": vision_heads, "patch_size": 4,
            "spatial_merge_size": merge, "temporal_patch_size": 2, "num_position_embeddings": 49,
            "deepstack_visual_indexes": list(deepstack),
        },
    }  # fmt: skip


def windowed_architecture(
    tied: bool = True,
    depth: int = 2,
    kv_heads: int = 2,
    sections: tuple[int, int, int] = (2, 3, 3),
    window: int = 16,
    full: tuple[int, ...] = (1,),
    merge: int = 2,
    vision_heads: int = 2,
    **text,
) -> dict:
    """A Qwen2.5-VL of that size; `window` is in pixels, a merged feature is 8 of them wide."""
    return {
        "family": "qwen2_5_vl",
        "vocabulary": 320,
        "tied": tied,
        "min_pixels": 256,
        "max_pixels": 16384,
        "text": {
            "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": depth, "num_attention_heads": 2,
            "num_key_value_heads": kv_heads, "max_position_embeddings": 512, "rope_theta": 10000.0,
            "rope_scaling": {"type": "mrope", "mrope_section": list(sections)}, **text,
        },
        "vision": {
            "depth": 3, "hidden_size": 24, "intermediate_size": 40, "num_heads": vision_heads, "patch_size": 4,
            "spatial_merge_size": merge, "temporal_patch_size": 2, "window_size": window,
            "fullatt_block_indexes": list(full), "tokens_per_second": 2,
        },
    }  # fmt: skip


def random_checkpoint(directory, seed: int = 0, stream: float = 1.0, make=architecture, **kinds):
    """A checkpoint directory with weights in float32; no parameter is left a constant 0 or 1.

    `stream` scales all that is added to the vision tower's residual stream: a quiet one shows its norms' epsilon.
    """
    source = fresh.write_skeleton(directory.with_name(directory.name + "-skeleton"), TEXTS * 5, make(**kinds))
    config = config_lib.from_directory(source)
    # Drawn by numpy: compiling the initialisers would take longer than all that is tested with them.
    abstract = nnx.state(nnx.eval_shape(lambda: QwenVL(config, rngs=nnx.Rngs(0))))
    random = np.random.default_rng(seed + 1)

    def draw(path, leaf):
        noise = random.standard_normal(leaf.shape).astype(np.float32)
        if ".".join(path[:-1]) in STREAM:
            noise *= stream
        return leaf.replace({"scale": 1 + 0.1 * noise, "kernel": 0.2 * noise}.get(path[-1], 0.1 * noise))

    drawn = nnx.from_flat_state([(path, draw(path, leaf)) for path, leaf in nnx.to_flat_state(abstract)])
    huggingface.save(directory, drawn, config, source, dtype=np.float32)
    return directory


def random_image(width: int, height: int, seed: int = 0) -> Image.Image:
    """Smooth noise: resizing keeps it an image, not gray."""
    random = np.random.default_rng(seed)
    coarse = random.integers(0, 255, (5, 5, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def pytest_configure(config):
    if not hasattr(config, "workerinput"):  # the one process that starts the workers
        environment.tidy()


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    """The modules and tests that are collected stay to the end: the garbage collector need not look at them."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


@pytest.hookimpl(tryfirst=True)  # xdist reads the groups in its own hook
def pytest_collection_modifyitems(items):
    """One group a file, so that its fixtures are made once; an item may have a group that it shares with others."""
    for item in items:
        if not item.get_closest_marker("xdist_group"):
            item.add_marker(pytest.mark.xdist_group(item.nodeid.partition("::")[0].removesuffix(".py")))

    def group(item):
        return item.get_closest_marker("xdist_group").args[0]

    whole = {group(item) for item in items if item.get_closest_marker("e2e")}

    def place(item):
        others = len(LONGEST) + (group(item) not in whole)
        return next((i for i, name in enumerate(LONGEST) if name in item.nodeid.partition("::")[0]), others)

    items.sort(key=place)


@pytest.fixture(scope="session")
def sets(tmp_path_factory):
    """Settings that name a few problems of each capability, for whole runs."""
    from tests import tiny  # here: it imports this module

    return tiny.write_sets(tmp_path_factory.mktemp("sets"))


@pytest.fixture(scope="session")
def sglang_python():
    """The server environment's Python; installed when absent (some minutes, 2.6 GB)."""
    script = Path(__file__).parents[1] / "launch" / "sglang_cpu.py"
    done = subprocess.run([sys.executable, script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.split()[-1]


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """Tied embeddings, two DeepStack layers."""
    return random_checkpoint(tmp_path_factory.mktemp("checkpoints") / "tied")


@pytest.fixture(scope="session")
def tied_checkpoint(checkpoint):
    return checkpoint


@pytest.fixture(scope="session")
def untied_checkpoint(tmp_path_factory):
    """A head of its own, one DeepStack layer, one kv head, and other numbers where a default could hide."""
    path = tmp_path_factory.mktemp("checkpoints") / "untied"
    kinds = dict(tied=False, depth=2, deepstack=(1,), kv_heads=1, sections=(2, 3, 3))
    return random_checkpoint(path, seed=5, stream=0.02, rope_theta=70000.0, rms_norm_eps=1e-2, **kinds)


@pytest.fixture(scope="session")
def windowed_checkpoint(tmp_path_factory):
    """Qwen2.5-VL: windows of 2 x 2 merged features, the middle block sees whole images."""
    return random_checkpoint(tmp_path_factory.mktemp("checkpoints") / "windowed", seed=7, make=windowed_architecture)


@pytest.fixture(scope="session")
def windowed_untied_checkpoint(tmp_path_factory):
    """Qwen2.5-VL with a head of its own, larger windows, two full blocks, other numbers where a default could hide."""
    path = tmp_path_factory.mktemp("checkpoints") / "windowed_untied"
    kinds = dict(tied=False, depth=3, kv_heads=1, sections=(4, 2, 2), window=24, full=(0, 2), rope_theta=70000.0)
    return random_checkpoint(path, seed=9, stream=0.02, make=windowed_architecture, rms_norm_eps=1e-2, **kinds)


@pytest.fixture(scope="session")
def nine_checkpoint(tmp_path_factory):
    """Qwen3-VL: nine patches to a feature, no DeepStack, as many kv heads as heads, one layer."""
    kinds = dict(merge=3, vision_heads=3, deepstack=(), kv_heads=4, depth=1)
    return random_checkpoint(tmp_path_factory.mktemp("checkpoints") / "nine", seed=11, **kinds)


@pytest.fixture(scope="session")
def windowed_nine_checkpoint(tmp_path_factory):
    """Qwen2.5-VL: nine patches to a feature, windows of 2 x 2 of them in every block, one layer."""
    kinds = dict(merge=3, vision_heads=3, window=24, full=(), depth=1, tied=False)
    path = tmp_path_factory.mktemp("checkpoints") / "windowed_nine"
    return random_checkpoint(path, seed=13, make=windowed_architecture, **kinds)


@pytest.fixture(scope="session")
def windowed_untied_model(windowed_untied_checkpoint):
    return huggingface.load(windowed_untied_checkpoint)


# Of a module, not the session: a module may have a `checkpoint` of its own.
@pytest.fixture(scope="module")
def model(checkpoint):
    return huggingface.load(checkpoint)


@pytest.fixture(scope="module")
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
    from transformers import AutoModelForImageTextToText

    torch.set_num_threads(1)

    @functools.cache
    def load(directory, dtype: str = "float32"):
        kinds = dict(dtype=getattr(torch, dtype), attn_implementation="eager")
        return AutoModelForImageTextToText.from_pretrained(str(directory), **kinds).eval()

    return load


@pytest.fixture(scope="session")
def transformers_inputs():
    """`transformers_inputs(prompts, processor, side="right")`: our prompts as the keyword arguments of its forward."""
    import torch

    def make(prompts: list[Prompt], processor: Processor, side: str = "right") -> dict:
        tokens = np.full((len(prompts), max(map(len, prompts))), processor.pad_token)
        mask = np.zeros_like(tokens)
        for row, prompt in enumerate(prompts):
            here = slice(len(prompt)) if side == "right" else slice(-len(prompt), None)
            tokens[row, here], mask[row, here] = prompt.tokens, 1
        inputs = {"input_ids": tokens, "attention_mask": mask}
        grids = [grid for prompt in prompts for grid in prompt.grids]
        if grids:
            inputs["mm_token_type_ids"] = (tokens == processor.config.image_token).astype(np.int64)
            patches = np.concatenate([prompt.patches for prompt in prompts])
            inputs["pixel_values"] = np.array(pixel_values(patches, processor.config.vision))
            inputs["image_grid_thw"] = np.array(grids)
        return {name: torch.from_numpy(value) for name, value in inputs.items()}

    return make
