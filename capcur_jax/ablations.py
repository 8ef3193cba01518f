"""Runs the paper's tables as one grid: rows x seeds, each a run of its own.

python -m capcur_jax.ablations --rows=staged,merged --seeds=0,1,2 --workdir=runs/ablations [--jobs=N] [--dry_run]

The same command goes on where it was stopped: what is finished is left alone. Any --config.key=value is given to every
run. docs/ablations.md has the rows, what they are compared with, and what differs.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TextIO

from rich.console import Console
from rich.text import Text

from capcur_jax import presets
from capcur_jax.errors import InputError
from capcur_jax.files import must_be_local, write_atomically
from capcur_jax.grid import budget, hours, runner, watch
from capcur_jax.grid.executors import EXECUTORS, executor
from capcur_jax.grid.jobs import COMMANDS, Job, Plan, config_file
from capcur_jax.grid.rows import ROWS
from capcur_jax.interruption import Interrupted, Interruption
from capcur_jax.records import streams
from capcur_jax.records.lock import Lock
from capcur_jax.records.tables import titled
from capcur_jax.records.text import visible


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m capcur_jax.ablations", description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = made.add_argument
    add("--rows", default=",".join(ROWS), help="names of rows (default: all): %(default)s")
    add("--seeds", default="0", help="such as 0,1,2 (default: %(default)s)")
    add("--preset", default="laptop", choices=sorted(presets.PRESETS), help="size of the runs (default: %(default)s)")
    add("--workdir", default="runs/ablations", help="a folder for the grid (default: %(default)s)")
    add("--jobs", type=int, default=1, help="runs side by side, which share cores and GPUs (default: %(default)s)")
    add("--executor", default="local", choices=EXECUTORS, help="where runs take place (default: %(default)s)")
    add("--slurm", action="append", default=[], metavar="KEY=VALUE",
        help="of each job, with --executor=slurm: partition=gpu, time=600 (minutes), nodes=2, ...")  # fmt: skip
    add("--dry_run", action="store_true", help="print each run's row, seed, device-hours and command; write nothing")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code. 0: every run is finished; 1: one failed; 2: the command can't be used; 130: it was stopped."""
    options, overrides = parser().parse_known_args(arguments)
    try:
        if wrong := [given for given in overrides if not given.startswith("--config.")]:
            raise InputError(f"unknown argument {wrong[0]!r}; settings look like --config.log.tensorboard=False")
        if options.jobs < 1:
            raise InputError(f"--jobs={options.jobs}: at least one run at a time")
        must_be_local("--workdir", options.workdir)
        names, seeds = _names(options.rows), _seeds(options.seeds)
        plan = Plan.of(names, seeds, options.preset, Path(options.workdir), overrides)
        budgets = _budgets(names, options.preset, overrides)
        if options.dry_run:
            _console(sys.stderr).print(budgets)
            for job in plan.runs:
                said = (job.row, str(job.seed), hours.device_hours(job.config, options.preset))
                print("\t".join([*said, shlex.join(["python", *job.arguments])]))
            return 0
        return _run(plan, options, budgets, overrides)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _run(plan: Plan, options: argparse.Namespace, budgets, overrides: Sequence[str]) -> int:
    board = watch.Board(_console(sys.stdout))
    local = options.executor == "local"
    if local and options.jobs > 1 and any(job.config.mesh.gpus for job in plan.runs):
        raise InputError(f"--jobs={options.jobs}: preset {options.preset} takes GPUs by their numbers; give --jobs=1")
    chosen = executor(options.executor, options.jobs, plan.workdir / "slurm", options.slurm)
    try:
        with Interruption() as interruption, Lock(plan.workdir):
            board.print(budgets)
            with interruption.at_once():
                done = [job for job in plan.runs if _done(job, lambda line: _warn(board, line))]
                todo = [job for job in plan.runs if job not in done]
                needed = {name for job in todo for name in job.needs}
                jobs = [job for job in plan.preparations() if job.name in needed] + todo
            _remember(plan.workdir, options, overrides)
            with board:
                states = runner.run(jobs, done, chosen, board, interruption)
    except Interrupted as signal:
        print(f"{signal}: stopped; the same command goes on", file=sys.stderr)
        return 130
    failed = [state for state in states if state.state == "failed"]
    for state in failed:
        how = f" ({state.tries} tries; {state.job.log})" if state.tries else ""
        _warn(board, f"{state.job.name} failed, {state.note}{how}")
    board.print(Text(f"{len(states) - len(failed)} of {len(states)} done in {plan.workdir}"))
    return 1 if failed else 0


def _done(job: Job, warn: Callable[[str], None]) -> bool:
    """Whether the run is finished. Raises InputError, which names it, where its folder has another run."""
    from capcur_jax.checks import finished  # here: --help should not wait for JAX

    try:
        return finished(job.folder, job.config, warn) is not None
    except InputError as error:
        raise InputError(f"{job.name}, {job.folder}: {error}") from None


def _remember(workdir: Path, options: argparse.Namespace, overrides: Sequence[str]) -> None:
    """Adds this command to those that made the grid's runs, for its report."""
    told = [f"--{name}={getattr(options, name)}" for name in ("rows", "seeds", "preset", "jobs", "workdir")]
    if options.executor != "local":
        told += [f"--executor={options.executor}", *(f"--slurm={setting}" for setting in options.slurm)]
    command = shlex.join(["python", "-m", "capcur_jax.ablations", *told, *overrides])
    file = workdir / COMMANDS
    known = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    if command not in known:
        write_atomically(file, "".join(f"{line}\n" for line in [*known, command]).encode())


def _console(file: TextIO) -> Console:
    """Wide enough for the tables where nobody's window says otherwise."""
    return Console(file=file, highlight=False, width=None if file.isatty() else 120)


def _warn(board: watch.Board, text: str) -> None:
    board.print(Text.assemble(("warning: ", "bold yellow"), visible(text)))


def _budgets(names: Sequence[str], preset: str, overrides: Sequence[str]):
    """The table of what the rows train on, and in what they differ from those that they are compared with."""
    compared = {name: list(ROWS[name].compared) for name in names}
    wanted = dict.fromkeys([*names, *(other for others in compared.values() for other in others)])
    found = {name: budget.of(presets.read(config_file(ROWS[name], preset), overrides)) for name in wanted}
    rows = budget.described(names, found, compared)
    return titled("Prompts of each set, updates, and what differs", budget.HEAD, rows)


def _names(given: str) -> list[str]:
    names = list(dict.fromkeys(filter(None, (name.strip() for name in given.split(",")))))
    if not names:
        raise InputError(f"--rows is empty; choose from {', '.join(ROWS)}")
    return names


def _seeds(given: str) -> list[int]:
    try:
        seeds = list(dict.fromkeys(int(seed) for seed in given.split(",")))
    except ValueError:
        raise InputError(f"--seeds={given}: give whole numbers, such as 0,1,2") from None
    return seeds


if __name__ == "__main__":
    streams.prepare()
    try:
        sys.exit(main())
    except KeyboardInterrupt:  # before a run was started, or the second signal
        sys.exit(130)
