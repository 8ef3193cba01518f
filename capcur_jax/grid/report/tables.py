"""The paper's tables with this grid's figures in them, as data: the page and the Markdown file are made of the same."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from capcur_jax.grid.report.benchmarks import PERCEPTION, VISUAL, Measured
from capcur_jax.grid.report.claims import METRICS, NAMES, Found, Measures, paper_difference
from capcur_jax.grid.report.gather import KNOWN
from capcur_jax.grid.report.seeds import Estimate
from capcur_jax.grid.rows import QWEN3, QWEN25

UNKNOWN, MISSING = "not known", "missing"
# The paper's eight, by the names under which its page has figures of them.
_PAPERS = {
    "mathvista": "MathVista (mini)", "mathvision": "MathVision (mini)",
    "mathverse_vision_intensive": "MathVerse (vision intensive)", "wemath": "WeMath", "aokvqa": "A-OKVQA",
    "realworldqa": "RealWorldQA", "mmstar": "MMStar", "pope": "POPE",
}  # fmt: skip
_KNOWN = {*_PAPERS.values(), "visual math", "perception", "overall"}
_MODELS = f"{NAMES[QWEN3]} / {NAMES[QWEN25]}"


class Cell(NamedTuple):
    """text, what is small beside it (an interval), and whether it is good news: "good" | "bad" | ""."""

    text: str
    small: str = ""
    mood: str = ""


class Line(NamedTuple):
    """A table's line; `row`: the grid's row that it is of, for filters, "" where it is of several."""

    row: str
    cells: tuple[Cell, ...]


class Table(NamedTuple):
    title: str
    note: str
    head: tuple[str, ...]
    lines: tuple[Line, ...]


class _Column(NamedTuple):
    """kind: "value" | "paper" | "change" (against `over`) | "paper change".
    metric: of ours, or the paper's name of it."""

    kind: str
    metric: str
    over: str = ""

    @property
    def head(self) -> str:
        if self.kind.startswith("paper"):
            over = f" over {self.over}" if self.over else ""
            return f"paper: {self.metric}{over}"
        title = METRICS[self.metric].title
        if self.kind == "change":
            return f"{title} against {self.over}, {'%' if METRICS[self.metric].tokens else 'points'}"
        return f"{title}, {'tokens' if METRICS[self.metric].tokens else '%'}"


class _Spec(NamedTuple):
    title: str
    rows: tuple[str, ...]
    columns: tuple[_Column, ...]
    note: str = ""


def _pairs(*metrics: str) -> tuple[_Column, ...]:
    """Ours, and the paper's beside it."""
    return tuple(
        column
        for metric in metrics
        for column in (_Column("value", metric), _Column("paper", METRICS[metric].paper or metric))
    )


_TEXT, _LENGTH = _Column("value", "text"), _Column("value", "length")
_SPECS = (
    _Spec(
        "Table 2: base, merged, staged",
        ("base", "merged", "merged_trained", "merged_in_order", "staged", "perception_visual", "visual"),
        (*_pairs("visual", "perception", "overall"), _TEXT),
        "merged_trained and merged_in_order are not in the paper: they change one thing each.",
    ),
    _Spec(
        "Figure 3: reasoning alone",
        ("text_visual", "staged"),
        (
            _Column("change", "visual", "base"),
            _Column("paper change", "MathVerse (vision intensive)", "base"),
            _Column("paper change", "WeMath", "base"),
            _Column("change", "perception", "base"),
            _Column("paper change", "MMStar", "base"),
            _Column("change", "text", "base"),
        ),
    ),
    _Spec(
        "Table 5: the order of the stages",
        ("staged", "order_132", "order_213", "order_231", "order_312", "order_321"),
        (*_pairs("visual"), _Column("change", "visual", "staged"), _Column("value", "perception"), _TEXT,
         _Column("value", "overall")),
    ),
    _Spec(
        "Table 6: perception by imitation of captions",
        ("staged", "sft_perception"),
        (_Column("value", "visual"), _Column("change", "visual", "staged"),
         _Column("paper change", "WeMath", "staged"), _Column("value", "perception"), _TEXT),
    ),
    _Spec(
        "Table 7: capability and difficulty",
        ("merged", "difficulty", "difficulty_filtered", "staged", "capability_x_difficulty",
         "capability_x_difficulty_one_run"),
        (_Column("value", "overall"), _Column("paper", "average of 7 benchmarks"),
         _Column("change", "overall", "merged"), _Column("value", "visual"), _Column("value", "perception"), _TEXT),
    ),
    _Spec(
        "Rows of our own", ("perception", "adaptive"),
        (_Column("value", "visual"), _Column("value", "perception"), _TEXT, _Column("value", "overall"),
         _Column("change", "overall", "staged")),
    ),
    _Spec(
        "Response lengths", tuple(KNOWN),
        (_LENGTH, _Column("change", "length", "merged"),
         _Column("paper change", "response length, relative", "merged"), _Column("change", "length", "base")),
        "Mean over the sets, of questions that every run answered, end token included.",
    ),
)  # fmt: skip


