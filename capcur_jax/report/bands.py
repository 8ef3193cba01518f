"""Charts of several runs at once: SVG text in the style of charts.py."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib import rc_context

from capcur_jax.report import charts
from capcur_jax.report.charts import SERIES, STYLE, Stage

POINTS = 120  # of a band


class Span(NamedTuple):
    """A figure with its interval."""

    label: str
    mean: float
    low: float
    high: float
    marks: tuple[float, ...] = ()  # figures of others, beside it


def seeds_chart(title: str, unit: str, steps: Any, runs: Any, stages: Sequence[Stage]) -> str:
    """SVG of a row's seeds: their mean as a line, lowest and highest as a band, a shade for every second stage.

    Args:
      steps: [steps], rising. runs: [seeds, steps], nan where a run has none.
      stages: of the first run.
    """
    steps, runs = _means(np.asarray(steps, float)[None], POINTS)[0], _means(np.asarray(runs, float), POINTS)
    seen = np.isfinite(runs).any(0)
    if not seen.any():
        return ""
    steps, runs = steps[seen], runs[:, seen]
    with rc_context(STYLE):
        figure, axes = charts.new_axes(title, unit, stages)
        axes.fill_between(steps, np.nanmin(runs, 0), np.nanmax(runs, 0), color=SERIES[0], alpha=0.25, linewidth=0)
        axes.plot(steps, np.nanmean(runs, 0), color=SERIES[0], linewidth=1.6, marker="o" if len(steps) == 1 else None)
        return charts.svg(figure, legend=False)


def moments_chart(title: str, moments: Sequence[str], lines: Mapping[str, Any]) -> str:
    """SVG of held-out accuracy, in per cent, at each moment: a line and a band of the seeds for each set.

    Args:
      lines: set -> [seeds, moments].
    """
    with rc_context(STYLE):
        figure, axes = charts.new_axes(title, "%", ())
        for at, (name, values) in enumerate(lines.items()):
            values, color = np.asarray(values, float), SERIES[at % len(SERIES)]
            places = range(len(moments))
            axes.fill_between(places, values.min(0), values.max(0), color=color, alpha=0.2, linewidth=0)
            axes.plot(places, values.mean(0), color=color, linewidth=1.6, marker="os^Dv"[at % 5], markersize=4,
                      label=charts.short_label(name))  # fmt: skip
        narrow = max(6, 52 // max(1, len(moments)))
        axes.set_xticks(range(len(moments)), [charts.short_label(one.replace(" ", "\n", 1), narrow) for one in moments])
        axes.set_xlabel("")
        return charts.svg(figure, legend=True)


def spans_chart(title: str, unit: str, spans: Sequence[Span]) -> str:
    """SVG of differences, one under the other, with intervals about the line of no difference; marks as crosses."""
    with rc_context(STYLE):
        figure, axes = charts.new_axes(title, "", ())
        places = np.arange(len(spans))[::-1]
        axes.axvline(0, color=charts.INK, linewidth=0.8)
        for place, span in zip(places, spans, strict=True):
            if np.isfinite(span.low):
                axes.plot([span.low, span.high], [place, place], color=SERIES[0], linewidth=2.2, alpha=0.6)
            axes.plot([span.mean], [place], "o", color=SERIES[0], markersize=5)
            axes.plot(span.marks, [place] * len(span.marks), "x", color=SERIES[1], markersize=5)
        axes.set_yticks(places, [charts.short_label(span.label, 56) for span in spans])
        axes.set_xlabel(unit)
        axes.grid(axis="x")
        axes.set_ylim(-0.7, len(spans) - 0.3)
        return charts.svg(figure, legend=False, left=0.46, tall=0.6 + 0.26 * len(spans), wide=7.0)


def _means(values: np.ndarray, points: int) -> np.ndarray:
    """[rows, steps] as at most so many means over neighbors; nan of nothing."""
    width = -(-values.shape[1] // points)
    if width == 1:
        return values
    padded = np.pad(values, ((0, 0), (0, -values.shape[1] % width)), constant_values=np.nan)
    folded = padded.reshape(len(values), -1, width)
    count = np.isfinite(folded).sum(2)
    return np.divide(np.nansum(folded, 2), count, out=np.full(count.shape, np.nan), where=count > 0)
