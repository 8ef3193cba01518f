"""Charts of `report.html`: step records to SVG text that follows the page's light and dark colors."""

import io
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter

MAX_POINTS = 600  # of one curve; longer runs show means over neighboring steps

Record = Mapping[str, Any]


class Stage(NamedTuple):
    name: str
    first: int  # global steps, both included
    last: int


class Panel(NamedTuple):
    """A chart over steps: keys of step records drawn in one pair of axes."""

    title: str
    unit: str
    keys: tuple[str, ...]
    labels: tuple[str, ...] = ("",)
    scale: float = 1.0
    log: bool = False
    by_objective: bool = False  # a chart for each: losses of different objectives have nothing in common


PANELS = (
    Panel("Reward", "mean of the step", ("reward",)),
    Panel("Training accuracy", "% of responses", ("accuracy",), scale=100),
    Panel("Format", "% of responses", ("format",), scale=100),
    Panel("Response length", "tokens", ("response_length",)),
    Panel("KL to the stage's start", "nats per token", ("kl",)),
    Panel("Entropy", "nats per token", ("entropy",)),
    Panel("loss", "mean of the step", ("loss",), by_objective=True),
    Panel("Token accuracy", "%", ("token_accuracy",), scale=100),
    Panel("Gradient norm", "before clipping", ("grad_norm",)),
    Panel(
        "Groups, truncation, clipping",
        "%",
        ("equal_groups", "truncated", "clip_fraction"),
        ("equal rewards", "truncated", "clipped tokens"),
        scale=100,
    ),
    Panel(
        "Sampler against trainer log-probs",
        "nats, absolute",
        ("logprob_difference_mean", "logprob_difference_max"),
        ("mean", "max"),
        log=True,
    ),
    Panel("Padding", "% of slots", ("token_padding", "patch_padding"), ("tokens", "patches"), scale=100),
    Panel("Throughput", "tokens per second", ("tokens_per_second",)),
)
_PHASES = ("data", "rollout", "reward", "pack", "update", "sync")

# Charts are drawn in these colors; in the SVG text they become the page's CSS variables.
INK, _GRID, SERIES = "#0a0001", "#0a0002", tuple(f"#0b000{index}" for index in range(1, 7))
STYLE = {
    "svg.fonttype": "none",  # text stays text: small, selectable, in the page's font
    "svg.hashsalt": "capcur_jax",  # the same run gives the same file
    "text.parse_math": False,  # a stage's name may hold dollar signs
    "font.size": 9,
    "font.family": "DejaVu Sans",  # measured with this; drawn in the page's font
    "text.color": INK,
    "axes.edgecolor": _GRID,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.facecolor": "none",
    "axes.formatter.useoffset": False,
    "axes.unicode_minus": False,
    "figure.facecolor": "none",
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "ytick.minor.size": 0,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "grid.color": _GRID,
    "grid.linewidth": 0.6,
}


def stages_of(steps: Sequence[Record]) -> list[Stage]:
    """The stages in order, from step records in order of their `step`. A stage may follow one of the same name."""
    stages: list[Stage] = []
    for record in steps:
        name = str(record.get("stage", ""))
        if stages and stages[-1].name == name and record.get("stage_step") != 1:
            stages[-1] = stages[-1]._replace(last=record["step"])
        else:
            stages.append(Stage(name, record["step"], record["step"]))
    return stages