def papers(measures: Measures, measured: Measured) -> list[Table]:
    """Tables 1, 2, 5, 6, 7, Figure 3 and the lengths. A row without a finished run says so."""
    return [_benchmarks(measured), *(_table(spec, measures) for spec in _SPECS)]


def _table(spec: _Spec, measures: Measures) -> Table:
    lines = []
    for row in spec.rows:
        figures = measures.grid.rows.get(row)
        seeds = Cell(MISSING if figures is None else str(len(figures.seeds)) if figures.seeds else "all alike")
        lines.append(Line(row, (Cell(row), seeds, *(_cell(row, column, measures) for column in spec.columns))))
    return Table(spec.title, spec.note, ("row", "seeds", *(column.head for column in spec.columns)), tuple(lines))


def _cell(row: str, column: _Column, measures: Measures) -> Cell:
    if column.kind.startswith("paper"):
        return Cell(paper_value(row, column.metric, column.over))
    if row == column.over:
        return Cell("-")
    if column.kind == "change":
        found = measures.difference(row, column.over, column.metric)
        return change(found[0], METRICS[column.metric].tokens) if found else Cell("-")
    return value(measures.value(row, column.metric))


def value(found: Estimate | None) -> Cell:
    """A figure and its interval."""
    if found is None:
        return Cell("-")
    return Cell(f"{found.mean:.1f}", _interval(found, ".1f"))


def change(found: Estimate, less: bool = False) -> Cell:
    """A difference and its interval; `less`: less is better."""
    low, high = found.interval()
    mood = "good" if low > 0 else "bad" if high < 0 else ""
    mood = {"good": "bad", "bad": "good"}.get(mood, "") if less else mood
    return Cell(f"{found.mean:+.1f}", _interval(found, "+.1f"), mood)


def _interval(found: Estimate, form: str) -> str:
    low, high = found.interval()
    return f"{low:{form}} to {high:{form}}" if np.isfinite(low) else "one seed: no interval"


def paper_value(row: str, metric: str, over: str = "") -> str:
    """What the paper's page has of a row, of both of its models, or "not known"."""
    if row == over:
        return "-"
    if over:
        known, form = paper_difference(row, over, metric), "+.2f"
    else:
        known, form = {NAMES[p.model]: p.value for p in KNOWN[row].paper if (p.metric, p.over) == (metric, "")}, ".2f"
    if not known:
        return UNKNOWN
    if NAMES[None] in known:
        return f"{known[NAMES[None]]:{form}}"
    names = NAMES[QWEN3], NAMES[QWEN25]
    return " / ".join(f"{known[name]:{form}}" if name in known else UNKNOWN for name in names)


