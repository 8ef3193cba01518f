"""How sure a score is, and whether two differ: intervals and tests for rows that are not independent.

Rows of one cluster (one image, one group of questions, one seed) are right or wrong together. Errors are therefore
those of cluster totals (Liang and Zeger's, with the factor G / (G - 1) of G clusters), and quantiles are of Student's t
with G - 1 degrees of freedom. numpy and scipy.special alone: scipy.stats would cost a second of every start.
"""

from __future__ import annotations

import collections
import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import special

LEVEL, POWER = 0.95, 0.8
GROUPS = 200  # of clusters that a jackknife leaves out in turn, at most


class Interval(NamedTuple):
    """A figure and the interval that holds the true one in `level` of all cases. nan: can't be said."""

    mean: float
    low: float
    high: float


class Paired(NamedTuple):
    """`b` minus `a` on the same rows.

    p: two-sided, of no difference at all; `test` says by which test: "mcnemar" (exact) or "t" (clustered).
    wins, losses, ties: rows on which b is above, below, equal.
    detectable: the smallest true difference that such rows would show in 80 % of all cases.
    """

    difference: float
    low: float
    high: float
    p: float
    test: str
    wins: int
    losses: int
    ties: int
    rows: int
    clusters: int
    detectable: float


def mean_interval(
    values: Sequence[float], clusters: Sequence[Hashable] | None = None, level: float = LEVEL, *, bounded: bool = True
) -> Interval:
    """The mean and its interval.

    Args:
      values: [rows].
      clusters: [rows], what rows belong together; None, or "" in a row: on its own.
      bounded: values lie in 0..1. Then the interval is Wilson's for as many independent rows as would have the same
        error: it stays in 0..1 and has a width where all rows are right. Else it is mean +- t x error.

    Returns:
      The whole of 0..1 for a single cluster, which says nothing of others; nan where there are no bounds.

    Raises:
      ValueError: no rows, lengths that differ, values that are no numbers or out of bounds.
    """
    numbers, of, count = _checked(values, clusters)
    if bounded:
        _check_bounds(numbers)
    mean = float(numbers.mean())
    if count < 2:
        return Interval(mean, 0.0, 1.0) if bounded else Interval(mean, math.nan, math.nan)
    error, quantile = _error(numbers, of, count), _quantile(level, count)
    if not bounded:
        return Interval(mean, mean - quantile * error, mean + quantile * error)
    # No spread at all is no certainty: then every cluster counts as one row.
    effective = mean * (1 - mean) / error**2 if error > 0 else float(count)
    spread = quantile**2 / effective
    middle = (mean + spread / 2) / (1 + spread)
    half = math.sqrt(mean * (1 - mean) * spread + spread**2 / 4) / (1 + spread)
    return Interval(mean, max(0.0, min(mean, middle - half)), min(1.0, max(mean, middle + half)))


def jackknife_interval(
    metric: Callable[[np.ndarray], float],
    rows: int,
    clusters: Sequence[Hashable] | None = None,
    level: float = LEVEL,
    *,
    lowest: float = -math.inf,
    highest: float = math.inf,
) -> Interval:
    """The interval of a figure that is no mean of rows, such as an F1.

    Args:
      metric: row numbers [n] of 0..rows-1 -> the figure of those rows; called at most 1 + GROUPS times.
      lowest, highest: where the interval ends at the latest.
    """
    _, of, count = _checked(np.zeros(rows), clusters)
    whole = float(metric(np.arange(rows)))
    groups = min(count, GROUPS)
    if groups < 2:
        return Interval(whole, lowest, highest) if math.isfinite(highest - lowest) else Interval(whole, *[math.nan] * 2)
    # Neighbours are often of one kind, so that clusters go to groups by a fixed shuffle.
    group = np.random.default_rng(0).permutation(count)[of] % groups
    parts = np.array([float(metric(np.flatnonzero(group != one))) for one in range(groups)])
    error = math.sqrt((groups - 1) / groups * float(((parts - parts.mean()) ** 2).sum()))
    half = _quantile(level, groups) * error
    return Interval(whole, max(lowest, whole - half), min(highest, whole + half))