def running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Centered mean over `window` (odd) values, fewer at the ends; non-finite ones are left out. Shape (steps,)."""
    finite = np.isfinite(values)
    half = window // 2
    total, count = (
        np.cumsum(np.pad(v, (half + 1, half))) for v in (np.where(finite, values, 0.0), finite.astype(float))
    )
    total, count = (v[window:] - v[:-window] for v in (total, count))
    return np.divide(total, count, out=np.full(len(values), np.nan), where=count > 0)


def curves(steps: Sequence[Record], stages: Sequence[Stage]) -> tuple[list[str], int]:
    """SVG texts, one for each panel that has data, and the window of their running means in steps."""
    window = max(5, len(steps) // 30) | 1
    with rc_context(STYLE):
        charts = [_panel_chart(panel, shown, stages, window) for panel, shown in _panels(steps)]
        charts.insert(-1, _phases_chart(steps, stages))
    return [chart for chart in charts if chart], window


def _panels(steps: Sequence[Record]) -> Iterator[tuple[Panel, Sequence[Record]]]:
    """Every panel in its order and the steps that it draws."""
    objectives: dict[str, list[Record]] = {}
    for step in steps:
        if "objective" in step:
            objectives.setdefault(step["objective"], []).append(step)
    for panel in PANELS:
        if panel.by_objective:
            for name in sorted(objectives):
                yield panel._replace(title=f"{name.upper()} {panel.title}"), objectives[name]
        else:
            yield panel, steps


def accuracy_chart(accuracy: Mapping[str, Record], moments: Mapping[str, str]) -> str:
    """SVG of held-out accuracy at each moment, a line for each capability.

    Args:
      accuracy: capability -> moment -> share, as in summary.json.
      moments: key of a moment -> its title, in order.
    """
    with rc_context(STYLE):
        figure, axes = new_axes("Held-out accuracy", "%", ())
        for index, (name, values) in enumerate(accuracy.items()):
            y = _series([values], *moments) * 100
            style = {"color": SERIES[index % len(SERIES)], "marker": "os^Dv"[index % 5], "markersize": 5}
            axes.plot(range(len(moments)), y, label=short_label(name), linewidth=1.8, **style)
        narrow = max(6, 52 // max(1, len(moments)))  # characters that fit under a tick
        axes.set_xticks(
            range(len(moments)), [short_label(title.replace(" ", "\n", 1), narrow) for title in moments.values()]
        )
        axes.set_xlabel("")
        axes.margins(x=0.08, y=0.12)
        return svg(figure, legend=True)


def bar_chart(title: str, unit: str, heights: Mapping[str, float], below: str = "") -> str:
    """SVG of a bar for each label, in the order given; `unit` names the heights, `below` the labels."""
    with rc_context(STYLE):
        figure, axes = new_axes(title, unit, ())
        axes.bar(range(len(heights)), list(heights.values()), width=0.85, color=SERIES[0])
        narrow = max(3, 66 // max(1, len(heights)))  # characters that fit under a bar
        axes.set_xticks(range(len(heights)), [short_label(label, narrow) for label in heights])
        axes.set_xlabel(short_label(below))
        return svg(figure, legend=False)


def _panel_chart(panel: Panel, steps: Sequence[Record], stages: Sequence[Stage], window: int) -> str:
    """SVG of one panel, or "" where no step has a number for it."""
    keys = [(key, label) for key, label in zip(panel.keys, panel.labels, strict=True) if _has(steps, key)]
    if not keys:
        return ""
    figure, axes = new_axes(panel.title, panel.unit, stages)
    series = {key: _series(steps, key) * panel.scale for key, _ in keys}
    everything = np.concatenate([*series.values()])
    log = panel.log and bool((everything > 0).any())
    bottom, top = (1e-30, np.inf) if log else _limit(figure, axes, everything)
    for (key, label), color in zip(keys, SERIES, strict=False):
        for stage in stages:
            inside = np.array([stage.first <= step["step"] <= stage.last for step in steps])
            x, y = _series(steps, "step")[inside], series[key][inside]
            if not np.isfinite(y).any():
                continue
            mean = running_mean(np.where((y >= bottom) & (y <= top), y, np.nan), window)
            x, y, mean = _thin(x, y, mean)
            lone = len(x) == 1  # a line of one point is invisible
            axes.plot(x, y, color=color, linewidth=0.7, alpha=1.0 if lone else 0.35, marker="o" if lone else None)
            axes.plot(x, mean, color=color, linewidth=1.8, label=label)
            label = None  # named once, not for each stage
    if log:
        axes.set_yscale("log", nonpositive="mask")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0e}")
        axes.yaxis.set_minor_formatter(NullFormatter())
    return svg(figure, legend=len(keys) > 1)


def _phases_chart(steps: Sequence[Record], stages: Sequence[Stage]) -> str:
    """Seconds of a step, stacked by phase; "other" is what the phases leave of the whole step."""
    if not _has(steps, "seconds"):
        return ""
    bands = {phase: np.nan_to_num(_series(steps, f"seconds_{phase}")) for phase in _PHASES}
    bands = {phase: seconds for phase, seconds in bands.items() if seconds.any()}
    rest = np.nan_to_num(_series(steps, "seconds")) - sum(bands.values(), np.zeros(len(steps)))
    bands["other" if bands else "whole step"] = np.maximum(rest, 0.0)
    x, *heights = _thin(_series(steps, "step"), *bands.values())
    figure, axes = new_axes("Time of a step", "seconds", stages)
    axes.stackplot(x, *heights, labels=list(bands), colors=SERIES[: len(bands)], alpha=0.8, linewidth=0)
    axes.set_ylim(bottom=0)
    _, top = _limit(figure, axes, np.sum(heights, axis=0))
    axes.set_ylim(0, top)
    return svg(figure, legend=True)


def _limit(figure: Figure, axes: Axes, values: np.ndarray) -> tuple[float, float]:
    """Sets and returns the range of the axis; single extreme values (a step that compiled) would flatten the rest."""
    values = values[np.isfinite(values)]
    low, high = np.percentile(values, (2, 98))
    margin = 0.6 * (high - low) + 0.1 * max(abs(low), abs(high))
    inside = values[(values >= low - margin) & (values <= high + margin)]
    pad = 0.06 * (inside.max() - inside.min()) or 0.1 * abs(high) or 1.0
    bottom, top = float(inside.min() - pad), float(inside.max() + pad)
    if len(inside) < len(values):
        farthest = values[np.argmax(np.abs(values - np.median(values)))]
        text = f"{len(values) - len(inside)} beyond the axis, to {farthest:.4g}"
        figure.text(0.965, 1 - 0.1 / figure.get_figheight(), text, ha="right", va="top", fontsize=7.5)
    axes.set_ylim(bottom, top)
    return bottom, top


def _has(steps: Sequence[Record], key: str) -> bool:
    return bool(np.isfinite(_series(steps, key)).any())


def _series(records: Sequence[Record], *keys: str) -> np.ndarray:
    """Numbers of all records under all keys, shape (records * keys,); NaN where there is none."""
    values = [record.get(key) for record in records for key in keys]
    return np.array([value if isinstance(value, (int, float)) else np.nan for value in values], dtype=float)


def _thin(*series: np.ndarray) -> list[np.ndarray]:
    """The series, each of at most MAX_POINTS points: means over as many neighbors as that takes."""
    width = math.ceil(len(series[0]) / MAX_POINTS)
    if width == 1:
        return list(series)
    return [np.array([_mean(s[start : start + width]) for start in range(0, len(s), width)]) for s in series]


def _mean(values: np.ndarray) -> float:
    values = values[np.isfinite(values)]
    return float(values.mean()) if len(values) else math.nan


def new_axes(title: str, unit: str, stages: Sequence[Stage]) -> tuple[Figure, Axes]:
    """Axes over global steps with a band and a name for each stage."""
    figure = Figure(figsize=(4.2, 2.6))
    axes = figure.add_subplot()
    figure.text(0.01, 1 - 0.07 / 2.6, title, va="top", fontsize=10, fontweight="bold")
    axes.set(xlabel="step", ylabel=unit)
    axes.grid(axis="y")
    axes.set_axisbelow(True)
    axes.yaxis.set_major_locator(MaxNLocator(5))
    if stages:
        axes.set_xlim(stages[0].first - 0.5, stages[-1].last + 0.5)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    for index, stage in enumerate(stages):
        if index % 2 == 0:
            axes.axvspan(stage.first - 0.5, stage.last + 0.5, color=_GRID, alpha=0.3, linewidth=0)
        share = (stage.last - stage.first + 1) / (stages[-1].last - stages[0].first + 1)
        room = int(48 * share)  # characters that fit above the band
        if room >= 3:
            place = {"xycoords": ("data", "axes fraction"), "ha": "center", "va": "bottom", "fontsize": 8}
            axes.annotate(short_label(stage.name, room), ((stage.first + stage.last) / 2, 1.02), **place)
    return figure, axes


def short_label(text: str, length: int = 24) -> str:
    """Text for a chart: each line short, without the control characters that XML forbids even escaped."""
    lines = [re.sub(r"[^\x20-\x7e\xa1-\ud7ff\ue000-\ufffd]", "?", line) for line in str(text).split("\n")[:2]]
    return "\n".join(line if len(line) <= length else line[: max(1, length - 2)] + ".." for line in lines)


def svg(figure: Figure, legend: bool, *, left: float = 0.16, tall: float = 2.15, wide: float = 4.2) -> str:
    """The figure as an <svg> element that scales with its container. Margins are fixed, so that charts line up.

    Args:
      left: share of the width for the labels of the axis. tall, wide: inches, without what is below the axis.
    """
    labels = figure.axes[0].get_legend_handles_labels()[1] if legend else []
    columns = max(1, min(len(labels), 66 // (max(map(len, labels), default=0) + 5)))
    below = 0.48 + (0.1 + 0.17 * math.ceil(len(labels) / columns) if labels else 0.0)  # inches
    height = tall + below
    figure.set_size_inches(wide, height)
    figure.subplots_adjust(left=left, right=0.965, top=1 - 0.5 / height, bottom=below / height)
    if labels:
        spacing = {
            "handlelength": 1.1,
            "columnspacing": 1.1,
            "handletextpad": 0.5,
            "borderpad": 0.1,
            "labelspacing": 0.3,
        }
        figure.legend(loc="lower center", ncols=columns, **spacing)
    buffer = io.StringIO()
    FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r'<metadata>.*?</metadata>\s*|<style type="text/css">.*?</style>', "", text, flags=re.DOTALL)
    text = re.sub(r'<g id="[^"]*"', "<g", text)  # the same in every chart; clip paths and markers keep theirs
    opening, rest = text.split(">", 1)
    opening = re.sub(r' (width|height)="[^"]*"', "", opening)  # the viewBox stays: the page's columns give the size
    # Hundredths of a point are enough for curves, and half the size.
    rest = re.sub(r' d="[^"]*"', lambda match: re.sub(r"(\.\d\d)\d+", r"\1", match[0]), rest)
    text = f"{opening}>{rest}"
    for color, name in ((INK, "ink"), (_GRID, "rule"), *((c, f"c{i}") for i, c in enumerate(SERIES, 1))):
        text = text.replace(color, f"var(--{name})")
    return text
