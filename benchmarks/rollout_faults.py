"""200 prompts through SGLang's CPU servers while one after the other is killed: does every group arrive, once?

    python benchmarks/rollout_faults.py --sglang_python=PATH/TO/ENV/bin/python [--every=20]

Two servers on this machine with the shipped checkpoint in float32, given weights that differ from it (version 1). Every
--every seconds the servers take turns at being killed (-9, the whole group of processes) with requests under way. A
server is killed again only after it has answered something since its start: else one that takes longer than --every to
come back could never answer. All responses have --tokens tokens. Every response's log-probs are then compared
with those that the trainer's model gives to its tokens after its prompt.

Exits with 1 unless every group arrived with all its responses, none of them twice, all of the current version, with
log-probs within 1e-3 of the trainer's; and unless servers were killed at least three times.
"""

from __future__ import annotations

import copy
import json
import logging
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
import record
from absl import app, flags
from flax import nnx

from capcur_jax import presets
from capcur_jax.data.prompts import PromptBuilder
from capcur_jax.data.sets import Sets
from capcur_jax.models import huggingface
from capcur_jax.models.batching import Buckets
from capcur_jax.models.inputs import Processor, Prompt
from capcur_jax.models.logprobs import ban
from capcur_jax.models.packed_rows import RowShape
from capcur_jax.models.qwen_vl import QwenVL
from capcur_jax.rollout.engine import Sample, Sampling
from capcur_jax.rollout.sglang.engine import SGLangEngine
from capcur_jax.rollout.sglang.member import Server
from capcur_jax.rollout.sglang.settings import Settings

_SGLANG = flags.DEFINE_string("sglang_python", None, "Python of SGLang's environment.", required=True)
_PROMPTS = flags.DEFINE_integer("prompts", 200, "Prompts.")
_RESPONSES = flags.DEFINE_integer("n", 2, "Responses of each.")
_TOKENS = flags.DEFINE_integer("tokens", 256, "Of every response.")
_EVERY = flags.DEFINE_float("every", 20.0, "Seconds between kills.")
_CONCURRENCY = flags.DEFINE_integer("concurrency", 8, "Prompts in flight on a server.")
_CLOSE = 1e-3  # nats
_KILLS = 3  # fewer prove nothing


class Killer(threading.Thread):
    """Kills one server after the other until told to end."""

    def __init__(self, servers: Sequence[Server], every: float):
        super().__init__(daemon=True)
        self.servers, self.every, self.over = servers, every, threading.Event()
        self.kills: list[dict] = []

    def run(self) -> None:
        begun = time.monotonic()
        due, number = begun + self.every, 0
        while not self.over.wait(0.1):
            if time.monotonic() < due:
                continue
            for other in range(len(self.servers)):  # who has its turn, or else who can be
                victim = self.servers[(number + other) % len(self.servers)]
                if victim.up and victim.calls and not victim.failures:
                    break
            else:
                continue
            at = time.monotonic()
            self.kills.append({"seconds": at - begun, "server": victim.process.name, "requests": len(victim.calls)})
            os.killpg(victim.process.group, signal.SIGKILL)
            victim.failures = 1  # as after its fall, which is seen in a moment
            due, number = at + self.every, self.servers.index(victim) + 1


def make_prompts(directory: Path, processor: Processor, count: int) -> list[Prompt]:
    """Questions with and without images by turns, all different."""
    config = presets.get("laptop")
    prompt, sets = config.prompt, Sets(config.data, directory)
    builder = PromptBuilder(processor, prompt.instruction, prompt.max_tokens, prompt.patch_buckets[-1][1])
    each = [sets.drawn(name, "train", count) for name in presets.CAPABILITIES]
    problems = [problem for turn in zip(*each, strict=True) for problem in turn]
    return [prompt for prompt in map(builder.try_build, problems[: 2 * count]) if prompt is not None][:count]


def moved(parameters: nnx.State, scale: float = 0.02) -> nnx.State:
    """Weights that nobody has who was not sent them."""
    random = np.random.default_rng(1)
    noise = lambda leaf: leaf + scale * leaf.std() * random.standard_normal(leaf.shape).astype(np.float32)  # noqa: E731
    return jax.tree.map(noise, parameters)


@nnx.jit(static_argnums=2)
def _logits(model: QwenVL, batch, banned: tuple[int, ...]) -> jax.Array:
    return ban(model.logits(model.prefill(batch)[0]), banned)


def differences(
    model: QwenVL, processor: Processor, prompts: Sequence[Prompt], groups: Sequence[Sequence[Sample]]
) -> np.ndarray:
    """Of every response the largest difference of a log-prob to the trainer's (temperature 1)."""
    rows = [(prompt, sample) for prompt, group in zip(prompts, groups, strict=True) for sample in group]
    longest, found = max(map(len, prompts)) + _TOKENS.value, []
    shape = RowShape(8 * longest, 8, max(64, *(len(prompt.patches) for prompt in prompts)))
    buckets = Buckets((shape.length,), ((shape.patch_rows, shape.patches),), longest=longest)
    for at in range(0, len(rows), 8):
        part = rows[at : at + 8]
        whole = [extended(prompt, sample.tokens) for prompt, sample in part]
        batch = buckets.collate([whole], shape, 8, processor.config, processor.pad_token)
        logprobs = np.asarray(jax.nn.log_softmax(_logits(model, batch, processor.banned_tokens)), np.float64)[0]
        for start, (prompt, sample) in zip(batch.places.prompt_start[0], part, strict=False):
            t, first = len(sample.tokens), start + len(prompt) - 1
            own = logprobs[first : first + t][np.arange(t), sample.tokens]
            found.append(np.abs(own - sample.logprobs).max())
    return np.array(found)