def paired_difference(
    a: Sequence[float],
    b: Sequence[float],
    clusters: Sequence[Hashable] | None = None,
    level: float = LEVEL,
    *,
    bounded: bool = True,
) -> Paired:
    """What `b` has over `a` on the same rows; see `Paired`.

    Right-or-wrong rows without clusters are tested by McNemar's exact test, others by t of the clusters' totals.

    Args:
      a, b: [rows], in the same order.
      bounded: as in `mean_interval`; differences then lie in -1..1.
    """
    left, of, count = _checked(a, clusters)
    right, _, _ = _checked(b, clusters)
    if len(left) != len(right):
        raise ValueError(f"{len(left)} and {len(right)} values are no pairs")
    if bounded:
        _check_bounds(left)
        _check_bounds(right)
    gains = right - left
    difference = float(gains.mean())
    wins, losses = int((gains > 0).sum()), int((gains < 0).sum())
    counted = wins, losses, len(gains) - wins - losses, len(gains), count
    if count < 2:
        low, high = (-1.0, 1.0) if bounded else (math.nan, math.nan)
        return Paired(difference, low, high, 1.0, "t", *counted, math.nan)
    quantile = _quantile(level, count)
    error = _error(gains, of, count)
    if error > 0:
        p = 2 * float(special.stdtr(count - 1, -abs(difference) / error))
    else:  # every cluster says the same: by their number, as a sign test
        p = min(1.0, 2 * 0.5**count) if difference else 1.0
        # The rule of three: what may still be among clusters of which none was seen.
        error = (1 - (1 - level) ** (1 / count)) / quantile if bounded else 0.0
    test = "t"
    if bounded and count == len(gains) and np.isin(left, (0, 1)).all() and np.isin(right, (0, 1)).all():
        p, test = mcnemar(wins, losses), "mcnemar"
    low, high = difference - quantile * error, difference + quantile * error
    if bounded:
        low, high = max(-1.0, low), min(1.0, high)
    return Paired(difference, low, high, p, test, *counted, smallest_detectable(error, count, level))


def smallest_detectable(error: float, clusters: int, level: float = LEVEL, power: float = POWER) -> float:
    """The smallest true difference that is found at `level` (two-sided) in `power` of all cases.

    Args:
      error: standard error of the difference.
      clusters: that it comes from; nan for fewer than two.
    """
    if clusters < 2:
        return math.nan
    return error * (_quantile(level, clusters) + float(special.stdtrit(clusters - 1, power)))


def mcnemar(wins: int, losses: int) -> float:
    """p of McNemar's exact two-sided test: rows on which two differ go either way equally often."""
    if wins + losses == 0:
        return 1.0
    return min(1.0, 2 * float(special.bdtr(min(wins, losses), wins + losses, 0.5)))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values, in the order given. Who believes those below 0.05 errs in 5 % of families at most."""
    adjusted, highest = [0.0] * len(p_values), 0.0
    for rank, at in enumerate(sorted(range(len(p_values)), key=lambda at: p_values[at])):
        if not 0 <= p_values[at] <= 1:
            raise ValueError(f"{p_values[at]} is no p-value")
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[at]))
        adjusted[at] = highest
    return adjusted


def standard_error(values: Sequence[float], clusters: Sequence[Hashable] | None = None) -> float:
    """Of the mean of `values` [rows]; nan for a single cluster."""
    numbers, of, count = _checked(values, clusters)
    return _error(numbers, of, count) if count > 1 else math.nan


def _checked(values: Any, clusters: Sequence[Hashable] | None) -> tuple[np.ndarray, np.ndarray, int]:
    """The values, each row's cluster as a number from 0, and how many clusters there are."""
    numbers = np.asarray(values, dtype=float)
    if numbers.ndim != 1 or not len(numbers):
        raise ValueError("statistics need at least one row")
    if not np.isfinite(numbers).all():
        raise ValueError("a value is no finite number")
    if clusters is None:
        return numbers, np.arange(len(numbers)), len(numbers)
    if len(clusters) != len(numbers):
        raise ValueError(f"{len(numbers)} values have {len(clusters)} clusters")
    names: dict[Hashable, int] = collections.defaultdict(lambda: len(names))
    of = np.array([names[("alone", at) if name == "" else ("in", name)] for at, name in enumerate(clusters)])
    return numbers, of, len(names)


def _check_bounds(numbers: np.ndarray) -> None:
    if numbers.min() < 0 or numbers.max() > 1:
        raise ValueError("bounded values lie in 0..1; say bounded=False for others")


def _error(numbers: np.ndarray, of: np.ndarray, count: int) -> float:
    residuals = numbers - numbers.mean()
    if not residuals.any():
        return 0.0
    totals = np.bincount(of, weights=residuals, minlength=count)
    # Totals that cancel leave rounding errors behind.
    totals[np.abs(totals) < 1e-12 * np.abs(residuals).max() * len(numbers)] = 0.0
    return math.sqrt(count / (count - 1) * float((totals**2).sum())) / len(numbers)


def _quantile(level: float, count: int) -> float:
    return float(special.stdtrit(count - 1, 0.5 + level / 2))
