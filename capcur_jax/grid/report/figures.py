"""Charts of a grid: curves of each row with the band of its seeds, accuracy after each stage, and the claims."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from capcur_jax.grid.report.claims import METRICS, Found
from capcur_jax.grid.report.gather import Grid, Run
from capcur_jax.records import metrics
from capcur_jax.records.text import is_number, moments_of
from capcur_jax.report import bands, charts

# Keys of step records, their titles and scales: what is drawn of each row.
CURVES = (
    ("accuracy", "training accuracy", "% of responses", 100),
    ("response_length", "response length", "tokens", 1),
)


class Chart(NamedTuple):
    row: str
    svg: str


def curves(grid: Grid) -> list[Chart]:
    """Of each row: held-out accuracy at each moment, and CURVES over the steps."""
    found = []
    for row in dict.fromkeys(run.row for run in grid.runs):
        runs = grid.of(row)
        steps = [_steps(run) for run in runs]
        found.append(Chart(row, _moments(row, runs)))
        stages = charts.stages_of(list(steps[0].values()))
        numbers = sorted(set().union(*steps))
        for key, title, unit, scale in CURVES:
            values = np.array([[_number(some.get(step, {}).get(key)) for step in numbers] for some in steps])
            if values.size:
                svg = bands.seeds_chart(f"{row}: {title}", unit, numbers, scale * values, stages)
                found.append(Chart(row, svg))
    return [chart for chart in found if chart.svg]


def claims(found: Sequence[Found]) -> str:
    """SVG of all differences that can be said, in points; of lengths in per cent. "" of none."""
    spans = []
    for one in found:
        if one.difference is None:
            continue
        low, high = map(float, one.difference.interval())
        label = f"{one.claim.rows}, {METRICS[one.claim.metric].title}"
        spans.append(bands.Span(label, float(one.difference.mean), low, high, tuple(one.paper.values())))
    return bands.spans_chart("Claims: ours, and the paper's (x)", "points; of lengths %", spans) if spans else ""


class Moments(NamedTuple):
    """Held-out accuracy of a row's runs, in per cent.

    titles, steps: of the moments: the first at 0, then the end of each stage; of one without a step that of the one
    before. accuracy: set -> [seeds, moments]. stages: (name, first step less 1, last step) of the first run.
    """

    titles: list[str]
    steps: list[int]
    accuracy: dict[str, np.ndarray]
    stages: list[tuple[str, int, int]]


def moments(runs: Sequence[Run]) -> Moments | None:
    """None where the runs have different moments, or none."""
    accuracies = [run.summary.get("accuracy") or metrics.accuracy_of(_evaluations(run)) for run in runs]
    titles = {key: title for key, title in moments_of(accuracies[0]).items() if key != "final"}
    lines = {
        name: np.array([[100 * _number(some.get(name, {}).get(moment)) for moment in titles] for some in accuracies])
        for name in accuracies[0]
    }
    stages = charts.stages_of(list(_steps(runs[0]).values()))
    if not titles or not all(np.isfinite(each).all() for each in lines.values()):
        return None
    ends, steps = {f"after_{stage.name}": stage.last for stage in stages}, [0]
    steps += [ends.get(key, 0) for key in list(titles)[1:]]
    spans = [(stage.name, stage.first - 1, stage.last) for stage in stages]
    return Moments(list(titles.values()), np.maximum.accumulate(steps).tolist(), lines, spans)


def _moments(row: str, runs: Sequence[Run]) -> str:
    found = moments(runs)
    return bands.moments_chart(f"{row}: held-out accuracy", found.titles, found.accuracy) if found else ""


def _evaluations(run: Run) -> list[Mapping[str, Any]]:
    return [record for record in run.records if record.get("type") == "evaluation"]


def _steps(run: Run) -> dict[int, Mapping[str, Any]]:
    """By number; of a step that is recorded twice the last."""
    steps = {record["step"]: record for record in run.records if record.get("type") == "step"}
    return {step: steps[step] for step in sorted(steps)}


def _number(value: Any) -> float:
    return float(value) if is_number(value) else np.nan
