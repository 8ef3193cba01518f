"""A GRPO update on recorded responses: this project against TRL's GRPOTrainer, in time, memory, loss and gradient.

    python benchmarks/grpo_step.py --trl_python=PATH/TO/ENV/bin/python [--steps=5 --rounds=4]

Both sides get the same 3.3 M-parameter Qwen3-VL (written here), the same 16 questions with their images, the same 5
responses to each of 12 to 48 random tokens that end with the end token, and the same rewards. Each side is a fresh
process with two threads, in float32; they take turns, a round of --steps steps each, and the first round is left out.

A step is what follows grading: reference pass, old log-probs where there are several updates, loss, gradient, clip,
AdamW. TRL's time leaves out its tokenising, image processing, rewards and collating, ours counts packing. Choices
that both sides have are the same: plain k3 KL to a reference with other weights than the policy's, clip 0.2 / 0.3
without a dual one, mean over all tokens of an update, advantages by the group's standard deviation + 1e-4, no banned
tokens, no weight decay. The objectives then coincide: loss and gradient norm of the first updates are compared.
TRL has the micro-batches that were fastest on two cores (--trl_rows) and recomputes activations, its default.

The environment of --trl_python needs trl==1.16.0, torch, torchvision, accelerate, datasets and pillow.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import record
from absl import app, flags
from comparison import faster
from flax import nnx
from ml_collections import ConfigDict
from step_inputs import GROUP, PROMPTS, TOKENS, open_stage, save_weights, settings, write_checkpoint

from capcur_jax import policy
from capcur_jax.data.problem import Problem
from capcur_jax.data.prompts import PromptBuilder
from capcur_jax.learner import objectives, packing
from capcur_jax.learner.minibatches import minibatches, sampled_item
from capcur_jax.models import huggingface
from capcur_jax.models.batching import PromptSize
from capcur_jax.models.inputs import Processor
from capcur_jax.models.vision import pixel_values
from capcur_jax.rollout.engine import Sample

_TRL = flags.DEFINE_string("trl_python", "", "Python of an environment with TRL; empty: our side alone.")
_CASES = flags.DEFINE_list("cases", ["policy", "kl", "four_updates"], "Which of them.")
_STEPS = flags.DEFINE_integer("steps", 5, "Steps in a round.")
_ROUNDS = flags.DEFINE_integer("rounds", 4, "Rounds that count, after one that warms up.")
_ROWS = flags.DEFINE_integer("trl_rows", 20, "Sequences in TRL's micro-batches.")
_CHECKPOINTING = flags.DEFINE_bool("trl_checkpointing", True, "TRL computes activations again backwards, its default.")
_ROW = flags.DEFINE_integer("row", 0, "Ours: tokens of a packed row; 0: the preset's.")
_SERVE = flags.DEFINE_string("serve", "", "Our side of one case, for the process that compares.")
CASES = {  # of each: the KL's coefficient, updates on one set of responses
    "policy": {"beta": 0.0, "updates": 1},
    "kl": {"beta": 0.04, "updates": 1},
    "four_updates": {"beta": 0.04, "updates": 4},  # as in the paper: a mini-batch is a quarter, ratios leave 1
}
THREADS = 2


# ---------------------------------------------------------------------- what both sides get


def write_inputs(directory: Path) -> dict[str, Any]:
    """Checkpoint, reference, rows and patches on disk; returns the record that the cases share."""
    checkpoint, problems = write_checkpoint(directory, PROMPTS)
    save_weights(directory / "reference", checkpoint, seed=0, noise=0.05)
    processor = Processor.from_directory(checkpoint)
    builder = PromptBuilder(processor, "suffix", 96, 64)
    prompts = [builder.build(problem) for problem in problems]
    patches = np.stack([prompt.patches for prompt in prompts])
    np.save(directory / "patches.npy", pixel_values(patches, processor.config.vision))
    random, end = np.random.default_rng(0), processor.end_tokens[0]
    low, high = 10, len(processor.tokenizer)  # behind the special tokens
    # Where there are several updates TRL divides each by the mean of their tokens, this project by its own: the
    # quarters get the same lengths, each in its own order.
    quarter = random.integers(12, TOKENS + 1, PROMPTS * GROUP // 4)
    lengths = np.concatenate([random.permutation(quarter) for _ in range(4)])
    return {
        "checkpoint": str(checkpoint),
        "reference": str(directory / "reference"),
        "rows": str(directory / "rows.jsonl"),
        "problems": [[p.id, p.problem, p.answer, p.images] for p in problems],
        "patches": str(directory / "patches.npy"),
        "prompts": [prompt.tokens.tolist() for prompt in prompts],
        "completions": [[*random.integers(low, high, n - 1).tolist(), end] for n in lengths],
        "rewards": random.random(PROMPTS * GROUP).tolist(),
        "learning_rate": 1e-4, "weight_decay": 0.0, "beta1": 0.9, "beta2": 0.999, "epsilon": 1e-8,
        "max_gradient_norm": 1.0, "clip_low": 0.2, "clip_high": 0.3, "row": _ROW.value,
    }  # fmt: skip


def configured(record: dict[str, Any]) -> ConfigDict:
    """The laptop preset with what TRL has otherwise."""
    config = settings()
    config.objective.update(
        {
            "kl_coefficient": record["beta"], "clip_low": record["clip_low"], "clip_high": record["clip_high"],
            "clip_dual": 0.0, "advantage_epsilon": 1e-4, "updates_per_batch": record["updates"],
        }
    )  # fmt: skip
    if record["row"]:
        config.packing.shapes = tuple(sorted({(record["row"], *patches) for _, *patches in config.packing.shapes}))
    for key in ("weight_decay", "beta1", "beta2", "epsilon", "max_gradient_norm"):
        config.optimizer[key] = record[key]
    return config


# ---------------------------------------------------------------------- our side


def resident(field: str) -> float:
    """MiB of this process: VmRSS now, VmHWM at most (getrusage's would count the parent's before the exec)."""
    with open("/proc/self/status", encoding="ascii") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(field)) / 1024


def serve(path: str) -> None:
    """A round of steps for every line on standard input; JSON lines as trl_step.py prints them."""
    with open(path, encoding="utf-8") as file:
        record = json.load(file)
    config = configured(record)
    processor = Processor.from_directory(record["checkpoint"])
    model = huggingface.load(record["checkpoint"], remat=policy.remat(config))
    processor.banned_tokens = ()  # TRL has none
    row = config.prompt.patch_buckets[-1][1]
    builder = PromptBuilder(processor, config.prompt.instruction, config.prompt.max_tokens, row)
    prompts = [builder.build(Problem(*problem)) for problem in record["problems"]]
    reference = nnx.state(huggingface.load(record["reference"])) if record["beta"] else None
    layout, trainer = open_stage(config, model, processor, [PromptSize.of(p) for p in prompts], reference)
    del model, reference
    print(json.dumps({"loaded": resident("VmRSS")}), flush=True)
    tokens = [np.array(ids, np.int32) for ids in record["completions"]]
    samples = [Sample.whole(ids, np.zeros(len(ids), np.float32), "stop", 0) for ids in tokens]
    rewards = np.array(record["rewards"], np.float32).reshape(PROMPTS, GROUP)
    advantages = np.asarray(objectives.group_advantages(rewards, config.objective.advantage_epsilon))
    items = [
        sampled_item(prompt, samples[i * GROUP : (i + 1) * GROUP], advantages[i], config.objective.mask_truncated)
        for i, prompt in enumerate(prompts)
    ]
    for _ in sys.stdin:
        for _ in range(_STEPS.value):
            started = time.perf_counter()
            batched = minibatches(items, layout, config)
            rates = [record["learning_rate"]] * layout.updates
            results = jax.device_get(trainer.step(batched, layout.old, rates))
            done = {"seconds": time.perf_counter() - started}
            done["losses"], done["norms"] = ([float(r[name]) for r in results] for name in ("loss", "grad_norm"))
            print(json.dumps(done), flush=True)
        counts = sum(micro.slots() for mini in batched for micro in mini)
        print(json.dumps({"peak": resident("VmHWM"), **packing.shares(counts)}), flush=True)


# ---------------------------------------------------------------------- both in turns


class Side:
    """A process that does rounds of steps when it is told to."""

    def __init__(self, command: list[str], errors: Path):
        self._errors = errors
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        with open(errors, "w", encoding="utf-8") as file:
            self._process = subprocess.Popen(command, **pipes, stderr=file)
        self.steps: list[dict] = []
        self.facts = self._next("loaded")

    def _next(self, key: str) -> dict:
        """The next line that has it (libraries print, too)."""
        for line in self._process.stdout:
            if line.startswith(f'{{"{key}"'):
                return json.loads(line)
        sys.exit(f"{self._process.args[:2]} failed:\n{self._errors.read_text(encoding='utf-8')[-3000:]}")

    def round(self) -> None:
        self._process.stdin.write("go\n")
        self._process.stdin.flush()
        self.steps += [self._next("seconds") for _ in range(_STEPS.value)]
        self.facts |= self._next("peak")

    def close(self) -> None:
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()

    def seconds(self) -> list[float]:
        return [step["seconds"] for step in self.steps[_STEPS.value :]]


def compare(name: str, record: dict[str, Any], directory: Path) -> dict[str, Any]:
    """All rounds of one case, and their results."""
    record, path = record | CASES[name], directory / f"{name}.json"
    path.write_text(json.dumps(record), encoding="utf-8")
    steps = f"--steps={_STEPS.value}"
    commands = {"capcur_jax": [sys.executable, __file__, f"--serve={path}", steps]}
    if _TRL.value:
        script = str(Path(__file__).with_name("trl_step.py"))
        files = [f"--checkpoint={record['checkpoint']}", f"--rows={record['rows']}", f"--recorded={path}"]
        kinds = [f"--micro_rows={_ROWS.value}", f"--checkpointing={int(_CHECKPOINTING.value)}"]
        amounts = [steps, f"--rounds={_ROUNDS.value + 1}", f"--threads={THREADS}"]
        commands["TRL"] = [_TRL.value, script, *files, *kinds, *amounts]
    with contextlib.ExitStack() as closing:
        sides = {}
        for side, command in commands.items():
            sides[side] = Side(command, directory / f"{name}-{side}.err")
            closing.callback(sides[side].close)
        for _ in range(_ROUNDS.value + 1):
            for side in sides.values():
                side.round()
    responses = sum(map(len, record["completions"]))
    tokens = {"response": responses, "all": responses + GROUP * sum(map(len, record["prompts"]))}
    return {
        "case": name,
        **CASES[name],
        "row": _ROW.value,
        "tokens": tokens,
        "sides": {s: summary(v, tokens) for s, v in sides.items()},
    }


def summary(side: Side, tokens: dict[str, int]) -> dict[str, Any]:
    seconds = side.seconds()
    median = statistics.median(seconds)
    first, whole = side.steps[0], [step["whole"] for step in side.steps[_STEPS.value :] if "whole" in step]
    return {
        **({"seconds_with_preparation": statistics.median(whole)} if whole else {}),
        "seconds": {"median": median, "min": min(seconds), "max": max(seconds), "n": len(seconds)},
        "tokens_per_second": {kind: n / median for kind, n in tokens.items()},
        "mib": {"loaded": side.facts.pop("loaded"), "peak": side.facts.pop("peak")},
        "losses": first["losses"],
        "norms": first["norms"],
        **side.facts,
    }


def apart(a: float, b: float) -> float:
    """Relative difference."""
    return abs(a - b) / max(abs(a), abs(b), 1e-30)


def show(result: dict[str, Any]) -> None:
    sides = result["sides"]
    print(
        f"\n{result['case']}: KL coefficient {result['beta']}, {result['updates']} update(s) a step, {result['tokens']}"
    )
    for name, side in sides.items():
        s, t, m = side["seconds"], side["tokens_per_second"], side["mib"]
        print(
            f"  {name:<10} s a step: median {s['median']:.3f} min {s['min']:.3f} max {s['max']:.3f} of {s['n']};  "
            f"tokens/s: response {t['response']:.0f}, all {t['all']:.0f};  "
            f"MiB: peak {m['peak']:.0f}, before the first step {m['loaded']:.0f}"
        )
    ours = sides["capcur_jax"]
    print(f"  ours: real tokens against full sequences {ours['packing']:.3f}, padding {ours['token_padding']:.3f}")
    if len(sides) < 2:
        return
    peer = sides["TRL"]
    result["speedup"] = peer["seconds"]["median"] / ours["seconds"]["median"]
    result["peak_ratio"] = ours["mib"]["peak"] / peer["mib"]["peak"]
    result["difference"] = {k: [*map(apart, ours[k], peer[k])] for k in ("losses", "norms")}
    seconds, peaks = (
        [side["seconds"]["median"] for side in (ours, peer)],
        [side["mib"]["peak"] for side in (ours, peer)],
    )
    print(f"  {faster(*seconds)} than TRL: {seconds[0]:.2f} s against {seconds[1]:.2f} s")
    print(f"  peak memory {peaks[0]:.0f} MiB against {peaks[1]:.0f} MiB")
    for what, key in (("loss", "losses"), ("gradient norm", "norms")):
        for number, (a, b) in enumerate(zip(ours[key], peer[key], strict=True), 1):
            print(f"  update {number}: {what} {a:.7g} against {b:.7g}, relative difference {apart(a, b):.1e}")
    print(f"  TRL's step with its tokenising, images and collating: median {peer['seconds_with_preparation']:.3f} s")
    print(f"  largest difference of a pixel {peer['pixels']:.1e}")


def kept(result: dict[str, Any]) -> dict[str, Any]:
    """Of a case what the pages show: both sides' medians, peaks and how far apart loss and gradient norm are."""
    sides = [result["sides"][name] for name in ("capcur_jax", "TRL")]
    seconds = [side["seconds"]["median"] for side in sides]
    return {
        "seconds": seconds,
        "speedup": seconds[1] / seconds[0],
        "peak_gib": [side["mib"]["peak"] / 1024 for side in sides],
        "difference": max(one for values in result["difference"].values() for one in values),
    }


def main(_) -> None:
    if _SERVE.value:
        serve(_SERVE.value)
        return
    if unknown := set(_CASES.value) - set(CASES):
        sys.exit(f"--cases: no {', '.join(sorted(unknown))}; there are {', '.join(CASES)}")
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:THREADS])  # inherited by both sides
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    results = []
    with tempfile.TemporaryDirectory() as directory:
        inputs = write_inputs(Path(directory))
        for name in _CASES.value:
            results.append(compare(name, inputs, Path(directory)))
            show(results[-1])
    line = json.dumps({"benchmark": "grpo_step", "jax": jax.__version__, "cases": results})
    print(line)
    record.write(
        {"cases": {result["case"]: kept(result) for result in results}},
        measures=("capcur_jax/learner/**", "capcur_jax/models/**"),
        versions={"trl": "1.16.0"},
    )


if __name__ == "__main__":
    app.run(main)
