"""Forward, and forward + backward, in tokens/s: this project against transformers' PyTorch model, in one run.

    OMP_WAIT_POLICY=PASSIVE python benchmarks/model_speed.py [--rounds=9]

Both sides load the same checkpoint (written here, random weights; both families, two sizes), get the same batch of
prompts with an image each, compute in float32 on the same threads, and take turns. Loss: mean cross-entropy of the next
token; gradients of every parameter. Ours recomputes layers backwards, as the laptop preset does; PyTorch runs with its
default attention (sdpa).
"""

from __future__ import annotations

import os

import record

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: idle threads that spin take the cores from JAX

import itertools
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch
from absl import app, flags
from comparison import faster
from flax import nnx
from PIL import Image

from capcur_jax.models import config as model_config
from capcur_jax.models import fresh, huggingface
from capcur_jax.models.batching import Buckets, PromptSize
from capcur_jax.models.inputs import Processor, Prompt
from capcur_jax.models.qwen_vl import QwenVL
from capcur_jax.models.vision import pixel_values

_ROUNDS = flags.DEFINE_integer("rounds", 9, "Measurements of each side; the median counts.")


class Size(NamedTuple):
    """A model and a batch."""

    prompts: int
    tokens: int  # of each prompt, about; its image included
    image: int  # pixels of a side
    vocabulary: int
    text: dict[str, int]
    vision: dict[str, int]


# Widths of the shipped base checkpoint and the laptop run's batches; a model and a batch in which arithmetic, not
# overhead, takes the time.
SIZES = {
    "laptop": Size(
        16, 64, 64, 640,
        {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 4, "num_attention_heads": 4,
         "num_key_value_heads": 1},
        {"depth": 3, "hidden_size": 96, "intermediate_size": 256, "num_heads": 4, "patch_size": 8},
    ),
    "wide": Size(
        8, 256, 224, 2048,
        {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 6, "num_attention_heads": 8,
         "num_key_value_heads": 2},
        {"depth": 6, "hidden_size": 192, "intermediate_size": 512, "num_heads": 4, "patch_size": 14},
    ),
}  # fmt: skip


def architecture(family: str, size: Size) -> dict:
    """Heads of 32 in the decoder; the family's own parts beside the sizes."""
    text = {**size.text, "max_position_embeddings": 4096, "rope_theta": 1e6}
    vision = {**size.vision, "spatial_merge_size": 2, "temporal_patch_size": 2}
    if family == "qwen3_vl":
        rope = {"rope_type": "default", "mrope_section": [8, 4, 4], "mrope_interleaved": True}
        text |= {"head_dim": 32, "rope_scaling": rope}
        vision |= {"num_position_embeddings": 576, "deepstack_visual_indexes": [0, 1]}
    else:
        text |= {"rope_scaling": {"type": "mrope", "mrope_section": [4, 6, 6]}}
        vision |= {"window_size": 8 * size.vision["patch_size"], "fullatt_block_indexes": [size.vision["depth"] - 1]}
    return {
        "family": family, "vocabulary": size.vocabulary, "tied": False, "min_pixels": 3136, "max_pixels": 1 << 20,
        "text": text, "vision": vision,
    }  # fmt: skip


def write_checkpoint(directory: Path, made: dict) -> Path:
    source = fresh.write_skeleton(directory / "skeleton", ["a few words of text"] * 50, made)
    config = model_config.from_directory(source)
    huggingface.save(directory / "model", nnx.state(huggingface.create(config, 0)), config, source, np.float32)
    return directory / "model"


def make_prompts(processor: Processor, size: Size) -> list[Prompt]:
    random, prompts = np.random.default_rng(0), []
    for _ in range(size.prompts):
        image = Image.fromarray(random.integers(0, 255, (size.image, size.image, 3), dtype=np.uint8))
        words = "a "
        while True:
            prompt = processor.prepare(processor.render([None, words]), [image])
            if len(prompt) >= size.tokens:
                break
            words += "few words of text " * max(1, (size.tokens - len(prompt)) // 40)
        prompts.append(prompt)
    return prompts


def ours(directory: Path, processor: Processor, prompts: list[Prompt]) -> tuple[Callable, Callable]:
    graph, parameters = nnx.split(huggingface.load(directory, remat="full"))
    row = max(len(prompt.patches) for prompt in prompts)
    buckets = Buckets((sum(map(len, prompts)),), ((len(prompts), row),), longest=max(map(len, prompts)))
    shape = buckets.shape([[PromptSize.of(prompt) for prompt in prompts]])
    batch = buckets.collate([prompts], shape, len(prompts), processor.config, processor.pad_token)
    predicts = np.ones(batch.tokens.shape, bool)
    predicts[:, np.cumsum([len(prompt) for prompt in prompts]) - 1] = False  # what follows is another's
    batch = jax.device_put(batch)

    def loss(parameters, batch):
        model: QwenVL = nnx.merge(graph, parameters)
        logprobs = jax.nn.log_softmax(model.logits(model.prefill(batch)[0])[:, :-1])
        chosen = jnp.take_along_axis(logprobs, batch.tokens[:, 1:, None], axis=-1)[..., 0]
        mask = predicts[:, :-1]
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
        "pixel_values": np.array(
            pixel_values(np.concatenate([prompt.patches for prompt in prompts]), processor.config.vision)
        ),
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
    rows = []
    print("| size | family | pass | ours, tokens/s | transformers, tokens/s | ours is |")
    print("|---|---|---|---|---|---|")
    for name_of_size, family in itertools.product(SIZES, model_config.FAMILIES):
        with tempfile.TemporaryDirectory() as directory:
            size = SIZES[name_of_size]
            path = write_checkpoint(Path(directory), architecture(family, size))
            processor = Processor.from_directory(path)
            prompts = make_prompts(processor, size)
            sides = [ours(path, processor, prompts), theirs(path, processor, prompts)]
            count = sum(map(len, prompts))
            for name, (mine, peer) in zip(("forward", "forward + backward"), zip(*sides, strict=True), strict=True):
                assert abs(mine() - peer()) < 1e-3, "the two sides disagree: no comparison"
                times = [(seconds(mine), seconds(peer)) for _ in range(_ROUNDS.value)]
                a, b = (statistics.median(column) for column in zip(*times, strict=True))
                rates = f"{count / a:,.0f} | {count / b:,.0f} | {faster(a, b)}"
                print(f"| {name_of_size} | {family} | {name} | {rates} |", flush=True)
                row = {"size": name_of_size, "family": family, "pass": name}
                rows.append(row | {"ours": round(count / a), "transformers": round(count / b)})
    record.write({"rows": rows}, ("capcur_jax/models/**",), packages=("torch", "transformers"))


if __name__ == "__main__":
    app.run(main)
