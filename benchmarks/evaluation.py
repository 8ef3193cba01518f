"""What the evaluation of a run costs, against another revision; and the command that asks the same questions.

    python benchmarks/evaluation.py REV [--rounds=3] [--questions=1000] [--rows=20000]

Each side, a process of its own, opens the working tree's base checkpoint with its own laptop settings, asks the
working tree's held-out questions of all three sets, and grades them; the working tree also writes what it keeps of
them. Sides take turns. Printed are seconds by the clock and of the processor (which say more where others use the
machine), with compilation, and their ratio by medians. Then the command asks a file of --rows questions with images
(0: it is left out), and its memory after the first tenth of them and at the end is printed.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

from absl import app, flags

ROOT = Path(__file__).resolve().parents[1]
_ROUNDS = flags.DEFINE_integer("rounds", 3, "How often each side is run.")
_QUESTIONS = flags.DEFINE_integer("questions", 1000, "Of each set.")
_ROWS = flags.DEFINE_integer("rows", 20_000, "Of the command; 0: it is not measured.")

SIDE = """
import contextlib, json, resource, sys, time
from pathlib import Path
from capcur_jax import policy, presets
from capcur_jax.data.sets import Sets
from capcur_jax.devices import drivers, sharding
from capcur_jax.evaluation.heldout import Heldout
from capcur_jax.rewards.reward import make_reward

drivers.without_drivers_cpu()
config, workdir = presets.get("laptop"), Path(sys.argv[1])
config.evaluation.questions, config.checkpoint = int(sys.argv[2]), sys.argv[3]
built = Path(sys.argv[4])
if not built.exists():
    Sets(config.data, built).build(config.evaluation.sets, "test")
for name in config.evaluation.sets:  # the same questions for both
    config.data.sets[name].test = str(built / f"{name}-test.jsonl")
sets = Sets(config.data, workdir / "data")
if len(sys.argv) > 5:  # only to build them
    sys.exit(print("{}"))
model, opened = policy.open_model(config, Path(config.checkpoint), sharding.make_mesh(config.mesh), print)
engine, reward = policy.open_engine(config, model, opened, workdir), make_reward(config.reward)
more = []
with contextlib.suppress(ImportError):
    from capcur_jax.evaluation.keeper import Keeper
    more = [Keeper(lambda label: workdir / "evaluation" / label, dict)]
progress = lambda title, total: contextlib.nullcontext(lambda count: None)
heldout = Heldout(config, sets, engine, opened.builder, reward, progress, lambda: None, *more)

def used():
    return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))

clock, cpu = time.perf_counter(), used()
results = heldout.evaluate("base")
seconds = time.perf_counter() - clock
opened.images.close(); reward.close()
print(json.dumps({"clock": seconds, "cpu": used() - cpu, "accuracy": [one["accuracy"] for one in results]}))
"""

COMMAND = """
import json, resource, sys
from pathlib import Path
import psutil
from PIL import Image
from capcur_jax import evaluate
from capcur_jax.data.problem import Problem
from capcur_jax.data.rows import write_rows
from capcur_jax.evaluation import asking

folder, count = Path(sys.argv[1]), int(sys.argv[2])
for number in range(200):
    Image.effect_noise((64, 64), 64 + number % 64).convert("RGB").save(folder / f"{number}.png")
names = [str(folder / f"{n}.png") for n in range(200)]
write_rows(folder / "many.jsonl", [Problem(f"q{n}", f"Is it {n}?", "yes", (names[n % 200],)) for n in range(count)])
sizes, add = [], asking.Replies.add

def measured(self, answers):
    add(self, answers)
    sizes.append(psutil.Process().memory_info().rss / 2**20)

asking.Replies.add = measured
evaluate.main([f"--benchmarks={folder / 'many.jsonl'}", f"--checkpoint={sys.argv[3]}", "--config=configs/staged.py",
               "--max_new_tokens=4", f"--workdir={folder / 'w'}"])
print(json.dumps({"first": sizes[len(sizes) // 10], "last": sizes[-1], "most": max(sizes)}))
"""


def main(arguments: Sequence[str]) -> None:
    if len(arguments) != 2:
        raise app.UsageError("give a revision to compare with")
    with tempfile.TemporaryDirectory() as temporary:
        other = Path(temporary) / "other"
        archive = subprocess.run(["git", "archive", arguments[1]], cwd=ROOT, check=True, capture_output=True).stdout
        with tarfile.open(fileobj=BytesIO(archive)) as files:
            files.extractall(other, filter="data")
        checkpoint, built = str(ROOT / "capcur_jax" / "assets" / "tiny_qwen3_vl"), str(Path(temporary) / "data")
        shared = str(_QUESTIONS.value), checkpoint, built
        _run(ROOT, SIDE, temporary, *shared, "build")
        sides: dict[str, list[dict]] = {arguments[1]: [], "working tree": []}
        for _ in range(_ROUNDS.value):
            for name, tree in zip(sides, (other, ROOT), strict=True):
                workdir = Path(temporary) / name.replace(" ", "-").replace("/", "-")
                sides[name].append(_run(tree, SIDE, str(workdir), *shared))
        for what in ("clock", "cpu"):
            before, after = (statistics.median(one[what] for one in found) for found in sides.values())
            print(f"{what}: {before:.1f} s at {arguments[1]}, {after:.1f} s in the working tree, {after / before:.2f}x")
        same = sides[arguments[1]][0]["accuracy"] == sides["working tree"][0]["accuracy"]
        print(f"accuracies {'the same' if same else 'differ'}: {sides['working tree'][0]['accuracy']}")
        if _ROWS.value:
            folder = Path(temporary) / "many"
            folder.mkdir()
            found = _run(ROOT, COMMAND, str(folder), str(_ROWS.value), checkpoint)
            first, last = found["first"], found["last"]
            print(f"memory over {_ROWS.value:,} rows: {first:.0f} MiB after a tenth, {last:.0f} MiB at the end")


def _run(tree: Path, code: str, *arguments: str) -> dict:
    """What a side's last line says."""
    environment = os.environ | {"PYTHONPATH": str(tree)}
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=tree, env=environment, capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(f"{tree}: {done.stderr[-3000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


if __name__ == "__main__":
    app.run(main)
