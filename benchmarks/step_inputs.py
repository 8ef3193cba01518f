"""What laptop_step.py and grpo_step.py share: a 3.3 M-parameter Qwen3-VL, questions about images, a stage's trainer."""

from __future__ import annotations

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from capcur_jax import presets, schedule
from capcur_jax.data.problem import Problem
from capcur_jax.data.prompts import INSTRUCTION
from capcur_jax.data.rows import read_problems
from capcur_jax.data.sources import easy_vqa
from capcur_jax.learner.layout import Layout
from capcur_jax.learner.learner import Learner
from capcur_jax.learner.trainer import Trainer
from capcur_jax.models import config as model_config
from capcur_jax.models import fresh, huggingface
from capcur_jax.models.batching import Buckets, PromptSize
from capcur_jax.models.inputs import Processor
from capcur_jax.models.qwen_vl import QwenVL

PROMPTS, GROUP, TOKENS = 16, 5, 48
ARCHITECTURE = {
    "vocabulary": 512, "tied": False, "min_pixels": 4096, "max_pixels": 4096,
    "text": {
        "hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 6,
        "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 4096, "rope_theta": 5e6,
        "rope_scaling": {"rope_type": "default", "mrope_section": [8, 4, 4], "mrope_interleaved": True},
    },
    "vision": {
        "depth": 3, "hidden_size": 128, "intermediate_size": 256, "num_heads": 4, "patch_size": 8,
        "spatial_merge_size": 2, "temporal_patch_size": 2, "num_position_embeddings": 64,
        "deepstack_visual_indexes": [0, 1],
    },
}  # fmt: skip


def settings() -> ConfigDict:
    """The laptop preset for that model: its tokenizer cuts questions otherwise than the shipped checkpoint's."""
    config = presets.get("laptop", ("perception",))
    config.prompt.token_buckets = (928,)  # 16 prompts of 58
    config.stages.perception.prompts = PROMPTS
    return config


def write_checkpoint(directory: Path, problems: int) -> tuple[Path, list[Problem]]:
    """The checkpoint that both sides load (images are taken at their own size), and questions about real images;
    rows.jsonl has them with the instruction, for the side that can't read problems."""
    found, _ = read_problems(easy_vqa.build(directory / "data", "perception")["train"])
    texts = [f"{p.problem} {INSTRUCTION} <think>The shape is a {p.answer}.</think> \\boxed{{}}" for p in found[:256]]
    skeleton = fresh.write_skeleton(directory / "skeleton", texts, ARCHITECTURE)
    save_weights(directory / "checkpoint", skeleton, seed=0)
    with open(directory / "rows.jsonl", "w", encoding="utf-8") as file:
        for problem in found[:problems]:
            row = {"problem": f"{problem.problem} {INSTRUCTION}", "image": problem.images[0]}
            file.write(json.dumps(row) + "\n")
    return directory / "checkpoint", found[:problems]


def save_weights(directory: Path, skeleton: Path, seed: int, noise: float = 0.0) -> None:
    """Random weights of that seed; `noise`: by how much of its own size each number is off them."""
    config = model_config.from_directory(skeleton)
    flat, random = nnx.to_flat_state(nnx.state(huggingface.create(config, seed=seed))), np.random.default_rng(seed)
    for _, leaf in flat:
        leaf[...] = leaf[...] * (1 + noise * random.standard_normal(leaf.shape).astype(np.float32))
    huggingface.save(directory, nnx.from_flat_state(flat), config, skeleton, dtype=np.float32)


def open_stage(
    config: ConfigDict, model: QwenVL, processor: Processor, sizes: list[PromptSize], reference: nnx.State | None = None
) -> tuple[Layout, Trainer]:
    """Layout and trainer of the config's first stage as a run has them, programs not yet compiled.

    `reference`: the parameters that the KL is to; None: the model's own.
    """
    stage, mesh = schedule.stages(config)[0], model.mesh
    prompt = config.prompt
    buckets = Buckets.of(prompt, processor.config.vision)
    graph, parameters = nnx.split(model)
    learner = Learner(
        graph, parameters, objective=stage.objective, freeze=stage.freeze, config=config,
        temperature=config.rollout.temperature, banned=processor.banned_tokens, mesh=mesh,
    )  # fmt: skip
    layout = Layout.of(stage, config, buckets, processor, mesh, any(size.images for size in sizes), sizes)
    trained, frozen = learner.split(parameters)
    start = learner.split(parameters if reference is None else reference)[0]
    copied = learner.copy_as(start, jnp.float32) if layout.reference else None
    trainer = Trainer(learner, mesh, learner.start(trained), frozen, reference=copied)
    blank = next(layout.blanks(passes=False))
    trainer.sums = learner.zeros(trainer.state.trained, trainer.frozen, blank)
    return layout, trainer
