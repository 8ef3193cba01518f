"""One GRPO step of 16 prompts x 5 responses x 48 tokens on a 3.3 M-parameter Qwen3-VL: this project against TRL.

    python benchmarks/laptop_step.py --trl_python=PATH/TO/ENV/bin/python [--steps=12]

Both sides run in one sitting, one after the other, twice: ours, TRL, ours, TRL. Same checkpoint (written here), same
images and questions, every response 48 tokens long, one update a step, k3 KL against a reference, float32, two threads.
The environment of --trl_python needs trl==1.16.0, torch, torchvision, accelerate, datasets and pillow. Without it only
our side is measured, and no ratio is printed.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from flax import nnx

from capcur_jax import objectives, presets
from capcur_jax.data.packing import pack
from capcur_jax.data.problem import read_problems
from capcur_jax.data.prompts import INSTRUCTION, PromptBuilder
from capcur_jax.data.sources import easy_vqa
from capcur_jax.learner import Learner
from capcur_jax.models import config as model_config
from capcur_jax.models import fresh, huggingface
from capcur_jax.models.batching import Buckets
from capcur_jax.models.inputs import Processor
from capcur_jax.rollout.engine import Sampling
from capcur_jax.rollout.local import LocalEngine

_TRL = flags.DEFINE_string("trl_python", "", "Python of an environment with TRL; empty: our side alone.")
_STEPS = flags.DEFINE_integer("steps", 12, "Steps a round; the first two of each are left out.")
_ROUNDS = flags.DEFINE_integer("rounds", 2, "How often the two sides take turns.")
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


def write_inputs(directory: Path) -> tuple[Path, list]:
    """The checkpoint that both sides load, and 256 questions about real images."""
    problems, _ = read_problems(easy_vqa.build(directory / "data", "perception")["train"])
    problems = problems[:256]
    texts = [f"{p.problem} {INSTRUCTION} <think>The shape is a {p.answer}.</think> \\boxed{{}}" for p in problems]
    skeleton = fresh.write_skeleton(directory / "skeleton", texts, ARCHITECTURE)
    config = model_config.from_directory(skeleton)
    parameters = nnx.state(huggingface.create(config, seed=0))
    huggingface.save(directory / "checkpoint", parameters, config, skeleton, dtype=np.float32)
    with open(directory / "rows.jsonl", "w", encoding="utf-8") as file:
        for p in problems:
            file.write(json.dumps({"problem": f"{p.problem} {INSTRUCTION}", "image": p.images[0]}) + "\n")
    return directory / "checkpoint", problems


def ours(checkpoint: Path, problems: list, steps: int) -> list[dict[str, float]]:
    """Seconds of each step after warm-up, by phase; the very functions that a run calls."""
    processor, model = Processor.from_directory(checkpoint), huggingface.load(checkpoint, remat="full")
    ends, processor.end_tokens = processor.end_tokens, (-1,)  # no response may end early
    builder = PromptBuilder(processor, "suffix", 96, 64)
    graph, parameters = nnx.split(model)
    buckets = Buckets((64, 96), patch_row=64, patch_rows=(1.0,))
    engine = LocalEngine(model, processor, max_rows=PROMPTS * GROUP, buckets=buckets)
    learner = Learner(
        graph, parameters, objective="grpo", freeze="", config=presets.laptop(), temperature=1.0,
        banned=processor.banned_tokens,
    )  # fmt: skip
    reference, state = jax.tree.map(jnp.copy, parameters), learner.start(parameters)
    advantages = jax.jit(objectives.group_advantages)
    random, seconds = np.random.default_rng(0), []
    for step in range(steps):
        started = time.perf_counter()
        part = [problems[(step * PROMPTS + i) % len(problems)] for i in range(PROMPTS)]
        prompts = [builder.build(problem) for problem in part]
        groups = engine.generate(prompts, Sampling(TOKENS), GROUP, step)
        samples = [sample for group in groups for sample in group]
        sampled = time.perf_counter()
        rewards = random.random((PROMPTS, GROUP), np.float32)
        batch = pack(
            buckets.collate(prompts, processor.config, processor.pad_token),
            [sample.tokens for sample in samples],
            (TOKENS,),
            processor.pad_token,
            advantages=np.asarray(advantages(rewards)).reshape(-1),
            sampler_logprobs=[sample.logprobs for sample in samples],
        )
        batch = dataclasses.replace(batch, reference_logprobs=learner.score(reference, batch))
        state, metrics = learner.update(state, batch, np.float32(1e-6))
        jax.device_get(metrics)
        engine.update_weights(state.parameters, step)
        done = time.perf_counter()
        seconds.append({"step": done - started, "rollout": sampled - started, "update": done - sampled})
        assert all(len(sample.tokens) == TOKENS for sample in samples)
    processor.end_tokens = ends
    return seconds[2:]


def trl(python: str, checkpoint: Path, rows: Path, steps: int) -> list[float]:
    """Seconds of each of TRL's steps after the first two."""
    command = [python, str(Path(__file__).with_name("trl_step.py")), f"--checkpoint={checkpoint}", f"--rows={rows}"]
    done = subprocess.run([*command, f"--steps={steps}", "--threads=2"], capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"TRL's side failed:\n{done.stderr[-3000:]}")
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"step_seconds"')]
    return [line["step_seconds"] for line in lines][2:]


def main(_) -> None:
    mine, theirs = [], []
    with tempfile.TemporaryDirectory() as directory:
        checkpoint, problems = write_inputs(Path(directory))
        for _ in range(_ROUNDS.value):
            mine += ours(checkpoint, problems, _STEPS.value)
            if _TRL.value:
                theirs += trl(_TRL.value, checkpoint, Path(directory) / "rows.jsonl", _STEPS.value)
    sides = {"capcur_jax": [s["step"] for s in mine], "TRL": theirs}
    print(f"seconds a step, {PROMPTS} prompts x {GROUP} responses x {TOKENS} tokens")
    for name, values in sides.items():
        if values:
            print(f"{name:<12} median {statistics.median(values):.2f}  min {min(values):.2f}  max {max(values):.2f}")
    phases = {k: statistics.median(s[k] for s in mine) for k in ("rollout", "update")}
    print("of ours: " + ", ".join(f"{k} {v:.2f}" for k, v in phases.items()))
    if theirs:
        print(f"ratio of medians {statistics.median(sides['capcur_jax']) / statistics.median(theirs):.2f}")


if __name__ == "__main__":
    app.run(main)
