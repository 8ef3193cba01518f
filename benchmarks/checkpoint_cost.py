"""What checkpoints every ten steps cost a run: the laptop run with and without them, turn about.

    python benchmarks/checkpoint_cost.py [--steps=60] [--rounds=3]

Each turn is a process of its own, from the same seed: the same rollouts and updates. It prints the wall time between
the first step's end and the last one's, checkpoints included.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import record
from absl import app, flags

_STEPS = flags.DEFINE_integer("steps", 60, "Steps of a turn.")
_ROUNDS = flags.DEFINE_integer("rounds", 3, "Turns of each side.")


def turn(every: int, steps: int) -> tuple[float, float]:
    """Seconds of all steps but the first, and those spent in saving by the training thread."""
    with tempfile.TemporaryDirectory() as directory:
        settings = {
            "order": ("perception",),
            "stages.perception.steps": steps,
            "evaluation.questions": 1,
            "evaluation.blind": False,
            "export.each_stage": False,
            "checkpointing.every": every,
        }
        command = [sys.executable, "-m", "capcur_jax.main", "--config=configs/staged.py", f"--workdir={directory}/run"]
        command += [f"--config.{key}={value}" for key, value in settings.items()]
        done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(done.stderr[-3000:])
        lines = (Path(directory) / "run" / "metrics.jsonl").read_text().splitlines()
    records = [record for record in map(json.loads, lines) if record["type"] == "step"][1:]
    return sum(r["seconds"] for r in records), sum(r.get("seconds_checkpoint", 0.0) for r in records)


def main(_) -> None:
    sides: dict[str, list[float]] = {"every 10 steps": [], "none": []}
    saving = []
    for _ in range(_ROUNDS.value):
        for name, every in (("every 10 steps", 10), ("none", 10**6)):
            seconds, saved = turn(every, _STEPS.value)
            sides[name].append(seconds)
            if every == 10:
                saving.append(saved)
    for name, values in sides.items():
        shown = ", ".join(f"{value:.2f}" for value in values)
        print(f"checkpoints {name:<14} {statistics.median(values):.2f} s for {_STEPS.value - 1} steps  ({shown})")
    with_, without = (statistics.median(values) for values in sides.values())
    print(f"of it in the training thread {statistics.median(saving):.2f} s; cost {with_ / without - 1:+.1%}")
    figures = {"cost": with_ / without - 1, "in_training_thread": statistics.median(saving) / with_}
    record.write(figures, ("capcur_jax/checkpoints/**",))


if __name__ == "__main__":
    app.run(main)
