"""Forward, and forward + backward, in tokens/s: this project against transformers' PyTorch model, in one run.

    OMP_WAIT_POLICY=PASSIVE python benchmarks/model_speed.py [--rounds=5] [--prompts=8] [--tokens=256] [--image=224]

Both sides load the same checkpoint (written here, random weights, both families), get the same batch of prompts with
an image each, compute in float32 on the same threads, and take turns. Loss: mean cross-entropy of the next token;
gradients of every parameter. PyTorch runs with its default attention (sdpa).
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: idle threads that spin take the cores from JAX

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import torch
from absl import app, flags
from flax import nnx
from PIL import Image

from capcur_jax.models import config as model_config
from capcur_jax.models import fresh, huggingface
from capcur_jax.models.batching import Buckets
from capcur_jax.models.inputs import Processor, Prompt
from capcur_jax.models.qwen_vl import QwenVL

_ROUNDS = flags.DEFINE_integer("rounds", 5, "Measurements of each side; the median counts.")
_PROMPTS = flags.DEFINE_integer("prompts", 8, "Prompts in the batch.")
_TOKENS = flags.DEFINE_integer("tokens", 256, "Tokens of each prompt, about; its image included.")
_IMAGE = flags.DEFINE_integer("image", 224, "Pixels of a side of the image.")
TEXT = {
    "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 6, "num_attention_heads": 8,
    "num_key_value_heads": 2, "max_position_embeddings": 4096, "rope_theta": 1e6,
}  # fmt: skip
VISION = {
    "depth": 6, "hidden_size": 192, "intermediate_size": 512, "num_heads": 4, "patch_size": 14,
    "spatial_merge_size": 2, "temporal_patch_size": 2,
}  # fmt: skip
COMMON = {"vocabulary": 2048, "tied": False, "min_pixels": 3136, "max_pixels": 1 << 20}
ROPE = {"rope_type": "default", "mrope_section": [8, 4, 4], "mrope_interleaved": True}
ARCHITECTURES = {
    "qwen3_vl": {
        **COMMON, "family": "qwen3_vl", "text": {**TEXT, "head_dim": 32, "rope_scaling": ROPE},
        "vision": {**VISION, "num_position_embeddings": 576, "deepstack_visual_indexes": [1, 3]},
    },
    "qwen2_5_vl": {
        **COMMON, "family": "qwen2_5_vl",
        "text": {**TEXT, "rope_scaling": {"type": "mrope", "mrope_section": [4, 6, 6]}},
        "vision": {**VISION, "window_size": 112, "fullatt_block_indexes": [2, 5]},
    },
}  # fmt: skip


def write_checkpoint(directory: Path, architecture: dict) -> Path:
    source = fresh.write_skeleton(directory / "skeleton", ["a few words of text"] * 50, architecture)
    config = model_config.from_directory(source)
    huggingface.save(directory / "model", nnx.state(huggingface.create(config, 0)), config, source, np.float32)
    return directory / "model"


def make_prompts(processor: Processor) -> list[Prompt]:
    random, prompts = np.random.default_rng(0), []
    side = _IMAGE.value
    for _ in range(_PROMPTS.value):
        image = Image.fromarray(random.integers(0, 255, (side, side, 3), dtype=np.uint8))
        words = "a "
        while True:
            prompt = processor.prepare(processor.render([None, words]), [image])
            if len(prompt) >= _TOKENS.value:
                break
            words += "few words of text " * max(1, (_TOKENS.value - len(prompt)) // 40)
        prompts.append(prompt)
    return prompts


def ours(directory: Path, processor: Processor, prompts: list[Prompt]) -> tuple[Callable, Callable]:
    graph, parameters = nnx.split(huggingface.load(directory))
    longest = max(map(len, prompts))
    row = max(len(prompt.patches) for prompt in prompts)
    batch = Buckets((longest,), row, (1.0,)).collate(prompts, processor.config, processor.pad_token)
    batch = jax.device_put(batch)

    def loss(parameters, batch):
        model: QwenVL = nnx.merge(graph, parameters)
        logprobs = jax.nn.log_softmax(model.logits(model.prefill(batch)[0])[:, :-1])
        chosen = jnp.take_along_axis(logprobs, batch.tokens[:, 1:, None], axis=-1)[..., 0]
        mask = batch.mask[:, 1:]
        return -jnp.where(mask, chosen, 0).sum() / mask.sum()

    forward, both = jax.jit(loss), jax.jit(jax.value_and_grad(loss))
    return lambda: float(forward(parameters, batch)), lambda: float(jax.block_until_ready(both(parameters, batch))[0])


def theirs(directory: Path, processor: Processor, prompts: list[Prompt]) -> tuple[Callable, Callable]:
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(str(directory), dtype=torch.float32).eval()
    tokens = np.full((len(prompts), max(map(len, prompts))), processor.pad_token)
    mask = np.zeros_like(tokens)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)], mask[row, : len(prompt)] = prompt.tokens, 1
    inputs = {
        "input_ids": tokens,
        "attention_mask": mask,
        "mm_token_type_ids": (tokens == processor.config.image_token).astype(np.int64),
        "pixel_values": np.concatenate([prompt.patches for prompt in prompts]),
        "image_grid_thw": np.array([grid for prompt in prompts for grid in prompt.grids]),
    }
    inputs = {name: torch.from_numpy(value) for name, value in inputs.items()}
    targets = torch.where(inputs["attention_mask"].bool(), inputs["input_ids"], -100)[:, 1:]

    def loss():
        logits = model(**inputs).logits
        return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), targets.flatten())

    def forward() -> float:
        with torch.no_grad():
            return loss().item()

    def both() -> float:
        model.zero_grad(set_to_none=True)
        value = loss()
        value.backward()
        return value.item()

    return forward, both


def seconds(function: Callable) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def main(_) -> None:
    torch.set_num_threads(os.cpu_count() or 1)
    print("| family | pass | ours, tokens/s | transformers, tokens/s | ratio |")
    print("|---|---|---|---|---|")
    for family, architecture in ARCHITECTURES.items():
        with tempfile.TemporaryDirectory() as directory:
            path = write_checkpoint(Path(directory), architecture)
            processor = Processor.from_directory(path)
            prompts = make_prompts(processor)
            sides = [ours(path, processor, prompts), theirs(path, processor, prompts)]
            count = sum(map(len, prompts))
            for name, (mine, peer) in zip(("forward", "forward + backward"), zip(*sides, strict=True), strict=True):
                assert abs(mine() - peer()) < 1e-3, "the two sides disagree: no comparison"
                times = [(seconds(mine), seconds(peer)) for _ in range(_ROUNDS.value)]
                a, b = (statistics.median(column) for column in zip(*times, strict=True))
                print(f"| {family} | {name} | {count / a:,.0f} | {count / b:,.0f} | {b / a:.2f} |", flush=True)


if __name__ == "__main__":
    app.run(main)
