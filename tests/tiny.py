"""One geometry and one handful of problems for all whole runs.

Programs that one test compiled are then in the cache for the others, and no run builds, reads and measures the
thousands of rows of the laptop run's sets, most of such a run's time. tests/test_turns.py runs on those.
"""

from __future__ import annotations

from pathlib import Path

from ml_collections import ConfigDict

from capcur_jax import presets
from capcur_jax.data.problem import SPLITS, Problem
from capcur_jax.data.rows import write_rows
from tests.conftest import random_image

SETTINGS = {
    "prompt.max_tokens": 128,
    "prompt.max_pixels": 1024,
    "prompt.token_buckets": (128,),
    "rollout.max_new_tokens": 8,
    "packing.shapes": ((160, 4, 64), (320, 4, 64)),
    "packing.groups": 4,
    "rollout.group": 3,
    "rollout.slots": 12,
    "evaluation.questions": 12,
    "export.dtype": "bfloat16",
    "log.rollouts_every": 1,
    "objective.updates_per_batch": 1,
}
ROWS = 24  # of each split; no answer is right for more than a quarter of them


def write_sets(directory: Path) -> dict[str, str]:
    """Writes problems of each capability: the settings of the config that name the files."""
    images = [directory / f"{number}.png" for number in range(4)]
    for number, path in enumerate(images):
        random_image(32, 32, seed=number).save(path)
    colors = ("red", "green", "blue", "gray")
    settings = {}
    for split in SPLITS:
        rows = {
            "perception": [Problem(f"{n}", "Which color?", colors[n % 4], (str(images[n % 4]),)) for n in range(ROWS)],
            "text": [Problem(f"{n}", f"What is {n} + 3?", str(n + 3)) for n in range(ROWS)],
            "visual": [
                Problem(f"{n}", "How many, plus 2?", str(n % 4 + 2), (str(images[n % 4]),)) for n in range(ROWS)
            ],
        }
        for name, problems in rows.items():
            settings[f"data.sets.{name}.{split}"] = str(directory / f"{name}-{split}.jsonl")
            write_rows(directory / f"{name}-{split}.jsonl", problems)
    return settings


def config(checkpoint: Path, sets: dict[str, str], order=("perception", "merged"), **changes) -> ConfigDict:
    """A run of two steps a stage; `sets` are those of write_sets."""
    made = presets.get("laptop", order=order)
    made.update_from_flattened_dict({"checkpoint": str(checkpoint), **SETTINGS, **sets})
    for stage in made.stages.values():
        stage.update({"steps": 2, "prompts": 4})
    made.update_from_flattened_dict(changes)
    return made


def arguments(settings: dict) -> list[str]:
    """Settings as the command line takes them."""
    return [f"--config.{key}={value}" for key, value in settings.items()]
