"""Real images in the trainer's packed rows: padding share of patches, and the shapes that occur.

    python benchmarks/image_padding.py --images=DIR [--max_tokens=4608]

DIR holds images in any format, for example MathVision's. Every image is a prompt of its own, measured as the preset
`qwen3_vl_8b` says (bounds of an image, tokens of a prompt), with the patches of the published Qwen3-VL files; a larger
limit takes the largest images in too. Rollout batches draw from them, with responses like MathVision's
(capcur_jax/plan/lengths.py), and are packed as the trainer packs them for 8 device rows.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np
import packing
import record
from absl import app, flags
from image_architecture import ARCHITECTURE
from rich.progress import track

from capcur_jax import presets
from capcur_jax.data.problem import Problem
from capcur_jax.data.prompts import PromptBuilder, explain_skipped
from capcur_jax.models import fresh
from capcur_jax.models.inputs import BadInput, Processor
from capcur_jax.plan import lengths

_IMAGES = flags.DEFINE_string("images", None, "A folder of images.", required=True)
_MAX_TOKENS = flags.DEFINE_integer("max_tokens", 0, "config.prompt.max_tokens; 0: the preset's.")
ROWS = 8


def main(_) -> None:
    config = presets.get("qwen3_vl_8b")
    preset = config.prompt
    preset.max_tokens = _MAX_TOKENS.value or preset.max_tokens
    with tempfile.TemporaryDirectory() as directory:
        skeleton = fresh.write_skeleton(directory, ["What is in the image?"], ARCHITECTURE)
        processor = Processor.from_directory(skeleton, preset.min_pixels, preset.max_pixels)
    builder = PromptBuilder(processor, "suffix", preset.max_tokens, max(config.packing.shapes)[2])
    files, sizes = sorted(str(path) for path in Path(_IMAGES.value).rglob("*") if path.is_file()), []
    for file in track(files, "measuring"):
        problem = Problem(file, "What is in the image?", "?", (file,))
        try:
            sizes.append(builder.measure(problem))
        except BadInput as error:
            builder.skip(problem, error)
    for line in explain_skipped(builder):
        print(f"left out: {line}", file=sys.stderr)
    if not sizes:
        sys.exit(f"{_IMAGES.value}: no images that the limits allow")
    random, batches = np.random.default_rng(0), []
    for batch in packing.drawn(lengths.NAMES["mathvision"], config.stages.visual.prompts, config, 4):
        chosen = random.integers(0, len(sizes), len(batch))
        batches.append([(sizes[i], responses) for i, (_, responses) in zip(chosen, batch, strict=True)])
    found = packing.count(config, "visual", ROWS, batches)
    packing.show("images", found)
    patches = [sum(size.images) for size in sizes]
    print(
        f"{len(sizes)} of {len(files)} images, {min(patches)} to {max(patches)} patches, {np.mean(patches):.0f} on "
        "average"
    )
    record.write(
        {
            "max_tokens": preset.max_tokens, "device_rows": ROWS, "images": [len(sizes), len(files)],
            "patches": [min(patches), max(patches)], "padding": found["patch_padding"], "shapes": len(found["used"]),
        },
        ("capcur_jax/models/image_rows.py", "capcur_jax/learner/bins.py", "capcur_jax/learner/minibatches.py"),
    )  # fmt: skip


if __name__ == "__main__":
    app.run(main)
