"""The command of a grid: what a dry run prints and writes, mistakes, and grids of tiny runs that are killed or fail."""

from __future__ import annotations

import itertools
import json
import os
import random
import shlex
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from safetensors.numpy import load_file

from capcur_jax import ablations, presets
from capcur_jax.grid import hours
from capcur_jax.grid.report import page
from capcur_jax.grid.rows import ROWS
from capcur_jax.records.jsonl import read_jsonl
from tests import tiny
from tests.grid.test_executors import until
from tests.test_resume import killed_somewhere, progress, records

ROOT = Path(ablations.__file__).parents[1]


@pytest.fixture
def dry(tmp_path, monkeypatch, capsys):
    """dry(*arguments): the fields of each line, printed from an empty folder in which nothing is written."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        assert ablations.main([*arguments, "--dry_run"]) == 0
        assert list(tmp_path.iterdir()) == []
        return [line.split("\t") for line in capsys.readouterr().out.splitlines()]

    return run


def test_a_dry_run_of_everything_needs_nothing_and_writes_nothing(dry):
    lines = dry("--seeds=0,2")
    assert [(line[0], line[1]) for line in lines] == [(name, seed) for name in ROWS for seed in ("0", "2")]
    assert {line[2] for line in lines} == {"-"}  # no plan is of the laptop
    for name, seed, _, command in lines:
        arguments = shlex.split(command)
        assert arguments[:3] == ["python", "-m", "capcur_jax.main"]
        config, workdir, *settings = arguments[3:]
        assert workdir == f"--workdir=runs/ablations/{name}/seed{seed}"
        made = presets.read(config.removeprefix("--config="), settings)
        assert made.seed == int(seed) and made.evaluation.base_results == "runs/ablations/base"
        trained = made.data.sets.text.train
        assert trained == (str(Path("runs/ablations/rated/text.jsonl").absolute()) if "difficulty" in name else "")
    assert len({line[3] for line in lines}) == len(lines)


def test_device_hours_are_those_of_the_plans_at_their_lengths(dry, tmp_path_factory, monkeypatch):
    """Of a plan's own run they are its `lengths.device_hours`."""
    plans = tmp_path_factory.mktemp("plans")
    seconds, hours_of = {True: 90.0, False: 45.0}, lambda steps, seconds: steps * seconds * 8 / 3600
    made = {
        "config": "configs/staged.py:qwen3_vl_8b", "overrides": [], "topology": "cuda:h200:1x1x8", "devices": 8,
        "stages": [{"images": i, "lengths": {"step_seconds": s}} for i, s in seconds.items()],
        "lengths": {"name": "paper", "device_hours": hours_of(90 + 465, 90.0) + hours_of(375, 45.0)}, "fits": True,
    }  # fmt: skip
    older = {key: value for key, value in made.items() if key != "lengths"}  # its counting was another
    for name, plan in {
        "a": older | {"topology": "cuda:h200:1x1x4", "devices": 4},
        "b": made | {"topology": "tpu:v5p:2x2x2"},
        "c": made,
        "d": older | {"config": "configs/staged.py:qwen2_5_vl_72b"},
    }.items():
        (plans / f"{name}.json").write_text(json.dumps(plan))
    monkeypatch.setattr(hours, "PLANS", plans)
    lines = {line[0]: line for line in dry("--preset=qwen3_vl_8b", "--rows=staged,visual,sft_perception")}
    assert lines["staged"][2] == f"{made['lengths']['device_hours']:,.0f} (paper)"
    assert lines["sft_perception"][2].endswith(" (paper) and captions")
    assert lines["visual"][2] == f"{hours_of(465, 90.0):,.0f} (paper)"
    assert dry("--preset=qwen2_5_vl_72b", "--rows=staged")[0][2] == "-"
    assert "--config.data.sets" not in lines["staged"][3]  # the user's files bring their pass rates


def test_the_committed_plans_are_read(dry):
    """Those that were made for lengths; a text stage is in the plan of a whole run."""
    said = dry("--preset=qwen3_vl_8b", "--rows=staged")[0][2]
    plans = [json.loads(path.read_text()) for path in hours.PLANS.glob("qwen3_vl_8b-*.json")]
    whole = {f"{p['lengths']['device_hours']:,.0f} (paper)" for p in plans if "lengths" in p and not p["overrides"]}
    assert said in (whole or {"-"})


def test_settings_are_given_to_every_run(dry):
    lines = dry("--rows=staged,merged", "--workdir=some where", "--config.checkpoint=/models/a b")
    for line in lines:
        assert "'--config.checkpoint=/models/a b'" in line[3] and "'--workdir=some where/" in line[3]


