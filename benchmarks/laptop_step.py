"""One GRPO step of 16 prompts x 5 responses x 48 tokens on a 3.3 M-parameter Qwen3-VL: this project against TRL.

    python benchmarks/laptop_step.py --trl_python=PATH/TO/ENV/bin/python [--steps=12]

Both sides run in one sitting, one after the other, twice: ours, TRL, ours, TRL. Same checkpoint (written here), same
images and questions, every response 48 tokens long, one update a step, k3 KL against a reference, float32, two threads.
The environment of --trl_python needs trl==1.16.0, torch, torchvision, accelerate, datasets and pillow. Without it only
our side is measured, and nothing is compared.
"""

from __future__ import annotations

import functools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
import record
from absl import app, flags
from comparison import faster
from step_inputs import GROUP, PROMPTS, TOKENS, open_stage, settings, write_checkpoint

from capcur_jax import policy
from capcur_jax.data.problem import Problem
from capcur_jax.data.prompts import PromptBuilder
from capcur_jax.learner import objectives
from capcur_jax.learner.minibatches import minibatches, sampled_item
from capcur_jax.models import huggingface
from capcur_jax.models.batching import Buckets
from capcur_jax.models.inputs import Processor
from capcur_jax.rollout.engine import Sampling
from capcur_jax.rollout.local.engine import LocalEngine

_TRL = flags.DEFINE_string("trl_python", "", "Python of an environment with TRL; empty: our side alone.")
_STEPS = flags.DEFINE_integer("steps", 12, "Steps a round; the first two of each are left out.")
_ROUNDS = flags.DEFINE_integer("rounds", 2, "How often the two sides take turns.")


def ours(checkpoint: Path, problems: list[Problem], steps: int) -> list[dict[str, float]]:
    """Seconds of each step after warm-up, by phase; the very functions that a run calls."""
    config = settings()
    config.objective.updates_per_batch = 1
    prompt, objective = config.prompt, config.objective
    objective.updates_per_batch = 1  # as TRL's side has it
    processor, model = Processor.from_directory(checkpoint), huggingface.load(checkpoint, remat=policy.remat(config))
    processor.end_tokens = (-1,)  # no response may end early
    buckets = Buckets.of(prompt, processor.config.vision)
    builder = PromptBuilder(processor, prompt.instruction, prompt.max_tokens, buckets.images.longest)
    layout, trainer = open_stage(config, model, processor, [builder.measure(problem) for problem in problems])
    engine = LocalEngine(model, processor, slots=PROMPTS * GROUP, buckets=buckets, prefill=config.rollout.prefill)
    advantages = jax.jit(functools.partial(objectives.group_advantages, epsilon=objective.advantage_epsilon))
    random, seconds = np.random.default_rng(0), []
    for step in range(steps):
        started = time.perf_counter()
        part = [problems[(step * PROMPTS + i) % len(problems)] for i in range(PROMPTS)]
        prompts = [builder.build(problem) for problem in part]
        groups = engine.generate(prompts, Sampling(TOKENS), GROUP, step)
        sampled = time.perf_counter()
        rewards = random.random((PROMPTS, GROUP), np.float32)
        graded = zip(prompts, groups, np.asarray(advantages(rewards)), strict=True)
        items = [sampled_item(*group, objective.mask_truncated) for group in graded]
        jax.device_get(trainer.step(minibatches(items, layout, config), layout.old, [1e-6]))
        engine.update_weights(trainer.parameters(), step)
        done = time.perf_counter()
        seconds.append({"step": done - started, "rollout": sampled - started, "update": done - sampled})
        assert all(len(sample.tokens) == TOKENS for group in groups for sample in group)
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
        checkpoint, problems = write_checkpoint(Path(directory), problems=256)
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
        mine, peer = (statistics.median(values) for values in sides.values())
        print(f"{faster(mine, peer)} than TRL: {mine:.2f} s against {peer:.2f} s")
        measures = ("capcur_jax/learner/**", "capcur_jax/models/**", "capcur_jax/rollout/local/**")
        record.write({"seconds": [mine, peer]}, measures, versions={"trl": "1.16.0"})


if __name__ == "__main__":
    app.run(main)
