"""Tables beside the paper's: what is missing, every comparison, kinds of questions, errors of perception, cost."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from capcur_jax.evaluation import counterfactual, errors, folders
from capcur_jax.grid.report.claims import METRICS, Measures
from capcur_jax.grid.report.gather import Grid, Run, read_json
from capcur_jax.grid.report.tables import Cell, Line, Table, change
from capcur_jax.grid.rows import ROWS
from capcur_jax.records.text import is_number, number, visible
from capcur_jax.report.page import duration


def missing(grid: Grid) -> Table:
    """Rows without a run, runs that are not finished, seeds that others have."""
    lines = [Line(run.row, (Cell(run.row), Cell(str(run.seed)), Cell(visible(run.trouble)))) for run in grid.others]
    there = {run.row for run in (*grid.runs, *grid.others)}
    lines += [Line(row, (Cell(row), Cell("all"), Cell("no run"))) for row in ROWS if row not in there]
    seeds = sorted({run.seed for run in (*grid.runs, *grid.others)})
    begun = {(run.row, run.seed) for run in (*grid.runs, *grid.others)}
    for row in (row for row in ROWS if row in there):
        if fewer := [str(seed) for seed in seeds if (row, seed) not in begun]:
            lines.append(Line(row, (Cell(row), Cell(", ".join(fewer)), Cell("no run of these seeds"))))
    if grid.runs and "base" not in grid.rows:
        lines.append(Line("base", (Cell("base"), Cell("all"), Cell("no run kept its answers of the base"))))
    return Table("What is missing", "", ("row", "seed", "why"), tuple(lines))


def comparisons(measures: Measures) -> Table:
    """Every row against those that it is to be compared with (docs/ablations.md) and the base, in every figure."""
    metrics = [name for name in METRICS if measures.weights(name)]
    lines = []
    for row in measures.grid.rows:
        for other in [*(ROWS[row].compared if row in ROWS else ()), "base"]:
            found = {name: measures.difference(row, other, name) for name in metrics} if row != other else {}
            if not any(found.values()):
                continue
            cells = [change(one[0], METRICS[name].tokens) if one else Cell("-") for name, one in found.items()]
            lines.append(Line(row, (Cell(row), Cell(other), *cells)))
    note = (
        "Points, of lengths per cent, with 95 % intervals that are not adjusted: of so many comparisons some look like "
        "differences by chance. The claims above are those that were fixed before."
    )
    head = ("row", "against", *(METRICS[name].title for name in metrics))
    return Table("All comparisons", note, head, tuple(lines))


def kinds(grid: Grid) -> Table:
    """Accuracy of each kind of question of each set, mean over seeds, and their range."""
    counts = {(name, kind): count for name, of in grid.kinds.items() for kind, count in sorted(Counter(of).items())}
    chosen = [one for one in counts if one[1]]
    lines = []
    for row, figures in grid.rows.items():
        cells = []
        for name, kind in chosen:
            found = 100 * figures.credit[name][:, [one == kind for one in grid.kinds[name]]].mean(1)
            spread = f"{found.min():.1f} to {found.max():.1f}" if len(found) > 1 else ""
            cells.append(Cell(f"{found.mean():.1f}", spread))
        lines.append(Line(row, (Cell(row), *cells)))
    head = ("row", *(visible(f"{name}: {kind} ({counts[name, kind]:,})") for name, kind in chosen))
    note = "Per cent right; in small: lowest and highest seed. In brackets: questions."
    return Table("Accuracy by kind of question", note, head, tuple(lines) if chosen else ())


def perception_errors(grid: Grid) -> Table | None:
    """Shares of wrong answers that are errors of perception, where a run has them; None where none has."""
    found: dict[tuple[str, str, str], list[float]] = {}
    for run in grid.runs:
        for name, ways in (_json(run, counterfactual.FILE).get("sets") or {}).items():
            for way in counterfactual.WAYS:
                share = (ways.get(way) or {}).get("limited_of_wrong")
                if share:
                    found.setdefault((run.row, name, f"told the facts: {way}"), []).append(100 * share[0])
        judged = _json(run, errors.FILE)
        for which in ("first", "anywhere"):
            share = (((judged.get("all") or {}).get(which) or {}).get("perception") or {}).get("share")
            if share:
                found.setdefault((run.row, "all", f"judge: {which}"), []).append(100 * share[0])
    if not found:
        return None
    lines = [
        Line(row, (Cell(row), Cell(name), Cell(how), Cell(str(len(shares))), _range(shares)))
        for (row, name, how), shares in found.items()
    ]
    note = (
        "Per cent of wrong answers; in small: lowest and highest seed. Far below 0: the model can't use facts told so. "
        f"The paper: {errors.PAPER['share']} % of {errors.PAPER['of']}."
    )
    return Table("Errors of perception", note, ("row", "set", "how", "seeds", "perception, %"), tuple(lines))


def seen(grid: Grid) -> Table:
    """What the rows were really trained on: a selection by pass rate may leave fewer problems than were planned."""
    lines = []
    for row in dict.fromkeys(run.row for run in grid.runs):
        found = [_seen(run) for run in grid.of(row)]
        prompts, problems = (statistics.fmean(one[at] for one in found) for at in (0, 1))
        times = number(prompts / problems, ".2f") if problems else ""
        cells = (number(prompts, ",.0f"), number(problems, ",.0f"), times)
        lines.append(Line(row, (Cell(row), *(Cell(one or "-") for one in cells))))
    note = (
        "Means over seeds. Prompts: of all steps in the records. Problems: of the stages' plans, after selection, so "
        "that a row that leaves some out shows here how often it saw the others."
    )
    return Table("What was seen", note, ("row", "prompts", "different problems", "times each"), tuple(lines))


def _seen(run: Run) -> tuple[float, float]:
    """(prompts, problems); nan where the run's files do not say."""
    stages = read_json(run.folder / "config.json").get("stages") or {}
    steps = {record["step"]: record.get("stage") for record in run.records if record.get("type") == "step"}
    sizes = [(stages.get(stage) or {}).get("prompts", math.nan) for stage in steps.values()]
    planned = [stage.get("problems", math.nan) for stage in run.summary.get("stages") or ()]
    return math.fsum(sizes), math.fsum(planned) if planned else math.nan


