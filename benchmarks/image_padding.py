"""Real images through the preprocessor into the declared buckets: padding share of patches, compiled shapes an epoch.

    python benchmarks/image_padding.py --images=DIR [--max_tokens=4608 --patch_row=16384]

DIR holds images in any format, for example MathVision's. Every image is a prompt of its own, prepared as the preset
`qwen3_vl_8b` says (bounds of an image, tokens of a prompt, buckets), with the patches of the published Qwen3-VL files;
larger limits take the largest images in too. Each epoch takes them in another random order, the last incomplete batch
left out, as training does.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np
import record
from absl import app, flags
from image_architecture import ARCHITECTURE
from rich.progress import track

from capcur_jax import presets
from capcur_jax.data.problem import Problem
from capcur_jax.data.prompts import PromptBuilder, explain_skipped
from capcur_jax.models import fresh
from capcur_jax.models.batching import BatchShape, Buckets, PromptSize, padding
from capcur_jax.models.inputs import Processor

_IMAGES = flags.DEFINE_string("images", None, "A folder of images.", required=True)
_PROMPTS = flags.DEFINE_integer("prompts", 32, "Prompts in a batch.")
_MAX_TOKENS = flags.DEFINE_integer("max_tokens", 0, "config.prompt.max_tokens; 0: the preset's.")
_PATCH_ROW = flags.DEFINE_integer("patch_row", 0, "config.prompt.patch_row; 0: the preset's.")
_EPOCHS = flags.DEFINE_integer("epochs", 2, "Passes over the images.")
_SEED = flags.DEFINE_integer("seed", 0, "Of the orders.")


def main(_) -> None:
    preset = presets.get("qwen3_vl_8b").prompt
    limit, row = _MAX_TOKENS.value or preset.max_tokens, _PATCH_ROW.value or preset.patch_row
    buckets = Buckets(tuple(sorted({*preset.token_buckets, limit})), row, tuple(preset.patch_rows))
    with tempfile.TemporaryDirectory() as directory:
        skeleton = fresh.write_skeleton(directory, ["What is in the image?"], ARCHITECTURE)
        processor = Processor.from_directory(skeleton, preset.min_pixels, preset.max_pixels)
    builder = PromptBuilder(processor, "suffix", limit, row)
    files = sorted(str(path) for path in Path(_IMAGES.value).rglob("*") if path.is_file())
    made = (
        builder.try_build(Problem(file, "What is in the image?", "?", (file,)))
        for file in track(files, "preprocessing")
    )
    prompts = [prompt for prompt in made if prompt is not None]
    for line in explain_skipped(builder):
        print(f"left out: {line}", file=sys.stderr)
    if len(prompts) < _PROMPTS.value:
        sys.exit(f"{_IMAGES.value}: {len(prompts)} images; a batch needs --prompts={_PROMPTS.value}")
    random, shapes, shares = np.random.default_rng(_SEED.value), set[BatchShape](), []
    for epoch in range(_EPOCHS.value):
        order, seen = random.permutation(len(prompts)), set()
        for at in range(0, len(order) - _PROMPTS.value + 1, _PROMPTS.value):
            part = [prompts[i] for i in order[at : at + _PROMPTS.value]]
            seen.add(buckets.shape([PromptSize.of(prompt) for prompt in part]))
            shares.append(padding([buckets.collate(part, processor.config, processor.pad_token)])["patch_padding"])
        shapes |= seen
        shown = (f"{shape.tokens} tokens, {shape.patch_rows} x {row} patches" for shape in sorted(seen))
        print(f"epoch {epoch}: {len(seen)} shapes: {'; '.join(shown)}")
    sizes = [len(prompt.patches) for prompt in prompts]
    print(
        f"{len(prompts)} of {len(files)} images, {min(sizes)} to {max(sizes)} patches, {np.mean(sizes):.0f} on average"
    )
    print(f"padding share of patches: {np.mean(shares):.1%}; compiled shapes: {len(shapes)}")
    record.write(
        {
            "max_tokens": limit, "patch_row": row, "images": [len(prompts), len(files)],
            "patches": [min(sizes), max(sizes)], "padding": np.mean(shares), "shapes": len(shapes),
        },
        ("capcur_jax/models/batching.py", "capcur_jax/models/inputs.py"),
    )  # fmt: skip


if __name__ == "__main__":
    app.run(main)
