"""Whether a change that claims to change nothing does so: small runs of another revision and of the working tree.

    python benchmarks/same_run.py REV [--directory=DIR]

Each side runs `capcur_jax.main` from the shipped base checkpoint in two stages of four steps, with two updates a
rollout batch, validation, checkpoints and KL; and once more with targets to imitate. Compared bit for bit are losses
and gradient norms (metrics.jsonl without seconds), samples (rollouts.jsonl), the exported checkpoints, the arrays of
the last state (parameters, moments, counters). Of the reports that each side makes of REV's records, what a browser
shows is compared: how characters are escaped and the footer, which names the command, may differ. A side that lies in
DIR already is not run again. Exit code 0: all the same. A minute a side.
"""

from __future__ import annotations

import html
import io
import os
import re
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path

from absl import app, flags

from capcur_jax.checkpoints.store import Store
from capcur_jax.records.jsonl import read_jsonl

ROOT = Path(__file__).resolve().parents[1]
_DIRECTORY = flags.DEFINE_string("directory", None, "Where the runs lie; default: a temporary folder.")
_TIMED = ("seconds", "tokens_per_second", "rollout_tokens_per_second", "host_")
_SMALL = {
    "rollout.max_new_tokens": 16, "packing.shapes": ((640, 8, 64),), "rollout.slots": 32,
    "evaluation.questions": 16, "validation.every": 2, "validation.questions": 8, "checkpointing.every": 2,
    "log.rollouts_every": 1, "objective.updates_per_batch": 2, "log.tensorboard": False,
    **{f"stages.{name}.steps": 4 for name in ("perception", "text")},
    **{f"stages.{name}.prompts": 8 for name in ("perception", "text")},
    "order": ("perception", "text"),
}  # fmt: skip
RUNS = {
    "grpo": ("configs/staged.py", _SMALL),
    "sft": ("configs/sft_perception.py", _SMALL | {"order": ("perception",), "objective.updates_per_batch": 1}),
}


def run(tree: Path, workdir: Path, config: str, settings: dict) -> None:
    """One run of that tree's code, unless it lies there already."""
    if (workdir / "summary.json").exists():
        return
    command = [sys.executable, "-m", "capcur_jax.main", f"--config={config}", f"--workdir={workdir}"]
    command += [f"--config.{key}={value}" for key, value in settings.items()]
    python(tree, *command[1:])


def python(tree: Path, *arguments: str) -> None:
    environment = os.environ | {"PYTHONPATH": str(tree)}
    done = subprocess.run([sys.executable, *arguments], cwd=tree, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{tree}: {' '.join(arguments)}\n{done.stdout[-1000:]}{done.stderr[-3000:]}")


def records(workdir: Path) -> list[dict]:
    """metrics.jsonl without what depends on the clock and the machine."""
    lines = read_jsonl(workdir / "metrics.jsonl")
    return [{key: value for key, value in line.items() if not key.startswith(_TIMED)} for line in lines]


def state(workdir: Path) -> dict[str, bytes]:
    """The arrays of the last checkpoint, by name."""
    store = Store(workdir / "state", None, 60)
    return {name: array.tobytes() for name, array in store.arrays(store.latest()).items()}


def shown(report: str) -> str:
    """A report's text without its footer, characters as they are shown."""
    return html.unescape(re.sub(r"<footer>.*?</footer>", "", report, flags=re.DOTALL))


def differences(base: Path, ours: Path) -> Iterator[str]:
    """What is not the same in two work directories, and a line for what was compared."""
    before, after = records(base), records(ours)
    for old, new in zip(before, after, strict=False):
        names = [name for name in old.keys() | new.keys() if old.get(name) != new.get(name)]
        if names:
            yield f"metrics.jsonl, step {old.get('step')}: {', '.join(sorted(names))}"
    if len(before) != len(after):
        yield f"metrics.jsonl: {len(before)} and {len(after)} records"
    if read_jsonl(base / "rollouts.jsonl") != read_jsonl(ours / "rollouts.jsonl"):
        yield "rollouts.jsonl"
    for file in sorted((base / "checkpoints").rglob("*.safetensors")):
        name = file.relative_to(base)
        if not (ours / name).exists() or file.read_bytes() != (ours / name).read_bytes():
            yield str(name)
    one, other = state(base), state(ours)
    yield from (f"state: {name}" for name in sorted(one.keys() | other.keys()) if one.get(name) != other.get(name))
    print(f"{ours.name}: {len(before)} records, {len(one)} arrays of {sum(map(len, one.values())):,} bytes compared")


def main(arguments: list[str]) -> None:
    if len(arguments) != 2:
        raise app.UsageError("give one revision to compare with")
    found = []
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(_DIRECTORY.value or temporary).absolute()
        base = directory / "tree"
        archive = subprocess.run(["git", "archive", arguments[1]], cwd=ROOT, capture_output=True, check=True).stdout
        with tarfile.open(fileobj=io.BytesIO(archive)) as files:
            files.extractall(base, filter="data")
        for name, (config, settings) in RUNS.items():
            sides = [directory / "base" / name, directory / "ours" / name]
            for tree, workdir in zip((base, ROOT), sides, strict=True):
                run(tree, workdir, config, settings)
            found += [f"{name}: {line}" for line in differences(*sides)]
            report = sides[0] / "report.html"
            before = report.read_text(encoding="utf-8")
            python(ROOT, "-m", "capcur_jax.report", str(sides[0]))
            after = report.read_text(encoding="utf-8")
            if shown(after) != shown(before):
                for side, text in (("base", before), ("ours", after)):
                    report.with_name(f"report.{side}.html").write_text(text, encoding="utf-8")
                found.append(f"{name}: reports of the same records differ: {report.parent}/report.[base, ours].html")
            report.write_text(before, encoding="utf-8")
    print("\n".join(found) or f"{arguments[1]} and the working tree: bit for bit the same; reports show the same")
    sys.exit(bool(found))


if __name__ == "__main__":
    app.run(main)
