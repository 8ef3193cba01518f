"""What the user of a run sees: the plan, one progress bar, evaluations, and the closing table.

On a terminal a live bar stays at the bottom. Elsewhere (a CI log, a file, a pipe) each method writes plain lines, and
`step` writes one line every few steps. Nothing here decides anything: all numbers come from the run's records.
"""

import contextlib
import os
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from capcur_jax.records import lines, tables
from capcur_jax.records.text import counted, moments_of, visible

LOG_WIDTH = 120


class Display:
    """Shows a run. A context manager: leaving it (Ctrl-C and errors too) stops the live bar and restores the cursor.

    Args:
      quiet: show warnings only, for processes other than the first of a multi-host run.
      console: where to write; standard output by default.
      line_steps, line_seconds: without a live bar, `step` writes a line after this many steps or seconds,
        whichever comes first, and at the first step of a stage and the last of the run.
    """

    def __init__(
        self,
        *,
        quiet: bool | None = False,
        console: Console | None = None,
        line_steps: int = 10,
        line_seconds: float = 10.0,
    ):
        self.console = console or _console()
        self.total_steps = 0
        self._quiet = bool(quiet)
        self._line_steps, self._line_seconds = line_steps, line_seconds
        self._start = self._last_line = time.monotonic()
        self._stage, self._stages_seen = "", 0
        self._new_stage = True
        self._recent_seconds: deque[float] = deque(maxlen=20)
        self._metrics: list[lines.Pieces] = []
        self._base: dict[str, float] = {}
        self._health: Callable[[], Any] | None = None
        columns = (TextColumn("{task.description}", markup=False), BarColumn(None), _Count(), _Times())
        self._progress = Progress(*columns, console=self.console, expand=True)
        self._run_task = self._progress.add_task("", total=0, visible=False, run=True, left=None)
        # FORCE_COLOR makes rich take any stream for a terminal, so the stream itself is asked as well.
        interactive = self.console.is_interactive and getattr(self.console.file, "isatty", lambda: False)()
        self._live: Live | None = None
        if interactive and not self._quiet:
            self._live = Live(get_renderable=self._render, console=self.console, refresh_per_second=4)

    def __enter__(self) -> Self:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *exc_info) -> None:
        self.close()

    def close(self) -> None:
        """Stops the live bar, leaving its last state on the screen. Methods called later write plain lines."""
        live, self._live = self._live, None
        if live:
            live.stop()

    def watch(self, health: Callable[[], Any]) -> None:
        """Shows what the rollout engine is doing below the bar (rollout/engine.py's Health), as long as it samples."""
        self._health = health

    def plan(self, sections: Mapping[str, Mapping[str, Any] | Sequence[Mapping[str, Any]]]) -> None:
        """Prints what the run is going to do.

        Args:
          sections: heading -> a dict (printed as "key  value" rows) or a list of dicts (printed as a table; the first
            dict's keys are the columns). Whole numbers get thousands separators. For example
            `{"Run": {"parameters": 3280000, "devices": "2 x CPU"}, "Stages": [{"stage": "text", "steps": 100}]}`.
        """
        for heading, content in sections.items():
            if isinstance(content, Mapping):
                rows: RenderableType = tables.pairs(content)
            else:
                rows = tables.table(list(content[0]) if content else [], [list(row.values()) for row in content])
            self._print(Text(visible(heading), style="bold"), rows, Text())

    def table(self, heading: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Prints a table: the first row's keys are the columns."""
        self.plan({heading: rows})

    def whole_run(self, steps: int, done: int = 0) -> None:
        """Steps of the whole run, all stages together, and those that are done where it goes on."""
        self.total_steps = steps
        self._progress.update(self._run_task, total=steps, completed=done)

    def stage(self, name: str, steps: int) -> None:
        """Announces a stage of `steps` steps."""
        self._stage, self._new_stage = visible(name), True
        self._stages_seen += 1
        self._recent_seconds.clear()  # another stage, another response length: the old pace says little
        self._metrics = []
        self._progress.update(self._run_task, description=self._stage, visible=True)
        title = f"Stage {self._stages_seen}: {self._stage}, {steps:,} steps"
        self._print(Text(), Rule(title, align="left", style="cyan") if self._live else Text(title, style="bold"))

    def step(self, record: Mapping[str, Any]) -> None:
        """Shows a step record of metrics.jsonl; its `step` is the number of steps done in the whole run."""
        done = int(record["step"])
        if not record.get("compilations"):  # the first step of a stage would say hours
            self._recent_seconds.append(lines.finite(record, "seconds") or 0.0)
        left = (self.total_steps - done) * statistics.median(self._recent_seconds) if self._recent_seconds else None
        self._metrics = [lines.learning(record), lines.pace(record)]
        self._progress.update(self._run_task, completed=done, left=left)
        if self._live:
            return
        now = time.monotonic()
        due = done % self._line_steps == 0 or now - self._last_line >= self._line_seconds
        if due or self._new_stage or done == self.total_steps:
            self._new_stage, self._last_line = False, now
            width = len(str(self.total_steps))
            parts = [[("", f"step {done:>{width}}/{self.total_steps}"), ("", self._stage)], *self._metrics]
            if left is not None:
                parts.append([("left", lines.duration(left))])
            self._print(lines.join([piece for part in parts for piece in part]))

    def earlier(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Evaluation records that are not shown: those of the base are what later ones are compared with."""
        bases = {str(record["capability"]): record for record in records if record.get("after") == "base"}
        found = {name: lines.finite(record, "accuracy") for name, record in bases.items()}
        self._base |= {name: value for name, value in found.items() if value is not None}

    def evaluation(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Prints the evaluation records (of metrics.jsonl) of one moment, with the difference to the base in points."""
        if not records:
            return
        after, step = records[0].get("after", ""), records[0].get("step")
        accuracies = {str(record["capability"]): lines.finite(record, "accuracy") for record in records}
        self.earlier(records)
        versus_base = bool(self._base) and after != "base"
        partial = any(record.get("left_out") for record in records)
        columns = ["capability", "accuracy", *(["vs base"] if versus_base else [])]
        columns += ["left out", "without", "format", "length"] if partial else ["format", "length", "questions"]
        rows = []
        for record in records:
            name = str(record["capability"])
            difference = [_points(accuracies[name], self._base.get(name))] if versus_base else []
            shares = [_share(accuracies[name]), *difference]
            questions, left_out = record.get("questions", ""), record.get("left_out", 0)
            if partial:
                of = f"{left_out:,} of {(questions or 0) + left_out:,}"
                shares += [of, _share(lines.finite(record, "accuracy_answered"))]
            said = [_share(lines.finite(record, "format")), lines.show(record, "response_length", ".1f")]
            rows.append([name, *shares, *said, *([] if partial else [questions])])
        moment = "of the base" if after == "base" else f"after {visible(str(after))}"
        moment += f" (step {step:,})" if isinstance(step, int) else ""
        self._print(Text(), Text(f"Held-out accuracy {moment}", style="bold"), tables.table(columns, rows))

    def note(self, text: str) -> None:
        """Prints a line."""
        self._print(Text(visible(text)))

    def warn(self, text: str) -> None:
        """Prints a warning; `quiet` doesn't hide it."""
        self.console.print(Text.assemble(("warning: ", "bold yellow"), visible(text)), soft_wrap=not self._live)

    @contextlib.contextmanager
    def progress(self, description: str, total: int | None = None) -> Iterator[Callable[..., None]]:
        """A bar below the run's, for evaluation and warm-up: `with display.progress("warm-up", 3) as advance: ...`.

        Yields:
          `advance(count=1)`, to be called when `count` more of `total` (None: unknown) are done.
        """
        description, start, done = visible(description), time.monotonic(), 0
        task = self._progress.add_task(description, total=total) if self._live else None
        last_line = start

        def advance(count: int = 1) -> None:
            nonlocal done, last_line
            done += count
            if task is not None:
                self._progress.advance(task, count)
            elif done != total and time.monotonic() - last_line >= self._line_seconds:  # the end has its own line
                last_line = time.monotonic()
                self._print(Text(f"{description}: {done:,}" + (f"/{total:,}" if total else "")))

        try:
            yield advance
        finally:
            if task is not None:
                self._progress.remove_task(task)
            elif (seconds := time.monotonic() - start) >= 1 or done:
                self._print(Text(f"{description}: " + (f"{done:,} in " if done else "") + f"{seconds:.1f} s"))

    def final(self, summary: Mapping[str, Any], files: Mapping[str, Any] | None = None) -> None:
        """Stops the bar and prints the closing tables.

        Args:
          summary: what summary.json holds.
          files: label -> path of what the run leaves ("report", "metrics"); `summary["checkpoint"]` comes on top.
        """
        self.close()
        status = str(summary.get("status", "finished"))
        title = f"Run {visible(status)}" + (f" after {summary['steps']:,} steps" if "steps" in summary else "")
        self._print(Text(), Text(title, style="bold green" if status == "finished" else "bold yellow"))
        if summary.get("accuracy"):
            self._print(_accuracy_table(summary), Text())
        facts = {
            "time": lines.duration(summary["seconds"]) if lines.finite(summary, "seconds") is not None else None,
            "step, median": lines.show(summary, "step_seconds_median", ".3g", " s"),
            "compilations after warm-up": summary.get("compilations_after_warmup"),
            "log-prob difference, mean": lines.show(summary, "logprob_difference_mean", ".2e", " nats"),
            "format reward at the end": lines.show(summary, "format_reward_final", ".3f"),
            "instruction": _instruction(summary.get("instruction") or {}),
            "skipped": counted(summary.get("skipped")),
            "put right": counted(summary.get("put_right")),
        }
        self._print(tables.pairs({label: value for label, value in facts.items() if value not in (None, "")}), Text())
        for label, path in {"checkpoint": summary.get("checkpoint"), **(files or {})}.items():
            if path:  # whole paths, never folded, so that they can be copied
                self._print(Text.assemble((f"{label:<12}", "dim"), visible(str(path))))

    def _print(self, *renderables: RenderableType) -> None:
        for renderable in renderables if not self._quiet else ():
            # Without a live bar text isn't folded: a log line stays one line, a path can be copied.
            self.console.print(renderable, soft_wrap=isinstance(renderable, Text) and not self._live)

    def _render(self) -> RenderableType:
        metrics = [*self._metrics, lines.sampling(self._health())] if self._health else self._metrics
        folded = [line for pieces in metrics for line in lines.wrap(pieces, self.console.width)]
        return Group(self._progress, *folded)


def _console() -> Console:
    """Standard output. Where nobody tells its width, as in a log, lines have room for a path."""
    known = sys.stdout.isatty() or "COLUMNS" in os.environ
    return Console(highlight=False, width=None if known else LOG_WIDTH)


class _Count(ProgressColumn):
    """ "12/300", right-aligned so that the bar doesn't jump."""

    def render(self, task: Task) -> Text:
        total = f"{int(task.total):,}" if task.total is not None else "?"
        return Text(f"{int(task.completed):>{len(total)},}/{total}")


class _Times(ProgressColumn):
    """Elapsed and left; the run's own estimate leaves evaluations and compilations out."""

    def render(self, task: Task) -> Text:
        left = task.fields.get("left") if task.fields.get("run") else task.time_remaining
        elapsed = lines.duration(task.elapsed or 0.0)
        return Text(f"{elapsed:>5}" + (f", {lines.duration(left):>5} left" if left is not None else ""), style="dim")


def _accuracy_table(summary: Mapping[str, Any]) -> Table:
    """A row for the base, each stage and the end; a column for each capability, the best value bold.

    Stages are rows because a run can have any number of them, and 80 columns can't.
    """
    accuracy, blind = summary["accuracy"], summary.get("blind") or {}
    rows = []
    for moment, title in moments_of(accuracy).items():
        rows.append([title, *(_share_cell(values, moment) for values in accuracy.values())])
        beside = [_without_left_out(summary, name, moment) for name in accuracy]
        if any(beside):
            rows.append(["  answered alone (left out)", *beside])
    made = tables.table(["held-out accuracy, %", *accuracy], rows)
    if any(lines.finite(blind, name) is not None for name in accuracy):
        cells = [lines.show(blind, name, ".1%").rstrip("%") if name in blind else "-" for name in accuracy]
        made.add_section()
        made.add_row("guessing without the image", *cells, style="dim")
    return made


def _without_left_out(summary: Mapping[str, Any], name: str, moment: str) -> str:
    """The percentage of the answered questions and how many were not, where there are such."""
    count = ((summary.get("left_out") or {}).get(name) or {}).get(moment)
    share = lines.finite((summary.get("accuracy_answered") or {}).get(name) or {}, moment)
    return f"{'-' if share is None else f'{100 * share:.1f}'} ({count:,})" if count else ""


def _share_cell(values: Mapping[str, Any], moment: str) -> Text:
    """One capability's percentage at a moment, bold where it is the best, and the points against the base."""
    value, base = lines.finite(values, moment), lines.finite(values, "base")
    best = max((lines.finite(values, other) or 0.0 for other in values), default=0.0)
    cell = Text("-" if value is None else f"{100 * value:.1f}", style="bold" if value == best else "")
    if moment != "base" and base is not None:
        cell.append(f" {_points(value, base):>6}", style="not bold dim")
    return cell


def _instruction(placements: Mapping[str, Any]) -> str:
    """Where the instruction stood in training, in evaluations, and for the base; "" where that is one and the same."""
    return ", ".join(f"{purpose} {where}" for purpose, where in placements.items()) * (
        len(set(placements.values())) > 1
    )


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _points(value: float | None, before: float | None) -> str:
    return "" if value is None or before is None else f"{100 * (value - before):+.1f}"