def cost(grid: Grid) -> Table:
    """What the runs took, means over seeds."""
    lines = []
    for row in dict.fromkeys(run.row for run in grid.runs):
        runs = grid.of(row)
        seconds = [run.summary.get("seconds") for run in runs]
        hours = [s * run.summary.get("devices") / 3600 for s, run in zip(seconds, runs, strict=True)
                 if is_number(s) and is_number(run.summary.get("devices"))]  # fmt: skip
        steps = [[record for record in run.records if record.get("type") == "step"] for run in runs]
        lines.append(
            Line(row, (
                Cell(row), Cell(str(len(runs))), Cell(f"{_mean(len(some) for some in steps):,.0f}"),
                Cell(duration(_mean(filter(is_number, seconds))) or "-"),
                Cell(number(_mean(hours), ",.2f") if len(hours) == len(runs) else "-"),
                Cell(number(_mean(_total(some, "tokens") for some in steps), ",.0f") or "-"),
                Cell(number(_mean(_total(some, "trained_tokens") for some in steps), ",.0f") or "-"),
            ))
        )  # fmt: skip
    note = (
        "Means over seeds. Wall time: of the whole run with its evaluations, on a machine that may have done other "
        "things. Tokens: prompts and responses that updates went through; trained: those of responses."
    )
    head = ("row", "runs", "steps", "wall time", "device-hours", "tokens", "trained tokens")
    return Table("Cost", note, head, tuple(lines))


def _total(steps: Sequence[Any], key: str) -> float:
    """A step that is recorded twice (a run that went on) counts once."""
    return sum({record["step"]: record[key] for record in steps if is_number(record.get(key))}.values())


def _mean(values: Iterable[float]) -> float | None:
    values = list(values)
    return statistics.fmean(values) if values else None


def _range(shares: Sequence[float]) -> Cell:
    spread = f"{min(shares):.1f} to {max(shares):.1f}" if len(shares) > 1 else ""
    return Cell(f"{statistics.fmean(shares):.1f}", spread)


def _json(run: Run, name: str) -> dict[str, Any]:
    return read_json(run.folder / folders.FINAL / name)
