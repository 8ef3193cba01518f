"""What an update computes, from lengths alone: real tokens against full sequences, and how much padding is on top.

    python benchmarks/packing.py --workdir=RUN                                     # the laptop run's recorded lengths
    python benchmarks/packing.py --config=configs/staged.py:qwen3_vl_8b --rows=8   # prompts and responses drawn here

RUN is a run recorded with --config.log.rollouts_every=1 --config.log.rollout_prompts=16: its rollout batches, whole.
Without it prompts are like MathVision's, drawn with seed 0: an image of about 1,000 tokens (log-normal, sigma
--image_sigma), 60 to 150 of text, and responses of about 400 tokens (log-normal, sigma 0.35 between groups and 0.35
within a group, at most config.rollout.max_new_tokens). Micro-batches are split by the trainer's own layout under the
config, any key of which can be given (--config.packing.slabs="(3, 2)"); --rows is how many device rows share one.

"Packing" is the number of real tokens (a prompt once, its responses) divided by that of the full sequences (its prompt
before every response). "Padding" is the share of empty slots in what is computed. A program is compiled
for every shape.
"""

from __future__ import annotations

import collections
import json
import math
import types
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import record
from absl import app, flags
from jax.sharding import AbstractMesh
from ml_collections import ConfigDict, config_flags

from capcur_jax import schedule
from capcur_jax.data.problem import Problem
from capcur_jax.data.prompts import PromptBuilder
from capcur_jax.learner import packing
from capcur_jax.learner.layout import Layout
from capcur_jax.learner.minibatches import Item, agreed, grouped
from capcur_jax.learner.packing import Row, UpdateBatch
from capcur_jax.models.batching import BatchShape, Buckets, PromptSize
from capcur_jax.models.inputs import Processor, Prompt
from capcur_jax.records.jsonl import read_jsonl
from capcur_jax.schedule import Stage

_CONFIG = config_flags.DEFINE_config_file("config", "configs/staged.py", "What the run is told.", lock_config=True)
_WORKDIR = flags.DEFINE_string("workdir", "", "A recorded run; empty: lengths are drawn.")
_ROWS = flags.DEFINE_integer("rows", 1, "Device rows of the mesh (data x fsdp).")
_STEPS = flags.DEFINE_integer("steps", 4, "Rollout batches to draw.")
_IMAGE_SIGMA = flags.DEFINE_float("image_sigma", 0.1, "Spread of image sizes that are drawn.")
Group = tuple[PromptSize, list[int]]  # a prompt's size and its responses' lengths


def items_of(groups: Sequence[Group]) -> list[Item]:
    """Stand-ins that have lengths but no content."""
    return [Item(_prompt(size), [Row(np.zeros(n, np.int32), 1.0) for n in lengths]) for size, lengths in groups]


def batch_of(part: Sequence[Item], layout: Layout, shape: BatchShape, lengths: tuple[int, ...]) -> UpdateBatch:
    """The micro-batch, with arrays of which only the size counts."""

    def slots(*shape):  # of any size, without memory
        return np.broadcast_to(np.int32(0), shape)

    vision = None
    if shape.patch_slots:
        segments = np.zeros(shape.patch_slots, np.int8)
        segments[: sum(sum(PromptSize.of(item.prompt).images) for item in part)] = 1
        vision = types.SimpleNamespace(segments=segments)
    prompts = types.SimpleNamespace(
        lengths=np.array([len(item.prompt) for item in part]), tokens=slots(shape.prompts, shape.tokens),
        vision=vision,
    )  # fmt: skip
    return UpdateBatch(prompts, packing.pack([item.rows for item in part], layout.counts, lengths, 0, sampled=False))


def _prompt(size: PromptSize) -> Prompt:
    empty = np.zeros(0, np.int32)
    return Prompt(np.zeros(size.tokens, np.int32), empty, 0, empty, empty, tuple((1, 1, n) for n in size.images))


# ---------------------------------------------------------------------- lengths


def recorded(workdir: Path, config: ConfigDict) -> dict[str, list[list[Group]]]:
    """The rollout batches of each stage of a run; prompts are measured with the config's checkpoint."""
    prompt = config.prompt
    processor = Processor.from_directory(config.checkpoint, prompt.min_pixels, prompt.max_pixels)
    builder = PromptBuilder(processor, prompt.instruction, prompt.max_tokens, prompt.patch_buckets[-1][1])
    steps: dict[tuple[str, int], list[Group]] = collections.defaultdict(list)
    for line in read_jsonl(workdir / "rollouts.jsonl"):
        images = tuple(str(workdir / image) for image in line["images"])
        size = builder.measure(Problem(line["id"], line["problem"], line["answer"], images))
        steps[line["stage"], line["step"]].append((size, [sample["tokens"] for sample in line["samples"]]))
    stages: dict[str, list[list[Group]]] = collections.defaultdict(list)
    for (stage, step), groups in steps.items():
        if len(groups) != config.stages[stage].prompts:
            raise SystemExit(
                f"{workdir}: step {step} has {len(groups)} of {config.stages[stage].prompts} prompts; "
                "record with --config.log.rollouts_every=1 and --config.log.rollout_prompts of as many"
            )
        stages[stage].append(groups)
    return stages


