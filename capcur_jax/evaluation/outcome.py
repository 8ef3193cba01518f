"""What a score is told with: its interval, what became of its rows, lengths, and all that it depends on."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from capcur_jax.evaluation import statistics
from capcur_jax.evaluation.benchmarks.base import MODES, Reply, Row, Verdict
from capcur_jax.evaluation.comparison import lengths
from capcur_jax.evaluation.folders import SCORES, Answered, predictions_file, write_predictions
from capcur_jax.evaluation.recorded import FAILED
from capcur_jax.evaluation.scoring import Scored
from capcur_jax.records import jsonl

Metric = Callable[[Sequence[Row], Sequence[Verdict], str], Mapping[str, Any]]
_NEAR = 1e-5  # per cent: closer than that a score is its rows' mean


def outcome(
    answered: Sequence[Answered],
    metrics: Metric,
    conditions: Mapping[str, Any],
    scored: Mapping[str, Scored] | None = None,
) -> dict[str, Any]:
    """The entry of one benchmark in scores.json.

    Args:
      answered: its rows with the verdicts of both modes.
      metrics: see `Benchmark`.
      conditions: what the score depends on.
      scored: by mode, as scoring.py found it; None: it follows from the verdicts.

    Returns:
      rows; by mode the benchmark's numbers, `interval` (95 %, per cent) and the shares of rows that were decided by a
      rule, by a judge, by nobody, and of replies in which nothing could be read; lengths of replies, and the shares
      that were cut off at the limit or failed; conditions.
    """
    found: dict[str, Any] = {"rows": len(answered), "replies": lengths(answered, MODES[0])}
    for mode in MODES:
        found[mode] = _of_mode(answered, metrics, mode, (scored or {}).get(mode))
    return found | {"conditions": dict(conditions)}


def _of_mode(answered: Sequence[Answered], metrics: Metric, mode: str, scored: Scored | None) -> dict[str, Any]:
    if not answered or any(mode not in one.verdicts for one in answered):
        return {"score": None}  # a reward on a scale of its own says nothing of right and wrong
    verdicts = [one.verdicts[mode] for one in answered]
    if scored is None:
        names = {"rule": "rule", "judge": "judge", "undecided": "none"}
        shares = {name: sum(verdict.by == by for verdict in verdicts) / len(verdicts) for name, by in names.items()}
        right = sum(verdict.credit >= 1 for verdict in verdicts)
        numbers = {"right": right, "rows": len(verdicts), **metrics([one.row for one in answered], verdicts, mode)}
    else:
        numbers, shares = scored.numbers, scored.shares
    replied = [one for one in answered if not one.reply.failed]
    unread = sum(one.verdicts[mode].read is None for one in replied) / len(replied) if replied else 0.0
    interval = _interval(answered, metrics, mode, numbers["score"])
    return {"score": numbers["score"], "interval": interval, **numbers, "share": {**shares, "unreadable": unread}}


def _interval(answered: Sequence[Answered], metrics: Metric, mode: str, score: Any) -> list[float] | None:
    """Of the main number, 95 %, in per cent."""
    if not isinstance(score, (int, float)) or not math.isfinite(score):
        return None
    clusters = [one.cluster for one in answered]
    credits = np.array([one.verdicts[mode].credit for one in answered])
    if abs(100 * credits.mean() - score) < _NEAR:
        found = statistics.mean_interval(credits, clusters)
        return [100 * found.low, 100 * found.high]
    # No mean of rows, such as an F1 or WeMath's score: by leaving clusters out.
    rows, verdicts = [one.row for one in answered], [one.verdicts[mode] for one in answered]

    def of(numbers: np.ndarray) -> float:
        return float(metrics([rows[at] for at in numbers], [verdicts[at] for at in numbers], mode)["score"])

    found = statistics.jackknife_interval(of, len(rows), clusters, lowest=0.0, highest=100.0)
    return [found.low, found.high]


def write(folder: Path, scores: Mapping[str, Any], answered: Mapping[str, Sequence[Answered]],
          thinking: Mapping[str, Mapping[str, str]] | None = None) -> None:  # fmt: skip
    """Writes FOLDER/scores.json and FOLDER/predictions/NAME.tsv, each whole or not at all.

    Args:
      scores: {"conditions": of all, "benchmarks": name -> `outcome`}.
      answered: by benchmark, in the table's order.
      thinking: by benchmark and index, what servers kept apart.
    """
    for name, rows in answered.items():
        file = predictions_file(folder, name)
        file.parent.mkdir(parents=True, exist_ok=True)
        write_predictions(file, map(_as_kept, rows), (thinking or {}).get(name))
    jsonl.write_json_atomic(folder / SCORES, scores)


def _as_kept(one: Answered) -> Answered:
    """With the facts that a table can hold; without a reply in the kit's own words, so that it asks such rows again."""
    facts = {key: value for key, value in one.row.facts.items() if isinstance(value, _PLAIN)}
    row = dataclasses.replace(one.row, facts=facts)
    reply: Reply = one.reply._replace(text=one.reply.text or FAILED) if one.reply.failed else one.reply
    return Answered(row, reply, one.verdicts)


_PLAIN = (str, int, float, list, tuple, dict)
