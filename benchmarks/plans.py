"""The plans of the published presets (docs/plan.md): writes benchmarks/plans/*.json and prints their table.

    python benchmarks/plans.py [--only=qwen3_vl_8b-h200] [--again] [--show]

Needs the extra `plan`. Minutes for a GPU topology, half an hour or more for a TPU's on two cores. TPU plans leave out
the text stage: its programs are those of the others with less in them. Seconds are at lengths "paper" / "geo3k"; a
plan that an older version made has none in the table.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from absl import app, flags

_ONLY = flags.DEFINE_list("only", [], "Plans, by the beginnings of their names; none: all.")
_AGAIN = flags.DEFINE_bool("again", False, "Make those that are there once more.")
_SHOW = flags.DEFINE_bool("show", False, "Make none, print the table.")
_DIRECTORY = Path(__file__).parent / "plans"
_IMAGES = "--config.order=('perception','visual')"

# Name -> preset, topology, further arguments.
PLANS = {
    "qwen3_vl_8b-h200-8": ("qwen3_vl_8b", "cuda:h200:1x1x8"),
    "qwen3_vl_8b-h200-split": ("qwen3_vl_8b_split", "cuda:h200:1x1x8"),
    "qwen3_vl_8b-h200-turns": ("qwen3_vl_8b_turns", "cuda:h200:1x1x8"),
    "qwen2_5_vl_7b-h200-8": ("qwen2_5_vl_7b", "cuda:h200:1x1x8"),
    "qwen2_5_vl_7b-h200-split": ("qwen2_5_vl_7b_split", "cuda:h200:1x1x8"),
    "qwen2_5_vl_7b-h200-turns": ("qwen2_5_vl_7b_turns", "cuda:h200:1x1x8"),
    "qwen2_5_vl_72b-h200-8": ("qwen2_5_vl_72b", "cuda:h200:1x1x8"),
    "qwen2_5_vl_72b-h200-16": ("qwen2_5_vl_72b", "cuda:h200:1x2x8"),
    "qwen3_vl_8b-v6e-16": ("qwen3_vl_8b", "tpu:v6e:4x4", _IMAGES),
    "qwen3_vl_8b-v5p-16": ("qwen3_vl_8b", "tpu:v5p:2x2x2", _IMAGES),
    "qwen2_5_vl_7b-v6e-16": ("qwen2_5_vl_7b", "tpu:v6e:4x4", _IMAGES),
    "qwen2_5_vl_7b-v5p-16": ("qwen2_5_vl_7b", "tpu:v5p:2x2x2", _IMAGES),
}


def make(name: str, preset: str, topology: str, *further: str) -> None:
    """Writes the plan, whether it fits or not."""
    arguments = [
        f"--config=configs/staged.py:{preset}",
        f"--topology={topology}",
        "--lengths=paper,geo3k",
        "--json",
        *further,
    ]
    print(name, *arguments, flush=True)
    done = subprocess.run([sys.executable, "-m", "capcur_jax.plan", *arguments], stdout=subprocess.PIPE, text=True)
    if done.returncode not in (0, 1):
        sys.exit(f"{name}: exit code {done.returncode}")
    (_DIRECTORY / f"{name}.json").write_text(done.stdout, encoding="utf-8")


def table() -> None:
    """One line a plan, as docs/plan.md has it. GiB a device, of the program that needs the most."""
    print("| plan | topology | mesh | needs, GiB | usable, GiB | fits | s a step | device-hours |\n|" + "---|" * 8)
    for name in PLANS:
        path = _DIRECTORY / f"{name}.json"
        if not path.exists():
            continue
        plan = json.loads(path.read_text(encoding="utf-8"))
        programs = [program for stage in plan["stages"] for program in stage["programs"]]
        most = max(programs, key=lambda program: program.get("needed_bytes", float("inf")))
        needs = f"{most['needed_bytes'] / 2**30:.1f}" if "needed_bytes" in most else most["out_of_memory"]
        mesh = " x ".join(f"{axis} {size}" for axis, size in plan["stages"][0]["mesh"].items() if size > 1)
        step, hours = ("older",) * 2 if plan["fits"] else ("", "")
        if "lengths" in plan:
            of = (plan["lengths"], *plan["others"])
            step, hours = (" / ".join(f"{one[key]:,.0f}" for one in of) for key in ("step_seconds", "device_hours"))
        fits = "yes" if plan["fits"] else "no"
        cells = (name, plan["topology"], mesh, f"{needs} ({most['name']})", f"{plan['usable_bytes'] / 2**30:.1f}", fits)
        print("|", " | ".join((*cells, step, hours)), "|")


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments: {argv[1:]}")
    _DIRECTORY.mkdir(exist_ok=True)
    for name, plan in PLANS.items():
        wanted = not _ONLY.value or name.startswith(tuple(_ONLY.value))
        if not _SHOW.value and wanted and (_AGAIN.value or not (_DIRECTORY / f"{name}.json").exists()):
            make(name, *plan)
    table()


if __name__ == "__main__":
    app.run(main)
