"""Tokens/s of rollouts in one run: the local engine against transformers' generate, and SGLang's CPU server.

    python benchmarks/rollout.py [--rounds=3] [--sglang_python=PATH/TO/ENV/bin/python]

All sides have the shipped checkpoint, the same prompts from the laptop preset's own sets, float32, all cores, no vision
placeholders sampled; prompts are prepared and programs compiled beforehand. The loads:

    fixed    16 questions about images x 5 responses of 48 tokens, none ends earlier; transformers: one batch of 80
    greedy   400 prompts, two thirds with an image, a response each up to its end or 96 tokens, over 80 places;
             transformers: 5 batches of 80 as they come. Both give the same tokens but for ties
    varied   the same at --temperature, where lengths vary strongly: greedy ones have 12 to 32 tokens

The sides take turns and the median of --rounds counts; SGLang's server starts when the two others are done, so that it
takes no core from them. CPU seconds, of all cores together, tell apart what a side computed and what else the machine
did. Goals: 2 x transformers at the fixed length, 3 x for the 400 requests.
"""

from __future__ import annotations

import os

import record

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: idle threads that spin take the cores from JAX

import copy
import dataclasses
import importlib.metadata
import json
import logging
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np
import torch
from absl import app, flags
from flax import nnx
from transformers import AutoModelForImageTextToText
from transformers.utils import logging as transformers_logging

from capcur_jax import presets
from capcur_jax.data.prompts import PromptBuilder
from capcur_jax.data.sets import Sets
from capcur_jax.models import huggingface
from capcur_jax.models.batching import Buckets, PromptSize, rounded_up
from capcur_jax.models.inputs import Processor, Prompt
from capcur_jax.models.vision import pixel_values
from capcur_jax.rollout.engine import Engine, Sampling
from capcur_jax.rollout.local.engine import LocalEngine

_ROUNDS = flags.DEFINE_integer("rounds", 3, "How often the sides take turns; the median counts.")
_CASES = flags.DEFINE_list("cases", ["fixed", "greedy", "varied"], "Which loads.")
_TEMPERATURE = flags.DEFINE_float("temperature", 2.4, "Of the load `varied`.")
_PREFILL = flags.DEFINE_integer("prefill", 16, "Prompts that the local engine takes at once, in the loads of 400.")
_SGLANG = flags.DEFINE_string("sglang_python", "", "Python of SGLang's environment; empty: without SGLang.")
_SLOTS = 80
GOALS = {"fixed": 4.0, "greedy": 3.2, "varied": 4.0}

Responses = list[np.ndarray]  # tokens, the end token included
Side = Callable[[int], Responses]  # by seed


@dataclasses.dataclass(frozen=True)
class Load:
    """What is asked of every side."""

    prompts: list[Prompt]
    n: int
    sampling: Sampling
    processor: Processor
    prefill: int

    @property
    def rows(self) -> list[Prompt]:
        return [prompt for prompt in self.prompts for _ in range(self.n)]


def make_prompts(directory: Path, processor: Processor, name: str, count: int) -> list[Prompt]:
    """Questions of a set of the laptop preset, one row after the other."""
    config = presets.get("laptop")
    prompt = config.prompt
    builder = PromptBuilder(processor, prompt.instruction, prompt.max_tokens, prompt.patch_buckets[-1][1])
    problems = Sets(config.data, directory).drawn(name, "train", 2 * count)
    built = [found for found in map(builder.try_build, problems) if found is not None]
    return built[:count]


def make_loads(directory: Path, processor: Processor) -> dict[str, Load]:
    endless = copy.copy(processor)  # no end: the ends are banned, and what counts as one is banned anyway
    endless.end_tokens = processor.banned_tokens[:1]
    endless.banned_tokens = processor.banned_tokens + processor.end_tokens
    each = {name: make_prompts(directory, processor, name, 134) for name in presets.CAPABILITIES}
    mixed = [prompt for turn in zip(*each.values(), strict=True) for prompt in turn][:400]
    return {
        "fixed": Load(each["perception"][:16], 5, Sampling(48), endless, prefill=16),
        "greedy": Load(mixed, 1, Sampling(96, temperature=0), processor, _PREFILL.value),
        "varied": Load(mixed, 1, Sampling(96, temperature=_TEMPERATURE.value), processor, _PREFILL.value),
    }


def flat(groups: Sequence[Sequence]) -> Responses:
    return [sample.tokens for group in groups for sample in group]


def local(load: Load) -> Side:
    """The engine as a run has it, its programs compiled."""
    prompt, sizes = presets.get("laptop").prompt, [PromptSize.of(prompt) for prompt in load.prompts]
    longest = rounded_up(max(size.tokens for size in sizes), 8)  # the cache holds so many, and a response
    buckets = Buckets(prompt.token_buckets, ((2, 64), (8, 64), (16, 64)), longest=longest)
    model = huggingface.load(presets.TINY_CHECKPOINT)
    engine = LocalEngine(model, load.processor, slots=_SLOTS, buckets=buckets, prefill=load.prefill)
    engine.warm_up(sizes, load.sampling, load.n)
    return answering(engine, load)


