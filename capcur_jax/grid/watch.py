"""How far the runs of a grid are, from the records that they leave, and the one table that shows it."""

from __future__ import annotations

import json
import os
import statistics
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

from capcur_jax.records import lines, tables
from capcur_jax.records.text import is_number, visible

TAIL = 1 << 16  # bytes of metrics.jsonl: some dozens of steps
RECENT = 20  # steps whose pace and accuracy are shown
LINE_S = 60.0  # between lines about running runs, where there is no terminal
STATES = ("running", "failed", "done", "waiting")  # in the order of the table


class Progress(NamedTuple):
    """Of a run, by its records."""

    step: int = 0
    stage: str = ""
    left: float | None = None  # seconds, evaluations and compilations left out
    accuracy: str = ""  # of recent rollouts, or of the held-out questions at the end


class Line(NamedTuple):
    """What is shown of a job."""

    name: str
    state: str  # one of STATES
    steps: int
    progress: Progress
    note: str = ""  # why it failed, or which try it is


def progress(folder: Path, steps: int) -> Progress:
    """Of the run in this work directory; `steps`: of the whole run, 0: not known."""
    if (done := summary(folder)).get("status") == "finished":
        finals = [values.get("final") for values in (done.get("accuracy") or {}).values()]
        shown = " / ".join(f"{100 * value:.1f}" if is_number(value) else "-" for value in finals)
        return Progress(done.get("steps", 0), "", None, shown)
    recent = [record for record in _tail(folder / "metrics.jsonl") if record.get("type") == "step"][-RECENT:]
    if not recent:
        return Progress()
    last, pace = recent[-1], [r["seconds"] for r in recent if is_number(r.get("seconds")) and not r.get("compilations")]
    right = [record["accuracy"] for record in recent if is_number(record.get("accuracy"))]
    left = (steps - last["step"]) * statistics.median(pace) if pace and steps else None
    accuracy = f"{statistics.fmean(right):.1%} sampled" if right else ""
    return Progress(last["step"], str(last.get("stage", "")), left, accuracy)


def summary(folder: Path) -> dict[str, Any]:
    """summary.json; {} where there is none."""
    try:
        found = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _tail(path: Path) -> Iterable[Mapping[str, Any]]:
    """The last whole records of a file that is being written."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - TAIL))
            found = file.read().split(b"\n")[size > TAIL : -1]
    except OSError:
        return
    for line in found:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict):
            yield record


class Board:
    """One live table on a terminal; elsewhere a line for each change, and one a minute for each running run. A context
    manager."""

    def __init__(self, console: Console | None = None):
        self.console = console or Console(highlight=False)
        self._lines: Sequence[Line] = ()
        self._states: dict[str, tuple[str, str]] = {}
        self._started = self._said = time.monotonic()
        interactive = self.console.is_interactive and getattr(self.console.file, "isatty", lambda: False)()
        self._live: Live | None = None
        if interactive:
            self._live = Live(get_renderable=self.rendered, console=self.console, refresh_per_second=2)

    def __enter__(self) -> Self:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *unused) -> None:
        if self._live:
            self._live.stop()

    def print(self, *what: RenderableType) -> None:
        for one in what:
            self.console.print(one, soft_wrap=isinstance(one, Text) and not self._live)

    def show(self, found: Sequence[Line]) -> None:
        """The jobs as they are now, in the order of the grid."""
        self._lines = found
        if self._live:
            return
        due = time.monotonic() - self._said >= LINE_S
        if due:
            self._said = time.monotonic()
        for line in found:
            now = line.state, line.note
            first = line.name not in self._states
            changed = now != self._states.get(line.name)
            self._states[line.name] = now
            if (changed and not (first and line.state == "waiting")) or (due and line.state == "running"):
                self.print(Text(visible("  ".join(filter(None, _cells(line))))))

    def rendered(self) -> RenderableType:
        """The table; of more jobs than fit, running and failed ones first, then the last that are done."""
        shown = [line for state in STATES for line in _recent_first(self._lines, state)]
        room = max(4, self.console.height - 5)
        cells = [_cells(line) for line in shown[:room]]
        counts = Counter(line.state for line in self._lines)
        said = [f"{counts[state]} {state}" for state in ("done", "running", "waiting", "failed") if counts[state]]
        said.append(lines.duration(time.monotonic() - self._started))
        hidden = f", {len(shown) - room} not shown" if len(shown) > room else ""
        head = ("run", "state", "step", "left", "accuracy, %", "")
        return Group(tables.table(head, cells), Text(", ".join(said) + hidden, style="dim"))


def _recent_first(found: Sequence[Line], state: str) -> list[Line]:
    mine = [line for line in found if line.state == state]
    return mine[::-1] if state == "done" else mine


def _cells(line: Line) -> tuple[str, ...]:
    step = f"{line.progress.step:,}" + (f"/{line.steps:,}" if line.steps else "") if line.progress.step else ""
    step = " ".join(filter(None, [step, line.progress.stage]))
    left = lines.duration(line.progress.left) if line.state == "running" and line.progress.left is not None else ""
    return line.name, line.state, step, left, line.progress.accuracy, line.note
