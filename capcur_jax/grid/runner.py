"""Runs the jobs of a grid: so many side by side, those that died again, and the others although one failed."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path

from capcur_jax.grid import watch
from capcur_jax.grid.executors import Executor, Running
from capcur_jax.grid.jobs import Job, command
from capcur_jax.interruption import Interruption

TRIES = 3  # of a job that dies
POLL_S = 0.2
LOOK_S = 1.0  # between looks into the records
STOP_S = 120.0  # that a run gets to save what it has learned
# What is said where another try would end alike; a run that lost its servers says how to go on.
_REFUSED, _GOES_ON = "error: ", "the same command with --workdir"


@dataclasses.dataclass
class State:
    """Of a job. `state`: one of watch.STATES."""

    job: Job
    state: str = "waiting"
    tries: int = 0
    note: str = ""
    running: Running | None = None
    log_from: int = 0  # where its last try begins in the log
    line: watch.Line | None = None  # as it was last shown


def run(
    jobs: Sequence[Job], done: Sequence[Job], executor: Executor, board: watch.Board, interruption: Interruption
) -> list[State]:
    """Runs `jobs`, in their order as far as they need none of the others; returns how they ended.

    Args:
      done: jobs that are done already; they are shown.

    Raises Interrupted after a signal, when the runs have saved and ended.
    """
    states = [State(job, "done") for job in done] + [State(job) for job in jobs]
    looked = 0.0
    try:
        while True:
            for state in states:
                _ended(state)
            with executor.together():
                _start(states, executor)
            busy = any(state.running for state in states)
            if time.monotonic() - looked >= LOOK_S or not busy:
                looked = time.monotonic()
                board.show([_line(state) for state in states])
            if not busy:
                return states
            interruption.check()
            time.sleep(POLL_S)
    except BaseException:
        _stop([state.running for state in states if state.running])
        raise


def _start(states: Sequence[State], executor: Executor) -> None:
    """Starts what waits for nothing, as far as there is room; fails what waits for what failed."""
    by_name = {state.job.name: state for state in states}
    for state in states:
        if state.state != "waiting":
            continue
        needed = [by_name[name] for name in state.job.needs if name in by_name]
        if failed := [f"{other.job.name} ({other.job.log})" for other in needed if other.state == "failed"]:
            state.state, state.note = "failed", f"needs {', '.join(failed)}"
        elif all(other.state == "done" for other in needed):
            if sum(other.running is not None for other in states) >= executor.width:
                return
            state.tries += 1
            try:
                state.log_from = state.job.log.stat().st_size if state.job.log.exists() else 0
                state.running = executor.start(command(state.job), state.job.log)
            except OSError as error:  # the others may be luckier
                state.state, state.note = "failed", f"can't be started: {error}"
            else:
                state.state = "running"


def _ended(state: State) -> None:
    """Notes a job that ended: done, to be tried again, or failed."""
    if state.running is None or (code := state.running.poll()) is None:
        return
    state.running = None
    if code == 0:
        state.state, state.note = "done", ""
        return
    said = _said(state.job.log, state.log_from)
    last = next((line for line in reversed(said.splitlines()) if line.strip()), "")
    why = f"signal {-code}" if code < 0 else f"exit code {code}"
    state.note = f"{why}: {last}" if last and code > 0 else why
    refused = any(line.startswith(_REFUSED) for line in said.splitlines()) and _GOES_ON not in said
    if refused or state.tries >= TRIES:
        state.state = "failed"
    else:
        state.state, state.note = "waiting", f"try {state.tries} of {TRIES} ended: {state.note}"


def _said(log: Path, start: int) -> str:
    try:
        with log.open("rb") as file:
            file.seek(start)
            return file.read().decode("utf-8", "replace")
    except OSError:
        return ""


def _line(state: State) -> watch.Line:
    job = state.job
    ended = state.state in ("done", "failed")
    if state.line is None or not ended or state.line.state != state.state:
        found = watch.Progress() if job.config is None else watch.progress(job.folder, job.steps)
        state.line = watch.Line(job.name, state.state, job.steps, found, state.note)
    return state.line


def _stop(running: Sequence[Running]) -> None:
    """Lets the runs save and end; kills those that take too long, and all after a second signal."""
    for one in running:
        one.stop()
    until = time.monotonic() + STOP_S
    with contextlib.suppress(KeyboardInterrupt):
        while any(one.poll() is None for one in running) and time.monotonic() < until:
            time.sleep(POLL_S)
    for one in running:
        if one.poll() is None:
            one.kill()