def answering(engine: Engine, load: Load) -> Side:
    return lambda seed: flat(engine.generate(load.prompts, load.sampling, load.n, seed))


def transformers(load: Load) -> Side:
    """`generate` on batches of 80 rows, padded on the left, with its default cache and attention."""
    model = AutoModelForImageTextToText.from_pretrained(presets.TINY_CHECKPOINT, dtype=torch.float32).eval()
    ends, banned = load.processor.end_tokens, load.processor.banned_tokens
    endless = set(ends) <= set(banned)
    model.generation_config.eos_token_id = None if endless else list(ends)
    kinds = {"max_new_tokens": load.sampling.max_new_tokens, "suppress_tokens": list(banned), "do_sample": False}
    if load.sampling.temperature:
        kinds |= {"do_sample": True, "temperature": load.sampling.temperature, "top_k": 0, "top_p": 1.0}
    batches = [padded(load.rows[at : at + _SLOTS], load.processor) for at in range(0, len(load.rows), _SLOTS)]

    def generate(seed: int) -> Responses:
        torch.manual_seed(seed)
        found = []
        for batch in batches:
            with torch.inference_mode():
                whole = model.generate(**batch, **kinds).numpy()
            for tokens in whole[:, batch["input_ids"].shape[1] :]:
                at = np.flatnonzero(np.isin(tokens, ends))
                found.append(tokens[: at[0] + 1] if len(at) else tokens)
        return found

    return generate


def padded(prompts: Sequence[Prompt], processor: Processor) -> dict[str, torch.Tensor]:
    """A batch for transformers; every row brings its image, as its own processor has it."""
    longest = max(map(len, prompts))
    tokens = np.full((len(prompts), longest), processor.pad_token, np.int64)
    mask = np.zeros_like(tokens)
    for row, prompt in enumerate(prompts):
        tokens[row, longest - len(prompt) :] = prompt.tokens
        mask[row, longest - len(prompt) :] = 1
    arrays = {"input_ids": tokens, "attention_mask": mask}
    arrays["mm_token_type_ids"] = (tokens == processor.config.image_token).astype(np.int64)
    if any(prompt.grids for prompt in prompts):
        patches = np.concatenate([prompt.patches for prompt in prompts])
        arrays["pixel_values"] = np.array(pixel_values(patches, processor.config.vision))
        arrays["image_grid_thw"] = np.array([grid for prompt in prompts for grid in prompt.grids], np.int64)
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def sglang(directory: Path, processor: Processor) -> Engine:
    """The server, with the same weights and as many places; `processor` says what ends a response, at every call."""
    from capcur_jax.rollout.sglang.engine import SGLangEngine
    from capcur_jax.rollout.sglang.settings import Settings

    flags = ("--max-running-requests", str(_SLOTS), "--max-total-tokens", "32768", "--context-length", "1024")
    settings = Settings(
        python=_SGLANG.value, device="cpu", dtype="float32", memory_fraction=0.3, concurrency=_SLOTS, arguments=flags,
        environment=("TORCHDYNAMO_DISABLE=1",),
    )  # fmt: skip
    engine = SGLangEngine(processor, presets.TINY_CHECKPOINT, directory, settings)
    engine.update_weights(nnx.state(huggingface.load(presets.TINY_CHECKPOINT)), 0)
    return engine


def timed(side: Side, seed: int) -> tuple[float, float, Responses]:
    """Wall and CPU seconds, and what came."""
    started, used = time.perf_counter(), time.process_time()
    responses = side(seed)
    return time.perf_counter() - started, time.process_time() - used, responses


def measure(sides: dict[str, Side], load: Load) -> dict[str, dict]:
    """Each side's rounds, taken in turns after one that doesn't count; which side begins alternates."""
    runs: dict[str, list] = {name: [] for name in sides}
    for turn in range(_ROUNDS.value + 1):
        for name in list(sides)[:: 1 if turn % 2 else -1]:
            runs[name].append(timed(sides[name], turn))
    result = {}
    for name, done in runs.items():
        lengths = np.array([len(response) for *_, responses in done[1:] for response in responses])
        assert len(lengths) == _ROUNDS.value * len(load.rows)
        if set(load.processor.end_tokens) <= set(load.processor.banned_tokens):
            assert (lengths == load.sampling.max_new_tokens).all(), "a response of another length than all have"
        rates = [sum(map(len, responses)) / seconds for seconds, _, responses in done[1:]]
        result[name] = {
            "tokens_per_s": statistics.median(rates),
            "rounds": rates,
            "seconds": statistics.median(seconds for seconds, *_ in done[1:]),
            "cpu_seconds": None if name == "sglang" else statistics.median(used for _, used, _ in done[1:]),
            "lengths": {q: float(np.quantile(lengths, float(q))) for q in ("0", "0.1", "0.5", "0.9", "1")},
            "mean_length": float(lengths.mean()),
            "responses": [response.tolist() for response in done[-1][2]],
        }
    return result


