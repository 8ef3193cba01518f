"""The laptop run with three seeds, one after the other, and the mean gain of each capability.

    python benchmarks/three_seeds.py [--config=configs/staged.py] [--workdir=runs/three_seeds] [more flags of the run]

Prints a markdown table: base and final greedy accuracy of each seed, the mean gain in points, format reward, seconds.
A seed whose summary lies there already is not run again.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from pathlib import Path

from absl import app, flags

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


if __name__ == "__main__":
    app.run(main, flags_parser=lambda arguments: flags.FLAGS(arguments, known_only=True))
