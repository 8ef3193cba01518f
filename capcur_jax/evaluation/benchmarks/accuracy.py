"""Benchmarks whose score is the share of right rows: that, and the share of each class."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from capcur_jax.evaluation.benchmarks.base import Metrics, Row, Verdict
from capcur_jax.evaluation.benchmarks.measures import by_class, percent


def accuracy(**classes: str) -> Metrics:
    """A benchmark's metrics.

    Args:
      classes: name in the result -> the fact that it goes by. A row counts in each value of a fact that is a list, and
        in no class where it has none.
    """

    def metrics(rows: Sequence[Row], verdicts: Sequence[Verdict], mode: str) -> dict[str, Any]:
        found: dict[str, Any] = {"score": percent(verdict.credit for verdict in verdicts)}
        for name, fact in classes.items():
            pairs = [
                (dataclasses.replace(row, facts={fact: value}), verdict)
                for row, verdict in zip(rows, verdicts, strict=True)
                for value in _values(row.facts.get(fact))
            ]
            found[name] = by_class(*map(list, zip(*pairs, strict=True)), fact) if pairs else {}
        return found

    return metrics


def _values(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list | tuple) else () if value in (None, "") else (value,)