def test_a_grid_lies_in_no_bucket(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert ablations.main(["--workdir=gs://bucket/grid", "--dry_run"]) == 2
    assert capsys.readouterr().err.startswith("error: --workdir=gs://bucket/grid: a bucket's address")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--rows=stagd"], "there is no row 'stagd'; choose from staged, order_132"),
        (["--rows=base"], "base has no run of its own"),
        (["--rows=,"], "--rows is empty"),
        (["--seeds=0,x"], "--seeds=0,x: give whole numbers"),
        (["--seeds=-1"], "config.seed = -1: it must lie in"),
        (["--jobs=0"], "--jobs=0"),
        (["--slurm=partition=gpu"], "--slurm=partition=gpu needs --executor=slurm"),
        (["--executor=slurm", "--slurm=time=1:00:00"], "--slurm=time=1:00:00"),
        (["--config.seed=3"], "use --seeds=0,1,2"),
        (["--config.sed=3"], "sed"),
        (["stray"], "unknown argument 'stray'"),
    ],
)
def test_mistakes_get_one_clear_line(arguments, words, capsys, tmp_path):
    assert ablations.main([*arguments, f"--workdir={tmp_path / 'grid'}"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and words in error and not (tmp_path / "grid").exists()


# ---------------------------------------------------------------------- whole grids

SETTINGS = {
    **tiny.SETTINGS, "reward.function": "tests.own_rewards:by_length", "evaluation.questions": 4,
    "evaluation.blind": False, "log.tensorboard": False, "checkpointing.every": 2, "objective.updates_per_batch": 2,
    "rollout.max_new_tokens": 4,
    **{f"stages.{name}.steps": 5 for name in presets.CAPABILITIES},
    **{f"stages.{name}.prompts": 4 for name in presets.CAPABILITIES},
}  # fmt: skip


@pytest.fixture(scope="module")
def grid(checkpoint, sets):
    """grid(workdir, *arguments): a grid of two tiny runs in a process of its own."""
    settings = {**SETTINGS, **sets, "checkpoint": str(checkpoint)}

    def start(workdir: Path, *arguments: str) -> subprocess.Popen:
        command = [sys.executable, "-m", "capcur_jax.ablations", "--rows=visual,perception", f"--workdir={workdir}"]
        return subprocess.Popen(
            [*command, *tiny.arguments(settings), *arguments], cwd=ROOT, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    return start


def running_below(process: subprocess.Popen) -> list[int]:
    """The runs that the grid has started and that live."""
    try:
        children = psutil.Process(process.pid).children()
        return [child.pid for child in children if "capcur_jax.main" in child.cmdline()]
    except psutil.Error:  # it has just ended
        return []


def ended(process: subprocess.Popen, code: int = 0) -> str:
    output = process.communicate(timeout=300)[0]
    assert process.returncode == code, output[-3000:]
    return output


RUNS = ("visual/seed0", "perception/seed0")


@pytest.fixture(scope="module")
def unbroken(grid, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("unbroken") / "grid"
    output = ended(grid(workdir))
    assert "2 of 2 done" in output and "visual seed 0  done" in output
    return workdir


@pytest.mark.e2e
def test_the_base_is_asked_once_and_every_summary_is_whole(unbroken):
    (kept,) = (unbroken / "base").glob("*/results.json")
    first, second = (json.loads((unbroken / run / "summary.json").read_text()) for run in RUNS)
    assert first["accuracy"].keys() == second["accuracy"].keys() == set(presets.CAPABILITIES)
    for name, values in first["accuracy"].items():
        assert values["base"] == second["accuracy"][name]["base"] is not None
    results = json.loads(kept.read_text())
    for run in RUNS:
        base = [r for r in read_jsonl(unbroken / run / "metrics.jsonl") if r.get("after") == "base"]
        assert [{key: record[key] for key in results[0]} for record in base] == results
    assert "evaluating (base)" in (unbroken / RUNS[0] / "log.txt").read_text()
    assert "evaluating (base)" not in (unbroken / RUNS[1] / "log.txt").read_text()


def tables_of(workdir: Path, to: Path) -> dict[str, str]:
    """Title -> table of the grid's report, but for what depends on the clock, and the commands above them."""
    _, tables = page.write([str(workdir)], to)
    parts = tables.read_text(encoding="utf-8").split("\n## ")[1:]
    return {title: table for title, _, table in (part.partition("\n") for part in parts) if title != "Cost"}


@pytest.mark.e2e
def test_a_grid_killed_at_random_points_ends_with_the_same_files(grid, unbroken, tmp_path):
    """Killed in its first run, told to stop in its second."""
    choice, workdir = random.Random(1), tmp_path / "grid"
    assert killed_somewhere(grid(workdir), workdir / RUNS[0], choice)
    process = grid(workdir)
    assert until(lambda: progress(workdir / RUNS[1] / "rollouts.jsonl"), 120)
    children = running_below(process)
    process.terminate()
    assert "the same command goes on" in ended(process, code=130)
    assert not any(map(psutil.pid_exists, children))
    assert "2 of 2 done" in ended(grid(workdir))
    for run in RUNS:
        assert records(workdir / run) == records(unbroken / run)
        ours, theirs = (load_file(d / run / "checkpoints" / "final" / "model.safetensors") for d in (workdir, unbroken))
        assert ours.keys() == theirs.keys() and all((ours[key] == theirs[key]).all() for key in theirs)
        ours, theirs = (json.loads((d / run / "summary.json").read_text()) for d in (workdir, unbroken))
        assert all(ours[key] == theirs[key] for key in ("accuracy", "steps", "status", "skipped"))
    ours, theirs = tables_of(workdir, tmp_path / "ours"), tables_of(unbroken, tmp_path / "theirs")
    assert ours == theirs and "All comparisons" in ours


@pytest.mark.e2e
def test_a_finished_grid_is_left_alone_and_another_config_is_refused(grid, unbroken):
    def state():
        return {path: path.stat().st_mtime_ns for path in unbroken.rglob("*") if path.is_file()}

    before = state()
    assert "2 of 2 done" in ended(grid(unbroken))
    assert state() == before
    output = ended(grid(unbroken, "--config.stages.visual.learning_rate=0.5"), code=2)
    assert f"visual seed 0, {unbroken / 'visual' / 'seed0'}: " in output and "config.seed" not in output
    assert "started with another config" in output and f"learning_rate: {presets.LAPTOP_LEARNING_RATE} -> 0.5" in output
    (command,) = (unbroken / "commands.txt").read_text().splitlines()  # and not the one that was refused
    assert command.startswith(
        "python -m capcur_jax.ablations --rows=visual,perception --seeds=0 --preset=laptop --jobs=1 "
    )


@pytest.mark.e2e
def test_rows_from_easy_to_hard_see_their_problems_in_that_order(grid, sets, tmp_path):
    """By the runs' records: what every step sampled for is no easier than what comes after it is hard."""
    steps_of = dict.fromkeys(presets.CAPABILITIES, 3) | {"merged": 9}  # all of the 12 problems of each set
    rates, given = {}, ["--config.stages.merged.prompts=4"]
    for name, count in steps_of.items():
        given.append(f"--config.stages.{name}.steps={count}")
    for name in presets.CAPABILITIES:
        file = Path(sets[f"data.sets.{name}.train"])
        lines = read_jsonl(file)[:12]
        for at, line in enumerate(lines):
            line |= {"id": f"{name}-{at}", "pass_rate": (7 * at % len(lines)) / len(lines)}
            line["images"] = [str(file.parent / image) for image in line["images"]]
            rates[line["id"]] = line["pass_rate"]
        rated = tmp_path / f"{name}.jsonl"
        rated.write_text("".join(json.dumps(line) + "\n" for line in lines))
        given.append(f"--config.data.sets.{name}.train={rated}")
    given += ["--rows=difficulty,capability_x_difficulty", "--config.log.rollout_prompts=4"]
    ended(grid(tmp_path / "grid", *given))
    for row, stages in (("difficulty", ["merged"]), ("capability_x_difficulty", [*presets.CAPABILITIES])):
        groups = read_jsonl(tmp_path / "grid" / row / "seed0" / "rollouts.jsonl")
        assert list(dict.fromkeys(group["stage"] for group in groups)) == stages
        for stage in stages:
            seen: dict[int, list[float]] = {}
            for group in (group for group in groups if group["stage"] == stage):
                seen.setdefault(group["step"], []).append(rates[group["id"]])
            steps = [seen[step] for step in sorted(seen)]
            assert len(steps) == steps_of[stage] and max(steps[0]) > 0.9 and min(steps[-1]) == 0
            assert all(min(easier) >= max(harder) for easier, harder in itertools.pairwise(steps)), (row, stage, steps)


@pytest.fixture
def from_cache(monkeypatch):
    """from_cache(run): how many programs it read from JAX's cache on the disk, which the runs share, and how many it
    compiled, as JAX logs them. The tests' own cache keeps every program."""
    monkeypatch.setenv("JAX_DEBUG_LOG_MODULES", "jax._src.compiler")

    def count(run: Path) -> list[int]:
        log = (run / "log.txt").read_text().lower()
        return [log.count(f"persistent compilation cache {what} for") for what in ("hit", "miss")]

    return count


@pytest.mark.e2e
def test_a_grid_goes_on_although_a_run_fails(grid, unbroken, tmp_path, from_cache):
    """The other one has the shapes of the unbroken grid's runs, and another seed: it compiles nothing."""
    workdir = tmp_path / "grid"
    (workdir / "visual").mkdir(parents=True)
    (workdir / "visual" / "seed1").write_text("no folder")
    output = ended(grid(workdir, "--seeds=1", "--config.stages.perception.steps=1"), code=1)
    assert "1 of 2 done" in output and "visual seed 1 failed" in output
    summary = json.loads((workdir / "perception" / "seed1" / "summary.json").read_text())
    assert summary["status"] == "finished"
    assert os.path.isfile(workdir / "visual" / "seed1")
    read, compiled = from_cache(workdir / "perception" / "seed1")
    assert read > 10 and compiled == 0
