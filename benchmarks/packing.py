"""What an update computes, from lengths alone: real tokens against full sequences, and how much padding is on top.

    python benchmarks/packing.py                     # drawn: the plan's distributions, and the laptop run's
    python benchmarks/packing.py --workdir=RUN       # a laptop run's recorded lengths

RUN is a run recorded with --config.log.rollouts_every=1 --config.log.rollout_prompts=32: its rollout batches, whole.
Without it lengths are drawn with seeds 0 to --steps: those of capcur_jax/plan/lengths.py under the 8B preset, on 8 and
on 32 device rows, and those of LAPTOP under the laptop preset on one. Groups are packed by the trainer's own functions.

"Packing" is the number of real tokens (a prompt once, its responses) divided by that of the full sequences (its prompt
before every response). "Padding" is the share of empty slots in what is computed, "computed" both together. A pass has
a program for every shape of rows.
"""

from __future__ import annotations

import collections
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import record
from absl import app, flags
from jax.sharding import AbstractMesh
from ml_collections import ConfigDict

from capcur_jax import presets, schedule
from capcur_jax.learner import packing
from capcur_jax.learner.layout import Layout
from capcur_jax.models.batching import Buckets
from capcur_jax.plan import lengths, work
from capcur_jax.plan.lengths import Drawn, Group
from capcur_jax.records.jsonl import read_jsonl

_WORKDIR = flags.DEFINE_string("workdir", "", "A recorded laptop run; empty: lengths are drawn.")
_STEPS = flags.DEFINE_integer("steps", 4, "Rollout batches to draw.")
NAMES, ROWS = ("paper", "mathvision", "geo3k", "text"), (8, 32)
# Like those of the laptop run's stages: images of 64 patches, questions of nearly one length.
LAPTOP = {
    "perception": Drawn(16, 0.0, (16, 16), (31, 37), 14, 0.06, 0.1),
    "text": Drawn(0, 0.0, (0, 0), (41, 44), 28, 0.04, 0.06),
    "visual": Drawn(16, 0.0, (16, 16), (46, 76), 30, 0.15, 0.12),
}


def drawn(kind: Drawn, prompts: int, config: ConfigDict, steps: int) -> list[list[Group]]:
    """Rollout batches."""
    group, longest = config.rollout.group, config.rollout.max_new_tokens
    return [lengths.draw(kind, prompts, group, longest, 2, np.random.default_rng(seed)) for seed in range(steps)]


def laptop(config: ConfigDict, steps: int) -> dict[str, list[list[Group]]]:
    """Rollout batches of each stage; of the merged one a third of each."""
    prompts = config.stages.merged.prompts
    batches = {name: drawn(kind, prompts, config, steps) for name, kind in LAPTOP.items()}
    random = np.random.default_rng(0)
    merged = []
    for each in zip(*batches.values(), strict=True):
        pool = [group for groups in each for group in groups]
        merged.append([pool[i] for i in random.permutation(len(pool))[:prompts]])
    return batches | {"merged": merged}


def recorded(workdir: Path, config: ConfigDict) -> dict[str, list[list[Group]]]:
    """The rollout batches of each stage of a run."""
    steps: dict[tuple[str, int], list[Group]] = collections.defaultdict(list)
    for line in read_jsonl(workdir / "rollouts.jsonl"):
        size = lengths.PromptSize(line["prompt_tokens"], tuple(line["image_patches"]))
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


# ---------------------------------------------------------------------- counts


def layout_of(config: ConfigDict, stage: str, rows: int, batches: Sequence[Sequence[Group]]) -> Layout:
    """Of a stage whose prompts are these, on so many device rows."""
    with config.unlocked():
        config.order = (stage,)
    known = SimpleNamespace(vision=SimpleNamespace(merge_size=2))
    prompt, sizes = config.prompt, [size for groups in batches for size, _ in groups]
    return Layout.of(
        schedule.stages(config)[0], config, Buckets((1,), smallest=prompt.min_pixels // 256 or 4),
        SimpleNamespace(config=known), AbstractMesh((1, rows, 1), ("data", "fsdp", "tensor")),
        any(size.images for size in sizes), sizes,
    )  # fmt: skip


def count(config: ConfigDict, stage: str, rows: int, batches: Sequence[Sequence[Group]]) -> dict[str, Any]:
    """Shares and counts of these rollout batches."""
    layout, used = layout_of(config, stage, rows, batches), collections.Counter()
    counts, micros = np.zeros(len(packing.SLOTS), np.int64), 0
    for groups in batches:
        for update in work.updates(groups, layout):
            counts += sum(micro.slots() for micro in update)
            used.update(micro.shape for micro in update)
            micros += len(update)
    found = packing.shares(counts) | {"device_rows": rows, "programs": len(layout.shapes), "used": used}
    found["computed"] = found["packing"] / (1 - found["token_padding"])
    found["micro_batches"] = micros / len(batches) / layout.updates
    return found


def show(name: str, found: Mapping[str, Any]) -> dict[str, Any]:
    """Prints it; what is kept of it."""
    patches = f"  of patches {found['patch_padding']:.3f}" if "patch_padding" in found else ""
    print(
        f"{name:<11} on {found['device_rows']} rows: packing {found['packing']:.3f}  computed {found['computed']:.3f}"
        f"  padding {found['token_padding']:.3f}{patches}  {found['micro_batches']:.1f} micro-batches an update, "
        f"{found['programs']} programs a pass"
    )
    shapes = ", ".join(f"{times} x {length} + {n} x {P}" for (length, n, P), times in sorted(found["used"].items()))
    print(f"{'':<11} tokens + rows of patches: {shapes}")
    return {key: value for key, value in found.items() if key != "used"}


def main(_) -> None:
    config = presets.get("laptop")
    results: dict[str, list[dict[str, Any]]] = {}
    if _WORKDIR.value:
        stages = recorded(Path(_WORKDIR.value), config)
    else:
        stages, large = laptop(config, _STEPS.value), presets.get("qwen3_vl_8b")
        for name in NAMES:
            stage = "text" if name == "text" else "visual"
            batches = drawn(lengths.NAMES[name], large.stages[stage].prompts, large, _STEPS.value)
            results[name] = [show(name, count(large, stage, rows, batches)) for rows in ROWS]
    for name, batches in stages.items():
        results[f"laptop, {name}"] = [show(name, count(config, name, 1, batches))]
    print(json.dumps({"benchmark": "packing", "results": results}))
    record.write(
        {"lengths": results, "batches": sum(map(len, stages.values()))},
        [*(f"capcur_jax/learner/{name}.py" for name in ("bins", "packing", "layout", "minibatches")),
         "capcur_jax/models/image_rows.py"],
    )  # fmt: skip


if __name__ == "__main__":
    app.run(main)
