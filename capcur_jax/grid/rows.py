"""Every row of the paper's tables that has a run, as data: its config, what it is compared with, what the paper got.

What METHOD of the paper or its page does not give is not there: no value of a row means "not known".
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

QWEN3, QWEN25 = "qwen3_vl_8b", "qwen2_5_vl_7b"  # presets of the models that the paper trains


class PaperValue(NamedTuple):
    """A figure of the paper, in percent or percentage points."""

    table: str
    model: str | None  # its preset; None: the paper's page does not say which
    metric: str
    value: float
    over: str = ""  # the row that it is a difference to, in points; "": the value itself


@dataclasses.dataclass(frozen=True)
class Row:
    """One row of a table. The config is configs/NAME.py.

    Attributes:
      tables: of the paper; (): a row of our own.
      compared: row -> which facts of a `Budget` differ, at most in any preset: what the comparison is about.
    """

    name: str
    title: str
    tables: tuple[str, ...]
    compared: Mapping[str, frozenset[str]]
    paper: tuple[PaperValue, ...] = ()

    def config(self, preset: str) -> str:
        """As a command takes it, from the project's folder."""
        return f"configs/{self.name}.py:{preset}"


def _row(name: str, title: str, tables: tuple[str, ...] = (), *paper: PaperValue, **compared: str) -> Row:
    return Row(name, title, tables, {other: frozenset(facts.split()) for other, facts in compared.items()}, paper)


def _main(model: str, visual_math: float, perception: float, overall: float) -> tuple[PaperValue, ...]:
    found = {"visual math": visual_math, "perception": perception, "overall": overall}
    return tuple(PaperValue("Table 2", model, metric, value) for metric, value in found.items())


def _seven(value: float) -> PaperValue:
    return PaperValue("Table 7", None, "average of 7 benchmarks", value)


# base has no run: every run evaluates it first, and a grid does so once.
BASE = _row(
    "base", "the checkpoint as it comes", ("Table 1", "Table 2", "Figure 3"),
    *_main(QWEN3, 45.17, 79.21, 62.19), *_main(QWEN25, 37.03, 76.33, 56.68),
    PaperValue("Table 1", QWEN3, "WeMath", 50.9),
    PaperValue("Table 1", QWEN25, "WeMath", 30.9),
    PaperValue("Table 1", QWEN25, "MathVerse (vision intensive)", 26.4),
)  # fmt: skip

_PART = "prompts updates rates references order"  # a set is left out
_ROWS = (
    _row(
        "staged", "perception, text, visual: 1-2-3",
        ("Table 1", "Table 2", "Figure 3", "Table 5", "Table 6", "Table 7"),
        *_main(QWEN3, 51.10, 80.44, 65.77), *_main(QWEN25, 42.26, 77.24, 59.75),
        PaperValue("Table 1", QWEN3, "MathVista (mini)", 75.9),
        PaperValue("Table 1", QWEN3, "WeMath", 56.1),
        PaperValue("Table 1", QWEN3, "MMStar", 73.1),
        PaperValue("Table 1", QWEN3, "RealWorldQA", 74.5),
        PaperValue("Table 1", QWEN25, "MathVerse (vision intensive)", 37.9),
        PaperValue("Table 1", QWEN25, "WeMath", 38.3),
        PaperValue("Table 1", QWEN25, "RealWorldQA", 70.5),
        PaperValue("Section 4.3.1", QWEN3, "response length, relative", -20.8, over="merged"),
        _seven(60.53),
        merged="order references tower",
    ),
    _row("order_132", "1-3-2", ("Table 5",), staged="order"),
    _row("order_213", "2-1-3", ("Table 5",), staged="order"),
    _row("order_231", "2-3-1", ("Table 5",), staged="order"),
    _row("order_312", "3-1-2", ("Table 5",), staged="order"),
    _row("order_321", "3-2-1", ("Table 5",), PaperValue("Table 5", QWEN25, "visual math", 37.7), staged="order"),
    _row(
        "text_visual", "reasoning only: 2-3", ("Figure 3",),
        PaperValue("Figure 3", QWEN25, "MathVerse (vision intensive)", 10.2, over="base"),
        PaperValue("Figure 3", QWEN25, "WeMath", 6.0, over="base"),
        PaperValue("Figure 3", QWEN25, "MMStar", -1.6, over="base"),
        staged=_PART,
    ),
    _row("perception_visual", "1-3", ("Table 2",), staged=_PART),
    _row("visual", "3 alone", ("Table 2",), staged=_PART),
    _row("perception", "1 alone", (), staged=_PART),
    _row(
        "merged", "one shuffled pool, tower frozen", ("Table 2", "Table 7"),
        *_main(QWEN3, 49.64, 79.71, 64.67), *_main(QWEN25, 40.74, 75.95, 58.34), _seven(58.56),
        staged="order references tower",
    ),
    _row("merged_trained", "one shuffled pool, tower trained", (), staged="order references", merged="tower"),
    _row("merged_in_order", "1-2-3 as one run, tower frozen", (), merged="order"),
    _row(
        "sft_perception", "captions to imitate, then 2-3", ("Table 6",),
        PaperValue("Table 6", QWEN25, "WeMath", -8.1, over="staged"),
        PaperValue("Table 6", QWEN3, "WeMath", -1.6, over="staged"),
        staged="objectives prompts updates rates tower",
    ),
    _row("difficulty", "one pool, easy to hard", ("Table 7",), _seven(60.36), merged="within"),
    _row("difficulty_filtered", "the same without pass rate 1", ("Table 7",), difficulty="selection"),
    _row(
        "capability_x_difficulty", "1-2-3, each easy to hard", ("Table 7",), _seven(62.99),
        staged="within", difficulty="order references tower",
    ),
    _row(
        "capability_x_difficulty_one_run", "1-2-3 as one run, each easy to hard", ("Table 7",),
        difficulty="order", merged_in_order="within",
    ),
    _row("adaptive", "1-2-3, stages end by a rule", (), staged="rules"),
)  # fmt: skip
ROWS = {row.name: row for row in _ROWS}
