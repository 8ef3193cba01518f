"""How sure a figure of few runs is: noise of training, seen between seeds, and of questions, seen between clusters.

A mean over S seeds and Q questions has both. Their variances are added (the noise of a single answer counts twice then,
on the safe side):

  seeds: of three runs a variance is hardly known, and t of 2 degrees of freedom shows nothing among ten claims. So it
    is pooled over all rows of the grid. Where the own seeds differ more, theirs counts, for rows may differ in noise.
  questions: Liang and Zeger's of clusters (evaluation/statistics.py), of the answers' means over the seeds.

Quantiles are Student's t with Satterthwaite's degrees of freedom. With fewer than FEW of the seeds (a grid of one or
two rows) that is too bold, and the seeds' own are taken. tests/grid/report/test_seeds.py measures the rate of false
claims, with equal and with unequal noise.

All functions work on arrays of figures alike: shapes [..., S] and [...].
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import special

from capcur_jax.evaluation import statistics
from capcur_jax.evaluation.statistics import LEVEL, POWER

FEW = 4  # degrees of freedom of the seeds' variance


class Pool(NamedTuple):
    """What a figure of one run varies by between seeds, over all rows. df 0: no row has two seeds."""

    variance: Any  # [...]
    df: int


class Estimate(NamedTuple):
    """A figure, its standard error [...] and degrees of freedom; nan where nothing can be said of them."""

    mean: Any
    error: Any
    df: Any

    def interval(self, level: float = LEVEL) -> tuple[Any, Any]:
        """Where the true figure is in `level` of all cases: (low, high)."""
        half = special.stdtrit(self.df, 0.5 + level / 2) * self.error
        return self.mean - half, self.mean + half

    def p(self) -> Any:
        """Two-sided, of no difference at all; nan where it can't be said."""
        with np.errstate(divide="ignore", invalid="ignore"):
            t = np.where(self.error > 0, np.abs(self.mean) / self.error, np.where(self.mean == 0, 0.0, np.inf))
        return np.where(np.isnan(self.error), np.nan, 2 * special.stdtr(self.df, -t))

    def detectable(self, claims: int = 1, level: float = LEVEL, power: float = POWER) -> float:
        """The smallest true difference that is found in `power` of all cases among so many claims, whatever the others
        are: at the level of Holm's first step."""
        return statistics.smallest_detectable(float(self.error), float(self.df) + 1, 1 - (1 - level) / claims, power)


def pool(rows: Iterable[Any]) -> Pool:
    """Of figures [..., S] of each row; S may differ. Rows of one seed say nothing."""
    squares: Any = 0.0
    df = 0
    for values in map(np.asarray, rows):
        if values.shape[-1] > 1:
            squares = squares + ((values - values.mean(-1, keepdims=True)) ** 2).sum(-1)
            df += values.shape[-1] - 1
    return Pool(squares / df if df else np.nan, df)


def estimate(figures: Any, trained: int, pooled: Pool, questions: Any, clusters: int) -> Estimate:
    """The mean of `figures` [..., S] and its error.

    Args:
      trained: how many of a figure's terms come from runs of their own: 1 of a row, 2 of a difference of two rows, and
        none of the base, which every seed shares.
      questions: variance [...] of the mean because the questions are a sample.
      clusters: of the questions.
    """
    figures, questions = np.asarray(figures, dtype=float), np.asarray(questions, dtype=float)
    count, mean = figures.shape[-1], figures.mean(-1)
    if not trained:
        return Estimate(mean, np.sqrt(questions), np.full(mean.shape, float(clusters - 1)))
    if not pooled.df:
        nothing = np.full(mean.shape, np.nan)
        return Estimate(mean, nothing, nothing)
    seeds = trained * np.asarray(pooled.variance, dtype=float)
    if count > 1:
        seeds = np.maximum(seeds, figures.var(-1, ddof=1))
    seeds = np.broadcast_to(seeds / count, mean.shape)
    whole = seeds + questions
    if pooled.df < FEW:
        return Estimate(mean, np.sqrt(whole), np.full(mean.shape, float(pooled.df)))
    with np.errstate(invalid="ignore"):
        df = whole**2 / (seeds**2 / pooled.df + questions**2 / max(1, clusters - 1))
    return Estimate(mean, np.sqrt(whole), np.where(whole > 0, df, float(pooled.df)))


def question_variance(parts: Sequence[Any], weights: Sequence[float], clusters: Sequence[Sequence[str]]) -> float:
    """Of a weighted mean of means of sets, because the questions are a sample; nan for a single cluster.

    Args:
      parts: [questions] of each set, means over the seeds.
      weights: of each set.
      clusters: of each set's questions. One may lie in several sets: two questions about one image.
    """
    total = sum(map(len, parts))
    scaled = [w * total / len(part) * (part - part.mean()) for part, w in zip(parts, weights, strict=True)]
    return statistics.standard_error(np.concatenate(scaled), [one for some in clusters for one in some]) ** 2