def versions() -> dict[str, str]:
    found = {name: importlib.metadata.version(name) for name in ("jax", "torch", "transformers")}
    if _SGLANG.value:
        line = "import importlib.metadata as m; print(*(m.version(n) for n in ('sglang', 'torch', 'transformers')))"
        said = subprocess.run([_SGLANG.value, "-c", line], capture_output=True, text=True, check=True).stdout.split()
        found |= dict(zip(("sglang", "sglang's torch", "sglang's transformers"), said, strict=True))
    return found


def show(case: str, load: Load, sides: dict[str, dict]) -> dict[str, float | None]:
    """Prints a load's rows; returns ratios and the share of greedy responses that are transformers' own."""
    said: dict[str, float | None] = {}
    base = sides["transformers"]
    print(f"\n{case}: {len(load.prompts)} prompts x {load.n}, temperature {load.sampling.temperature:g}")
    print(f"{'':14}{'tokens/s':>10}{'seconds':>9}{'CPU':>7}{'ratio':>7}   length min/10%/median/90%/max, mean")
    for name, side in sides.items():
        ratio = side["tokens_per_s"] / base["tokens_per_s"]
        spread = "/".join(f"{length:.0f}" for length in side["lengths"].values())
        line = f"{name:14}{side['tokens_per_s']:10.0f}{side['seconds']:9.2f}"
        line += f"{side['cpu_seconds']:7.2f}" if side["cpu_seconds"] else f"{'':7}"
        line += f"{ratio:7.2f}   {spread}, {side['mean_length']:.1f}"
        if side is not base:
            said[f"{name} / transformers"] = ratio
        if name == "local":
            line += f"   goal {GOALS[case]:g}: {'met' if ratio >= GOALS[case] else 'MISSED'}"
        if load.sampling.temperature == 0 and side is not base:
            equal = np.mean([a == b for a, b in zip(side["responses"], base["responses"], strict=True)])
            said[f"{name}, equal responses"] = float(equal)
            line += f"   {equal:.1%} of responses equal"
        print(line, flush=True)
    return said


def kept(sides: dict[str, dict]) -> dict[str, float]:
    """Of a load what the pages show: every side's tokens/s and the lengths of our responses."""
    ours = sides["local"]
    lengths = {"shortest": int(ours["lengths"]["0"]), "longest": int(ours["lengths"]["1"]), "mean": ours["mean_length"]}
    return {name: side["tokens_per_s"] for name, side in sides.items()} | lengths


def main(_) -> None:
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("httpx2").setLevel(logging.WARNING)  # a line for every request
    cores = len(os.sched_getaffinity(0))
    torch.set_num_threads(cores)
    jax.config.update("jax_platforms", "cpu")
    processor, results = Processor.from_directory(presets.TINY_CHECKPOINT), {}
    busy = [os.getloadavg()]
    with tempfile.TemporaryDirectory() as directory:
        loads = {k: load for k, load in make_loads(Path(directory) / "data", processor).items() if k in _CASES.value}
        for case, load in loads.items():
            results[case] = measure({"local": local(load), "transformers": transformers(load)}, load)
            busy.append(os.getloadavg())
        if _SGLANG.value:
            served = copy.copy(processor)
            engine = sglang(Path(directory) / "sglang", served)
            try:
                for case, load in loads.items():
                    served.end_tokens, served.banned_tokens = load.processor.end_tokens, load.processor.banned_tokens
                    results[case] |= measure({"sglang": answering(engine, load)}, load)
                    busy.append(os.getloadavg())
            finally:
                engine.close()
        else:
            print("without SGLang: no --sglang_python")
    ratios = {case: show(case, loads[case], sides) for case, sides in results.items()}
    for side in (side for sides in results.values() for side in sides.values()):
        del side["responses"]
    loadavg = [round(one[0], 1) for one in busy]
    said = {"benchmark": "rollout", "versions": versions(), "cores": cores, "load_averages": loadavg}
    print("\n" + json.dumps(said | {"ratios": ratios, "results": results}))
    measures = ("capcur_jax/rollout/local/**", "capcur_jax/models/**")
    record.write({"loads": {case: kept(sides) for case, sides in results.items()}, "temperature": _TEMPERATURE.value},
                 measures, versions=versions())  # fmt: skip


if __name__ == "__main__":
    app.run(main)
