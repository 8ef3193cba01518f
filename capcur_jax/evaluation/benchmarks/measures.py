"""Shares of right answers, in per cent: of all rows, of each class, of groups that are right as a whole."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Sequence

from capcur_jax.evaluation.benchmarks.base import Row, Verdict


def percent(credits: Iterable[float]) -> float:
    """The mean of credits from 0 to 1, in per cent; nan of none."""
    credits = list(credits)
    return 100 * math.fsum(credits) / len(credits) if credits else math.nan


def by_class(rows: Sequence[Row], verdicts: Sequence[Verdict], fact: str) -> dict[str, float]:
    """The share of each value of a fact, in the order of the values' texts."""
    found: dict[str, list[float]] = {}
    for row, verdict in zip(rows, verdicts, strict=True):
        found.setdefault(str(row.facts[fact]), []).append(verdict.credit)
    return {name: percent(found[name]) for name in sorted(found)}


def whole_groups(rows: Sequence[Row], verdicts: Sequence[Verdict], group: Callable[[Row], Hashable]) -> float:
    """The share of groups whose rows are all right."""
    found: dict[Hashable, bool] = {}
    for row, verdict in zip(rows, verdicts, strict=True):
        key = group(row)
        found[key] = found.get(key, True) and verdict.credit == 1
    return percent(found.values())
