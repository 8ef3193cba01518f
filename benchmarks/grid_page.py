"""The page of a grid of 60 runs: its size, the seconds it takes to make, and those a browser takes to open it.

    python benchmarks/grid_page.py [--rows=12] [--seeds=5] [--questions=1000] [--folder=/tmp/grid]

Makes the files that runs leave, with figures that are drawn at random: 12 rows of 5 seeds, 3 sets of 1,000 questions,
300 steps. Then `python -m capcur_jax.report` in a process of its own. The browser is Debian's chromium, headless; its
seconds are those of a process that opens the page, lays it out and ends, less those of an empty page.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import record
from absl import app, flags
from PIL import Image, ImageDraw

from capcur_jax.evaluation import folders
from capcur_jax.evaluation.benchmarks.base import MODES, Reply, Row, Verdict
from capcur_jax.grid.rows import ROWS
from capcur_jax.records import jsonl

SETS = {"perception": ("color", "position", "shape"), "text": ("sum", "sharing"), "visual": ("corners", "digit sum")}
ORDER = (
    "staged", "merged", "merged_trained", "order_213", "order_321", "text_visual", "sft_perception", "difficulty",
    "capability_x_difficulty", "visual", "merged_in_order", "adaptive",
)  # fmt: skip
GAINS = {"perception": 1.6, "text": 2.2, "visual": 1.8}  # of training, in logits
BROWSER = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage")


def make(
    folder: Path,
    rows: dict[str, float],
    seeds: range = range(3),
    questions: int = 60,
    steps: int = 30,
    noise: float = 0.1,
) -> None:
    """A grid's work directory, as runs leave it.

    Args:
      rows: row -> what it has over staged, in logits of visual and perception.
      noise: between seeds, in logits.
    """
    rng = np.random.default_rng(0)
    images = _images(folder / "data", min(questions, 40))
    difficulty = {name: rng.normal(0, 1.5, questions) for name in SETS}
    base = folder / "base" / "0" / "evaluation" / "base"
    _evaluation(base, {name: (-difficulty[name] > 0.2, 30.0) for name in SETS}, images, rng)
    for row, over in rows.items():
        for seed in seeds:
            run = folder / row / f"seed{seed}"
            run.mkdir(parents=True)
            shutil.copytree(base, run / "evaluation" / "base")
            found = {}
            for name in SETS:
                shift = GAINS[name] + (over if name != "text" else 0.0) + rng.normal(0, noise)
                found[name] = 1 / (1 + np.exp(difficulty[name] - shift)) > rng.random(questions), 24.0 - 8 * over
            _evaluation(run / "evaluation" / "final", found, images, rng)
            _records(run, row, seed, steps, {name: float(right.mean()) for name, (right, _) in found.items()}, rng)


def _images(folder: Path, count: int) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    rng, made = random.Random(0), []
    for at in range(count):
        image = Image.new("RGB", (64, 64), (rng.randrange(180, 256),) * 3)
        ImageDraw.Draw(image).regular_polygon((32, 32, 14), rng.choice((3, 4, 6)), fill=rng.choice(("red", "blue")))
        made.append(folder / f"{at}.png")
        image.save(made[-1])
    return made


def _evaluation(folder: Path, found: dict, images: list[Path], rng: np.random.Generator) -> None:
    (folder / folders.PREDICTIONS).mkdir(parents=True)
    for name, (right, length) in found.items():
        answered = []
        for at, good in enumerate(right):
            picture = () if name == "text" else (images[at % len(images)],)
            gold, kind = str(at % 9), SETS[name][at % len(SETS[name])]
            row = Row(f"{name}-{at}", f"What is the {kind} of {at}?", (gold,), picture, facts={"kind": kind},
                      cluster="".join(map(str, picture)))  # fmt: skip
            given = gold if good else f"{at % 9}0"
            reply = Reply(f"<think>The {kind} is {given}.</think> \\boxed{{{given}}}", "stop", int(rng.poisson(length)))
            answered.append(folders.Answered(row, reply, dict.fromkeys(MODES, Verdict(float(good), "rule", given))))
        folders.write_predictions(folders.predictions_file(folder, name), answered)
    conditions = {"split": "test", "temperature": 0.0, "seed": 0}
    jsonl.write_json_atomic(folder / folders.SCORES, {"conditions": conditions, "benchmarks": {}})


def _records(run: Path, row: str, seed: int, steps: int, right: dict, rng: np.random.Generator) -> None:
    stages = ["merged"] if row.startswith(("merged", "difficulty")) else list(SETS)
    with jsonl.JsonLines(run / "metrics.jsonl") as log:
        for step in range(1, steps + 1):
            part = (step - 1) * len(stages) // steps
            accuracy = 0.5 + 0.4 * step / steps + rng.normal(0, 0.05)
            log.write({
                "type": "step", "step": step, "stage": stages[part],
                "stage_step": step - part * steps // len(stages), "accuracy": accuracy, "kl": 0.001 * step,
                "response_length": 30 - 6 * step / steps + rng.normal(0, 1), "tokens": 1900, "trained_tokens": 1100,
                "seconds": 0.4,
            })  # fmt: skip
    moments = ["base", *(f"after_{stage}" for stage in stages), "final"]
    path = [*np.linspace(0, 1, len(moments) - 1).tolist(), 1.0]
    accuracy = {name: {m: 0.5 + (end - 0.5) * p for m, p in zip(moments, path, strict=True)}
                for name, end in right.items()}  # fmt: skip
    summary = {"status": "finished", "accuracy": accuracy, "seconds": 200.0 + seed, "steps": steps, "devices": 1}
    jsonl.write_json_atomic(run / "summary.json", summary)
    jsonl.write_json_atomic(run / "config.json", {"seed": seed})
    jsonl.write_json_atomic(run / "versions.json", {"commit": "0" * 40})


def browse(page: str) -> float:
    """Seconds of a browser that opens the page, lays it out, and ends."""
    with tempfile.TemporaryDirectory() as profile:
        started = time.perf_counter()
        command = [shutil.which("chromium") or "chromium", *BROWSER, f"--user-data-dir={profile}", "--dump-dom", page]
        subprocess.run(command, check=True, capture_output=True, timeout=300)
        return time.perf_counter() - started


def main(unused) -> None:
    values = flags.FLAGS
    place = Path(values.folder or tempfile.mkdtemp())
    rng = random.Random(1)
    if not (place / "base").is_dir():
        rows = {row: 0.0 if row == "staged" else rng.choice((0.0, -0.3)) for row in ORDER[: values.rows]}
        make(place, rows, range(values.seeds), values.questions, values.steps)
    started = time.perf_counter()
    subprocess.run([sys.executable, "-m", "capcur_jax.report", str(place)], check=True)
    made = time.perf_counter() - started
    page = place / "report.html"
    found = {"runs": values.rows * values.seeds, "MB": page.stat().st_size / 1e6, "seconds to make": made}
    if shutil.which("chromium"):
        empty = min(browse("about:blank") for _ in range(3))
        opened = min(browse(page.as_uri()) for _ in range(3))
        found |= {"seconds to open": opened - empty, "an empty page": empty}
    found["load average"] = os.getloadavg()[0]
    print(json.dumps({name: round(value, 2) for name, value in found.items()}))
    if "seconds to open" in found:
        names = {"runs": "runs", "MB": "mb", "seconds to make": "seconds_to_make", "seconds to open": "seconds_to_open"}
        figures = {kept: found[name] for name, kept in names.items()}
        record.write(figures, ("capcur_jax/report/**", "capcur_jax/grid/report/**"))


if __name__ == "__main__":
    flags.DEFINE_integer("rows", len(ORDER), f"Rows, of at most {len(ORDER)}.", upper_bound=len(ORDER))
    flags.DEFINE_integer("seeds", 5, "Seeds.")
    flags.DEFINE_integer("questions", 1000, "Questions of each set.")
    flags.DEFINE_integer("steps", 300, "Steps of each run.")
    flags.DEFINE_string("folder", "", "Where the grid is made; one that is there is used again.")
    assert set(ORDER) <= ROWS.keys()
    app.run(main)
