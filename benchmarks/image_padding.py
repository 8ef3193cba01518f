"""Real images through the preprocessor into the declared buckets: padding share of patches, compiled shapes an epoch.

    python benchmarks/image_padding.py --images=DIR [--prompts=32] [--patch_row=16384] [--epochs=2]

DIR holds images in any format, for example MathVision's. Every image is a prompt of its own; each epoch takes them in
another random order, the last incomplete batch left out, as training does. The settings are those of the
published Qwen3-VL files: patches of 16 pixels, 2 x 2 merged, between 65,536 and 4,194,304 pixels an image.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np
from absl import app, flags
from tqdm import tqdm

from capcur_jax.data.prompts import load_image
from capcur_jax.models import fresh
from capcur_jax.models.batching import BatchShape, Buckets, PromptSize, padding
from capcur_jax.models.inputs import BadInput, Processor

_IMAGES = flags.DEFINE_string("images", None, "A folder of images.", required=True)
_PROMPTS = flags.DEFINE_integer("prompts", 32, "Prompts in a batch.")
_PATCH_ROW = flags.DEFINE_integer("patch_row", 16384, "config.prompt.patch_row")
_EPOCHS = flags.DEFINE_integer("epochs", 2, "Passes over the images.")
_SEED = flags.DEFINE_integer("seed", 0, "Of the orders.")
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


def main(_) -> None:
    with tempfile.TemporaryDirectory() as directory:
        processor = Processor.from_directory(fresh.write_skeleton(directory, ["What is in the image?"], ARCHITECTURE))
    files = sorted(path for path in Path(_IMAGES.value).rglob("*") if path.is_file())
    text, prompts = processor.render([None, "What is in the image?"]), []
    for file in tqdm(files, "preprocessing", disable=None):
        try:
            prompts.append(processor.prepare(text, [load_image(str(file))]))
        except BadInput as error:
            print(f"left out: {error}", file=sys.stderr)
    if len(prompts) < _PROMPTS.value:
        sys.exit(f"{_IMAGES.value}: {len(prompts)} images; a batch needs --prompts={_PROMPTS.value}")
    tokens = 1 << max(len(prompt) for prompt in prompts).bit_length()
    buckets = Buckets((tokens,), _PATCH_ROW.value, tuple(k / 32 for k in range(1, 33)))
    random, shapes, shares = np.random.default_rng(_SEED.value), set[BatchShape](), []
    for epoch in range(_EPOCHS.value):
        order, seen = random.permutation(len(prompts)), set()
        for at in tqdm(range(0, len(order) - _PROMPTS.value + 1, _PROMPTS.value), f"epoch {epoch}", disable=None):
            part = [prompts[i] for i in order[at : at + _PROMPTS.value]]
            seen.add(buckets.shape([PromptSize.of(prompt) for prompt in part]))
            shares.append(padding([buckets.collate(part, processor.config, processor.pad_token)])["patch_padding"])
        shapes |= seen
        print(f"epoch {epoch}: {len(seen)} shapes of rows x patches: "
              + ", ".join(f"{shape.patch_rows} x {_PATCH_ROW.value}" for shape in sorted(seen)))  # fmt: skip
    sizes = [len(prompt.patches) for prompt in prompts]
    print(f"{len(prompts)} images, {min(sizes)} to {max(sizes)} patches, {np.mean(sizes):.0f} on average")
    print(f"padding share of patches: {np.mean(shares):.1%}; compiled shapes: {len(shapes)}")


if __name__ == "__main__":
    app.run(main)