def drawn(config: ConfigDict, prompts: int, steps: int, image_sigma: float) -> list[list[Group]]:
    """Rollout batches like MathVision's; four patches make an image token."""
    random, G = np.random.default_rng(0), config.rollout.group
    batches = []
    for _ in range(steps):
        images = np.rint(1000 * np.exp(image_sigma * random.standard_normal(prompts))).astype(int)
        texts = random.integers(60, 151, prompts)
        # Of a log-normal number with sigmas a and b the mean is median x exp((a^2 + b^2) / 2).
        spread = 0.35 * random.standard_normal((prompts, 1)) + 0.35 * random.standard_normal((prompts, G))
        lengths = np.rint(400 * math.exp(-(0.35**2)) * np.exp(spread)).astype(int)
        lengths = np.clip(lengths, 1, config.rollout.max_new_tokens)
        sizes = [PromptSize(int(i + t), (int(4 * i),)) for i, t in zip(images, texts, strict=True)]
        batches.append(list(zip(sizes, lengths.tolist(), strict=True)))
    return batches


# ---------------------------------------------------------------------- counts


def count(stage: Stage, config: ConfigDict, steps: Sequence[Sequence[Group]]) -> dict:
    """Of all rollout batches of a stage."""
    prompt = config.prompt
    sizes = [size for groups in steps for size, _ in groups]
    layout = Layout.of(
        stage, config, Buckets(prompt.token_buckets, prompt.patch_buckets),
        processor=None, mesh=AbstractMesh((1, _ROWS.value, 1), ("data", "fsdp", "tensor")),
        images=any(size.images for size in sizes),
    )  # fmt: skip
    used, counts = collections.Counter(), np.zeros(len(packing.SLOTS), np.int64)
    for groups in steps:
        items = items_of(groups)
        for at in range(0, len(items), len(items) // layout.updates):
            parts = grouped(items[at : at + len(items) // layout.updates], layout)
            shapes = agreed(parts, layout)
            used.update(shapes)
            counts += packing.slots([batch_of(part, layout, *shape) for part, shape in zip(parts, shapes, strict=True)])
    lengths = np.array([n for groups in steps for _, responses in groups for n in responses])
    prompts = np.array([size.tokens for size in sizes])
    return {
        "counts": counts, "programs": len(layout.shapes(sizes)) * len(layout.lengths), "used": used,
        "prompt": (prompts.mean(), prompts.max()), "response": (lengths.mean(), lengths.max()),
    }  # fmt: skip


def line_of(name: str, counts: np.ndarray) -> dict:
    shares = packing.shares(counts)
    patches = f"  of patches {shares['patch_padding']:.3f}" if "patch_padding" in shares else ""
    print(f"{name:<12} packing {shares['packing']:.3f}  padding {shares['token_padding']:.3f}{patches}")
    return shares


def main(_) -> None:
    config = _CONFIG.value
    stages = {stage.name: stage for stage in schedule.stages(config)}
    settings = {
        **config.packing.to_dict(), "token_buckets": config.prompt.token_buckets,
        "patch_buckets": config.prompt.patch_buckets, "updates_per_batch": config.objective.updates_per_batch,
        "device_rows": _ROWS.value,
    }  # fmt: skip
    print(", ".join(f"{key} {value}" for key, value in settings.items()))
    if _WORKDIR.value:
        batches, source = recorded(Path(_WORKDIR.value), config), f"recorded in {_WORKDIR.value}"
    else:
        stage = stages.get("visual") or next(iter(stages.values()))
        batches = {stage.name: drawn(config, stage.prompts, _STEPS.value, _IMAGE_SIGMA.value)}
        source = f"drawn: MathVision-like, image sigma {_IMAGE_SIGMA.value}"
    print(f"lengths {source}")
    results, total = {}, np.zeros(len(packing.SLOTS), np.int64)
    for name, steps in batches.items():
        found = count(stages[name], config, steps)
        total += found["counts"]
        results[name] = line_of(name, found["counts"]) | {"programs": found["programs"], "steps": len(steps)}
        (prompt, longest_prompt), (response, longest) = found["prompt"], found["response"]
        print(
            f"  {len(steps)} rollout batches; tokens of a prompt {prompt:.0f}, at most {longest_prompt}, of a response "
            f"{response:.0f}, at most {longest}; {found['programs']} shapes to compile; micro-batches of each:"
        )
        for (shape, lengths), times in found["used"].most_common():
            print(
                f"    {times:5d} x {shape.prompts} prompts of {shape.tokens}, {shape.patch_rows} x {shape.patches} "
                f"patches, responses of {lengths}"
            )
    results["all"] = line_of("all", total)
    line = json.dumps({"benchmark": "packing", "lengths": source, "settings": settings, "results": results})
    print(line)
    shown = {
        name: {k: found[k] for k in ("packing", "token_padding")} for name, found in results.items() if name != "all"
    }
    record.write(
        {"stages": shown, "batches": sum(map(len, batches.values()))},
        [*(f"capcur_jax/learner/{name}.py" for name in ("packing", "layout", "minibatches")),
         "capcur_jax/models/batching.py"],
    )  # fmt: skip


if __name__ == "__main__":
    app.run(main)