def _benchmarks(measured: Measured) -> Table:
    """Table 1: the paper's benchmarks, their groups as the paper averages them, and what else was asked."""
    wanted = [(title, (name,)) for name, title in _PAPERS.items()]
    wanted += [("visual math", VISUAL), ("perception", PERCEPTION), ("overall", VISUAL + PERCEPTION)]
    wanted += [(name, (name,)) for name in measured.names if name not in _PAPERS]
    lines = []
    for title, names in wanted:
        measures, metric = measured.measures(names), " + ".join(names)
        for row in dict.fromkeys(("base", "staged", *measured.rows)):
            found, figures = measures.value(row, metric), measures.grid.rows.get(row)
            cells = [Cell("not measured"), *[Cell("-")] * 3] if found is None or figures is None else [
                value(found), Cell(str(len(figures.seeds) or 1)),
                *(_against(measures, row, over, metric) for over in ("base", "merged"))]  # fmt: skip
            paper = paper_value(row, title) if title in _KNOWN else UNKNOWN
            lines.append(Line(row, (Cell(title), Cell(row), *cells, Cell(paper))))
    note = (
        "Public benchmarks, where `capcur_jax.evaluate` asked the runs' checkpoints (docs/ablations.md), by the rules "
        "of VLMEvalKit. A laptop's sets stand for groups of them (Table 2). The paper's models, in this order "
        f"everywhere: {_MODELS}."
    )
    head = ("benchmark", "row", "ours, %", "runs", "against base, points", "against merged, points", "paper")
    return Table("Table 1: benchmarks", note, head, tuple(lines))


def _against(measures: Measures, row: str, over: str, metric: str) -> Cell:
    found = measures.difference(row, over, metric) if row != over else None
    return change(found[0]) if found else Cell("-")


def claims(found: Sequence[Found]) -> Table:
    """The paper's claims, each with its difference and what comes of it."""
    tested = sum(bool(one.verdict) for one in found)
    lines = []
    for one in found:
        claim = one.claim
        head = Cell(claim.title, f"{claim.rows}: {METRICS[claim.metric].title}")
        paper = Cell(paper_value(claim.better, claim.paper, claim.worse), claim.paper)
        if one.difference is None:
            lines.append(Line("", (head, Cell(MISSING, one.missing), Cell("-"), paper, *[Cell("-")] * 3)))
            continue
        unit = " %" if METRICS[claim.metric].tokens else ""
        ours = change(one.difference)
        # No color: the interval is not adjusted, the verdict is.
        ours = ours._replace(text=f"{ours.text}{unit}", mood="")
        signs = Cell(f"{one.same_sign} of {len(one.seeds) or 1}")
        sees = Cell(f"{one.detectable:.1f}{unit}" if np.isfinite(one.detectable) else "-")
        lines.append(Line("", (head, _verdict(one), ours, paper, signs, Cell(_p(one.p_holm)), sees)))
    note = (
        "Points, of lengths per cent; paired by question and seed. In small: the 95 % interval of this claim alone. p: "
        f"Holm's over the {tested} claims that this grid can test. Sees: the smallest true difference that is found in "
        "80 % of such grids, whatever the other claims are. Not shown is not refuted: look at what the grid can see."
    )
    head = ("claim", "verdict", "ours", "paper", "seeds with its sign", "p (Holm)", "sees")
    return Table("The paper's claims", note, head, tuple(lines))


def _p(p: float) -> str:
    return "-" if not np.isfinite(p) else "< 0.001" if p < 0.001 else f"{p:.3f}"


def _verdict(found: Found) -> Cell:
    assert found.difference is not None
    agrees = (found.difference.mean < 0) == found.claim.less
    sign = "sign as in the paper" if agrees else "other sign than in the paper"
    if not found.difference.mean:
        sign = "no difference"
    if not found.verdict:
        return Cell("not tested", f"{sign}; {found.missing}")
    mood = {"holds": "good", "the opposite holds": "bad"}.get(found.verdict, "")
    return Cell(found.verdict, sign, mood)


def markdown(tables: Sequence[Table], head: str) -> str:
    """The tables as a Markdown page. Cells are texts of ours, names and numbers."""
    parts = [head]
    for table in tables:
        parts.append(f"## {table.title}\n")
        if table.note:
            parts.append(f"{table.note}\n")
        parts.append(_line(table.head) + "\n" + _line(["---"] * len(table.head)))
        parts += [_line([f"{cell.text} ({cell.small})" if cell.small else cell.text for cell in line.cells])
                  for line in table.lines]  # fmt: skip
        parts.append("")
    return "\n".join(parts)


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"