def extended(prompt: Prompt, tokens: np.ndarray) -> Prompt:
    """The prompt with a response after it."""
    t = len(tokens)
    following = np.broadcast_to(prompt.next_position + np.arange(t), (3, t))
    return Prompt(
        np.concatenate([prompt.tokens, tokens]).astype(np.int32),
        np.concatenate([prompt.positions, following], 1).astype(np.int32),
        prompt.next_position + t,
        np.concatenate([prompt.visual_index, np.full(t, -1)]).astype(np.int32),
        prompt.patches,
        prompt.grids,
    )


def settings() -> Settings:
    """Servers that may take minutes to come back, and enough retries of a prompt for that."""
    room = str(2 * _CONCURRENCY.value * _RESPONSES.value * (_TOKENS.value + 128))
    running = str(_CONCURRENCY.value * _RESPONSES.value)
    return Settings(
        python=_SGLANG.value, device="cpu", dtype="float32", servers=2, memory_fraction=0.3,
        concurrency=_CONCURRENCY.value, retries=50, restarts=5, start_timeout_s=600, request_timeout_s=300,
        update_timeout_s=120, environment=("TORCHDYNAMO_DISABLE=1",),
        arguments=("--max-total-tokens", room, "--max-running-requests", running, "--context-length", "2048"),
    )  # fmt: skip


def run(directory: Path) -> dict:
    jax.config.update("jax_platforms", "cpu")
    endless = copy.copy(Processor.from_directory(presets.TINY_CHECKPOINT))
    endless.banned_tokens, endless.end_tokens = endless.banned_tokens + endless.end_tokens, endless.banned_tokens[:1]
    prompts = make_prompts(directory / "data", endless, _PROMPTS.value)
    graph, parameters = nnx.split(huggingface.load(presets.TINY_CHECKPOINT))
    engine = SGLangEngine(endless, presets.TINY_CHECKPOINT, directory, settings())
    try:
        engine.update_weights(parameters, 0)
        parameters = moved(parameters)
        engine.update_weights(parameters, 1)
        sampling, load = Sampling(_TOKENS.value), os.getloadavg()[0]
        killer, started = Killer(engine._fleet.servers, _EVERY.value), time.monotonic()
        killer.start()
        groups = engine.generate(prompts, sampling, _RESPONSES.value, 0)
        seconds = time.monotonic() - started
        killer.over.set()
        killer.join()
        counters = engine.counters()
    finally:
        engine.close()
    samples = [sample for group in groups for sample in group]
    apart = differences(nnx.merge(graph, parameters), endless, prompts, groups)
    return {
        "groups": sum(len(group) == _RESPONSES.value for group in groups),
        "asked": len(prompts),
        "responses": len(samples),
        "duplicates": len(samples) - len({(s.tokens.tobytes(), s.logprobs.tobytes()) for s in samples}),
        "of another length": sum(len(sample.tokens) != _TOKENS.value for sample in samples),
        "of another version": sum({span.version for span in sample.spans} != {1} for sample in samples),
        "largest log-prob difference": float(apart.max()),
        "kills": len(killer.kills),
        "requests cut off": sum(kill["requests"] for kill in killer.kills),
        "seconds": seconds,
        "tokens_per_s": sum(len(sample.tokens) for sample in samples) / seconds,
        **counters,
        "load_averages": [load, os.getloadavg()[0]],
        "killed": killer.kills,
    }


def main(_) -> None:
    logging.getLogger("httpx2").setLevel(logging.WARNING)  # a line for every request
    with tempfile.TemporaryDirectory() as directory:
        found = run(Path(directory))
    for name, value in found.items():
        if not isinstance(value, list):
            print(f"{name:<30}{value:>12.4g}" if isinstance(value, float) else f"{name:<30}{value:>12}")
    print("\n" + json.dumps({"benchmark": "rollout_faults", **found}))
    wrong = [name for name in ("duplicates", "of another length", "of another version") if found[name]]
    wrong += ["groups"] if found["groups"] != found["asked"] or found["asked"] != _PROMPTS.value else []
    wrong += ["largest log-prob difference"] if not found["largest log-prob difference"] < _CLOSE else []
    wrong += ["kills: too few; raise --tokens"] if found["kills"] < _KILLS else []
    if wrong:
        print(f"FAILED: {', '.join(wrong)}")
        sys.exit(1)
    print("all groups arrived once")
    names = ("asked", "groups", "responses", "kills", "seconds", "retries", "requests cut off",
             "largest log-prob difference")  # fmt: skip
    figures = {name.replace("log-prob", "logprob").replace(" ", "_"): found[name] for name in names}
    record.write(figures, ("capcur_jax/rollout/sglang/**",))


if __name__ == "__main__":
    app.run(main)
