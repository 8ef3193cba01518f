"""The commands of a grid: a run for each row and seed, and the pass rates that rows from easy to hard need first."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from ml_collections import ConfigDict

from capcur_jax import presets, schedule
from capcur_jax.data.problem import SPLITS
from capcur_jax.data.sets import Sets
from capcur_jax.errors import InputError
from capcur_jax.grid import budget
from capcur_jax.grid.rows import ROWS, Row

PROJECT = Path(__file__).resolve().parents[2]  # has configs/ and benchmarks/
COMMANDS = "commands.txt"  # of a grid's work directory: what made its runs, a line each
SAMPLES = 8  # of a pass rate that the grid measures itself, on a laptop's sets


@dataclasses.dataclass(frozen=True)
class Job:
    """A command of the grid.

    Attributes:
      arguments: of Python: a module and what it is told.
      folder: the run's work directory, or where the pass rates come to lie.
      needs: names of jobs that have to be done first.
      steps: of the run; 0 where there are none, or they depend on the data.
      config: the run's; None for pass rates.
    """

    name: str
    arguments: tuple[str, ...]
    folder: Path
    needs: tuple[str, ...] = ()
    steps: int = 0
    row: str = ""
    seed: int = 0
    config: ConfigDict | None = None

    @property
    def log(self) -> Path:
        return self.folder / (f"{self.name}.log" if self.config is None else "log.txt")


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a grid does, before anything is written."""

    runs: tuple[Job, ...]
    rated: dict[str, str]  # set -> the config file that it is measured with
    workdir: Path
    overrides: tuple[str, ...]

    @classmethod
    def of(
        cls, rows: Sequence[str], seeds: Sequence[int], preset: str, workdir: Path, overrides: Sequence[str]
    ) -> Plan:
        """Raises InputError for a row, a preset or a setting that there is not."""
        for name in rows:
            if name == "base":
                raise InputError("--rows: base has no run of its own: a grid evaluates it once, before the others")
            if name not in ROWS:
                raise InputError(f"--rows: there is no row '{name}'; choose from {', '.join(ROWS)}")
        if any(given.startswith("--config.seed") for given in overrides):
            raise InputError("--config.seed: the grid gives each run its seed; use --seeds=0,1,2")
        runs, rated = [], {}
        for row in (ROWS[name] for name in rows):
            file = config_file(row, preset)
            wanted = {name: file for name in to_rate(presets.read(file, overrides))}
            rated |= {name: file for name, file in wanted.items() if name not in rated}
            for seed in seeds:
                runs.append(_run(row, seed, file, workdir, overrides, tuple(wanted)))
        return cls(tuple(runs), rated, workdir, tuple(overrides))

    def preparations(self) -> list[Job]:
        """What measures the pass rates that are not there yet; builds the sets that they are of. Raises InputError."""
        jobs = []
        for name, file in self.rated.items():
            output, config = rated_file(self.workdir, name), presets.read(file, self.overrides)
            if _measured(output, config):
                continue
            source = Sets(config.data, self.workdir / "data").path(name, "train")
            arguments = (
                "-m", "capcur_jax.data", "difficulty", f"--config={file}", *self.overrides, f"--input={source}",
                f"--output={output}", f"--samples={SAMPLES}", f"--max_new_tokens={config.rollout.max_new_tokens}",
            )  # fmt: skip
            jobs.append(Job(rating(name), arguments, output.parent))
        return jobs


def config_file(row: Row, preset: str) -> str:
    """From the project's folder as it is written in the pages, from elsewhere whole. Raises InputError."""
    file = row.config(preset)
    if not (PROJECT / file.partition(":")[0]).is_file():
        raise InputError(f"{PROJECT / 'configs'} is not there: run the grid from a checkout of the project")
    return file if Path.cwd() == PROJECT else str(PROJECT / file)


def to_rate(config: ConfigDict) -> list[str]:
    """Sets that need pass rates and are built on first use: files of the user's have to bring theirs."""
    stages = schedule.stages(config)
    names = {name for stage in stages if stage.curriculum.by_difficulty for name in stage.data}
    entries = {name: config.data.sets[name] for name in sorted(names)}
    return [name for name, entry in entries.items() if entry.source and not any(entry[split] for split in SPLITS)]


def rating(name: str) -> str:
    """The job that measures a set."""
    return f"pass rates of {name}"


def rated_file(workdir: Path, name: str) -> Path:
    return workdir / "rated" / f"{name}.jsonl"


def _run(row: Row, seed: int, file: str, workdir: Path, overrides: Sequence[str], rated: Sequence[str]) -> Job:
    folder = workdir / row.name / f"seed{seed}"
    own = [f"--config.evaluation.base_results={workdir / 'base'}"]
    for name in rated:
        # Whole paths: however --workdir is written, the config is the same, and the run goes on.
        files = {split: workdir.absolute() / "data" / f"{name}-{split}.jsonl" for split in SPLITS}
        files["train"] = rated_file(workdir.absolute(), name)
        own += [f"--config.data.sets.{name}.{split}={path}" for split, path in files.items()]
    settings = (*overrides, f"--config.seed={seed}", *own)
    config = presets.read(file, settings)
    steps = sum(map(budget.steps_of, schedule.stages(config)))
    return Job(
        f"{row.name} seed {seed}",
        ("-m", "capcur_jax.main", f"--config={file}", f"--workdir={folder}", *settings),
        folder,
        tuple(map(rating, rated)),
        int(steps) if steps == steps else 0,  # NaN: epochs of a file
        row.name,
        seed,
        config,
    )


def _measured(output: Path, config: ConfigDict) -> bool:
    """Whether the pass rates are there. Raises InputError for those of another checkpoint."""
    try:
        with output.open(encoding="utf-8") as file:
            by = json.loads(next(file))["pass_rate_by"]
    except (OSError, StopIteration, ValueError, KeyError):
        return False
    if by.get("model") != str(Path(config.checkpoint).expanduser()):
        raise InputError(
            f"{output} has pass rates of {by.get('model')}, and config.checkpoint is {config.checkpoint}: delete it "
            f"and {output.name}.journal.jsonl beside it, or give another --workdir"
        )
    return True


def command(job: Job) -> list[str]:
    """As a process is started."""
    return [sys.executable, *job.arguments]
