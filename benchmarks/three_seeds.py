"""The laptop run with three seeds, one after the other, and the mean gain of each capability.

    python benchmarks/three_seeds.py [--config=configs/staged.py] [--workdir=runs/three_seeds] [more flags of the run]

Prints a markdown table: base and final greedy accuracy of each seed, the mean gain in points, format reward, seconds.
Then one of each kind of question: greedy, and sampled at temperature 1. A base that samples right more rarely than it
answers greedily is unsure; one that samples right more often was only to be told to prefer it. A seed whose summary
lies there already is not run again, and questions are not asked again.

--record=three_seeds keeps the figures for the pages: the README, docs/figures.md, docs/quickstart.md and the card of
the base show them. `python docs/write.py` then writes them there.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from pathlib import Path

import record
from absl import app, flags

from capcur_jax.presets import CAPABILITIES, TINY_CHECKPOINT

_CONFIG = flags.DEFINE_string("config", "configs/staged.py", "The run's config.")
_WORKDIR = flags.DEFINE_string("workdir", "runs/three_seeds", "A folder for each seed goes here.")
_SEEDS = flags.DEFINE_list("seeds", ["0", "1", "2"], "Seeds to run.")


def run(seed: str, more: list[str]) -> dict:
    """The summary of one seed's run."""
    workdir = Path(_WORKDIR.value) / f"seed{seed}"
    summary = workdir / "summary.json"
    if not summary.is_file():
        command = [sys.executable, "-m", "capcur_jax.main", f"--config={_CONFIG.value}", f"--config.seed={seed}"]
        subprocess.run([*command, f"--workdir={workdir}", *more], check=True)
    return json.loads(summary.read_text(encoding="utf-8"))


def scores(name: str, checkpoint: str, temperature: float) -> dict[str, dict]:
    """By capability: its `score` and the share of right answers of each of its `kinds`, per cent."""
    workdir = Path(_WORKDIR.value) / "kinds" / f"{name}-{temperature:g}"
    command = [
        sys.executable,
        "-m",
        "capcur_jax.evaluate",
        f"--benchmarks={','.join(CAPABILITIES)}",
        f"--config={_CONFIG.value}",
    ]
    settings = [
        f"--checkpoint={checkpoint}",
        f"--temperature={temperature}",
        "--instruction=suffix",
        f"--workdir={workdir}",
    ]
    subprocess.run([*command, *settings], check=True, stdout=sys.stderr)
    found = json.loads((workdir / "scores.json").read_text(encoding="utf-8"))["benchmarks"]
    return {capability: found[capability]["official"] for capability in CAPABILITIES}


def flat(found: dict[str, dict]) -> dict[str, float]:
    return {kind: share for one in found.values() for kind, share in one["kinds"].items()}


def kinds(checkpoints: list[str]) -> dict:
    """Prints the table of kinds: the base, and the mean of what the seeds made of it. Returns what the pages show."""
    columns, base = {}, {}
    for shown, temperature in (("greedy", 0.0), ("sampled", 1.0)):
        base[shown] = scores("base", TINY_CHECKPOINT, temperature)
        columns[f"base_{shown}"] = flat(base[shown])
    for shown, temperature in (("greedy", 0.0), ("sampled", 1.0)):
        seeds = zip(_SEEDS.value, checkpoints, strict=True)
        of_seeds = [flat(scores(f"seed{seed}", checkpoint, temperature)) for seed, checkpoint in seeds]
        columns[f"final_{shown}"] = {kind: statistics.fmean(one[kind] for one in of_seeds) for kind in of_seeds[0]}
    print("\n| kind | base, greedy | base, sampled | after the stages, greedy | sampled |\n|---|---|---|---|---|")
    for kind in columns["base_greedy"]:
        print(f"| {kind} | " + " | ".join(f"{column[kind]:.1f} %" for column in columns.values()) + " |")
    return {
        "base_sampled": {capability: round(one["score"], 1) for capability, one in base["sampled"].items()},
        "kinds": [
            {"kind": kind, **{name: round(column[kind], 1) for name, column in columns.items()}}
            for kind in columns["base_greedy"]
        ],
    }


def main(arguments: list[str]) -> None:
    summaries = [run(seed, arguments[1:]) for seed in _SEEDS.value]
    capabilities = list(summaries[0]["accuracy"])
    print("| seed | " + " | ".join(capabilities) + " | format | seconds | step, median |")
    print("|---" * (len(capabilities) + 4) + "|")
    for seed, summary in zip(_SEEDS.value, summaries, strict=True):
        cells = [f"{a['base']:.1%} -> {a['final']:.1%}" for a in (summary["accuracy"][c] for c in capabilities)]
        facts = [f"{summary['format_reward_final']:.3f}", f"{summary['seconds']:.0f}"]
        print(f"| {seed} | " + " | ".join([*cells, *facts, f"{summary['step_seconds_median']:.2f}"]) + " |")
    gains = [
        statistics.fmean(100 * (s["accuracy"][c]["final"] - s["accuracy"][c]["base"]) for s in summaries)
        for c in capabilities
    ]
    print("| mean gain, points | " + " | ".join(f"{gain:+.1f}" for gain in gains) + " | | | |")
    print("compilations after warm-up: " + ", ".join(str(s["compilations_after_warmup"]) for s in summaries))
    print("log-prob difference: " + ", ".join(f"{s['logprob_difference_mean']:.1e}" for s in summaries))
    of_kinds = kinds([summary["checkpoint"] for summary in summaries])
    shown = (
        "accuracy", "format_reward_final", "seconds", "step_seconds_median", "compilations_after_warmup",
        "logprob_difference_mean",
    )  # fmt: skip
    seeds = [
        {"seed": int(seed)} | {key: summary[key] for key in shown}
        for seed, summary in zip(_SEEDS.value, summaries, strict=True)
    ]
    record.write({"order": capabilities, "seeds": seeds, "blind": summaries[0]["blind"]} | of_kinds, measures=())


if __name__ == "__main__":
    app.run(main, flags_parser=lambda arguments: flags.FLAGS(arguments, known_only=True))
