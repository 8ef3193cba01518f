"""The paper's claims, tested on a grid: for each the paired difference, on the same questions and the same seeds.

Claims and figures are fixed here, before any result: what is tested is not chosen by how it looks. Holm's adjustment is
over the claims that the grid can test.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from capcur_jax.evaluation import statistics
from capcur_jax.grid.report import seeds
from capcur_jax.grid.report.gather import KNOWN, Figures, Grid
from capcur_jax.grid.report.seeds import Estimate
from capcur_jax.grid.rows import BASE, QWEN3, QWEN25

NAMES = {QWEN3: "Qwen3-VL-8B", QWEN25: "Qwen2.5-VL-7B", None: "model not named"}


class Metric(NamedTuple):
    """A figure of a row: a weighted mean of its sets'.

    sets: with weights; {}: all of the grid's alike. tokens: of response lengths, not of right answers.
    """

    title: str
    sets: dict[str, float]
    tokens: bool = False
    paper: str = ""  # what stands for it in the paper's main table


METRICS = {
    "visual": Metric("visual", {"visual": 1.0}, paper="visual math"),
    "perception": Metric("perception", {"perception": 1.0}, paper="perception"),
    "overall": Metric("overall", {"visual": 0.5, "perception": 0.5}, paper="overall"),
    "text": Metric("text", {"text": 1.0}),
    "length": Metric("response length", {}, tokens=True, paper="response length, relative"),
}


def metric_of(name: str) -> Metric:
    """One of METRICS, or right answers to the set of that name, or to those of "a + b" as their mean."""
    parts = name.split(" + ")
    return METRICS.get(name) or Metric(name, dict.fromkeys(parts, 1 / len(parts)))


class Claim(NamedTuple):
    """`better` has more of `metric` than `worse`, or less. paper: what the paper's difference is of."""

    title: str
    better: str
    worse: str
    metric: str
    paper: str
    less: bool = False

    @property
    def rows(self) -> str:
        return f"{self.better} {'<' if self.less else '>'} {self.worse}"


CLAIMS = (
    Claim("staged training helps", "staged", "base", "overall", "overall"),
    Claim("staged beats merged", "staged", "merged", "visual", "visual math"),
    Claim("1-2-3 beats 3-2-1", "staged", "order_321", "visual", "visual math"),
    Claim("1-2-3 beats 2-1-3", "staged", "order_213", "visual", "visual math"),
    Claim("perception by RL beats SFT", "staged", "sft_perception", "visual", "WeMath"),
    Claim("staged answers shorter than merged", "staged", "merged", "length", "response length, relative", less=True),
    Claim("capability beats difficulty", "staged", "difficulty", "overall", "average of 7 benchmarks"),
    Claim("difficulty beats merged", "difficulty", "merged", "overall", "average of 7 benchmarks"),
    Claim("both beat capability", "capability_x_difficulty", "staged", "overall", "average of 7 benchmarks"),
    Claim("both beat difficulty", "capability_x_difficulty", "difficulty", "overall", "average of 7 benchmarks"),
)
HOLDS, OPPOSITE, OPEN = "holds", "the opposite holds", "not shown"


@dataclasses.dataclass(frozen=True)
class Found:
    """A claim on this grid. Figures in points, of lengths in per cent of the other row's.

    missing: why it can't be tested ("": it can). same_sign: of how many seeds the difference has the claim's sign.
    verdict: HOLDS, OPPOSITE or OPEN at 5 % of the family; "" where it can't be tested.
    """

    claim: Claim
    missing: str = ""
    difference: Estimate | None = None
    seeds: tuple[int, ...] = ()
    same_sign: int = 0
    p_holm: float = np.nan
    detectable: float = np.nan
    verdict: str = ""

    @property
    def paper(self) -> dict[str, float]:
        """Model -> the paper's difference; {}: not known."""
        return paper_difference(self.claim.better, self.claim.worse, self.claim.paper)


class Measures:
    """Figures of a grid's rows, and what they vary by between seeds."""

    def __init__(self, grid: Grid):
        self.grid = grid

    def weights(self, metric: str) -> dict[str, float]:
        """Set -> its weight; {} where the grid lacks one."""
        wanted = metric_of(metric).sets or dict.fromkeys(self.grid.clusters, 1 / max(1, len(self.grid.clusters)))
        return wanted if wanted.keys() <= self.grid.clusters.keys() else {}

    def value(self, row: str, metric: str) -> Estimate | None:
        """A row's figure, in per cent or tokens; None where there is none."""
        figures = self.grid.rows.get(row)
        if figures is None or not self.weights(metric):
            return None
        parts = self._parts([figures], metric, [slice(None)])
        return None if parts is None else self._estimate(parts[0], metric, _trained(figures))

    def difference(self, better: str, worse: str, metric: str) -> tuple[Estimate, np.ndarray, tuple[int, ...]] | None:
        """(`better` less `worse` in points, or of lengths in per cent of `worse`; seed by seed; the seeds).

        None where one of them is missing, or no seed is in both.
        """
        left, right = self.grid.rows.get(better), self.grid.rows.get(worse)
        if left is None or right is None or not self.weights(metric):
            return None
        common = [seed for seed in left.seeds if seed in right.seeds] if left.seeds and right.seeds else None
        if common == []:
            return None
        of = [_those(figures, common) for figures in (left, right)]
        parts = self._parts([left, right], metric, of)
        if parts is None:
            return None
        one, other = parts
        scale = 1.0
        if metric_of(metric).tokens:  # a ratio less 1, by its linear part
            weights = self.weights(metric)
            sizes = [sum(w * part[name].mean() for name, w in weights.items()) for part in (one, other)]
            if not sizes[1]:
                return None
            ratio, scale = sizes[0] / sizes[1], 100 / sizes[1]
            gains = {name: scale * (one[name] - ratio * other[name]) for name in weights}
            found = self._estimate(gains, metric, _trained(left) + _trained(right), scale)
            by_seed = scale * sum(w * (one[name] - other[name]).mean(1) for name, w in weights.items())
            found = found._replace(mean=np.asarray(100 * (ratio - 1)))
        else:
            gains = {name: one[name] - other[name] for name in one}
            found = self._estimate(gains, metric, _trained(left) + _trained(right))
            by_seed = sum(w * gains[name].mean(1) for name, w in self.weights(metric).items())
        return found, np.asarray(by_seed), tuple(common if common is not None else left.seeds or right.seeds)

    def why_not(self, better: str, worse: str, metric: str) -> str:
        """Why there is no such difference of two rows that are both there."""
        if not self.weights(metric):
            return f"not all sets of '{METRICS[metric].title}' were asked"
        left, right = (self.grid.rows[row].seeds for row in (better, worse))
        if left and right and not {*left} & {*right}:
            return f"no seed in common: {better} has {_listed(left)}, {worse} has {_listed(right)}"
        return "the lengths of answers are not known"

    def by_seed(self, row: str, metric: str) -> np.ndarray:
        """[seeds]; empty where there is none."""
        figures = self.grid.rows.get(row)
        parts = figures and self._parts([figures], metric, [slice(None)])
        if not parts or not self.weights(metric):
            return np.zeros(0)
        return np.asarray(sum(w * parts[0][name].mean(1) for name, w in self.weights(metric).items()))

    @functools.cache  # noqa: B019 (lives as long as the page is made)
    def pool(self, metric: str) -> seeds.Pool:
        """Over all trained rows, in the metric's unit. The base is none: where its answers differ between runs (another
        commit, drawn answers) training is not why."""
        return seeds.pool(self.by_seed(row, metric) for row in self.grid.rows if row != BASE.name)

    def _parts(self, rows: list[Figures], metric: str, of: list) -> list[dict[str, np.ndarray]] | None:
        """Of each row set -> [seeds, questions], in per cent or tokens. Lengths: of questions that all answered."""
        parts: list[dict[str, np.ndarray]] = [{} for _ in rows]
        for name in self.weights(metric):
            if not metric_of(metric).tokens:
                for part, figures, which in zip(parts, rows, of, strict=True):
                    part[name] = 100 * figures.credit[name][which]
                continue
            known = self._answered(name)
            if not known.any():
                return None
            for part, figures, which in zip(parts, rows, of, strict=True):
                part[name] = figures.tokens[name][which][:, known]
        return parts

    @functools.cache  # noqa: B019
    def _answered(self, name: str) -> np.ndarray:
        """[questions]: whether the length of every run's answer is known."""
        return np.logical_and.reduce([np.isfinite(row.tokens[name]).all(0) for row in self.grid.rows.values()])

    def _estimate(self, parts: dict[str, np.ndarray], metric: str, trained: int, scale: float = 1.0) -> Estimate:
        weights, pooled = self.weights(metric), self.pool(metric)
        figures = sum(w * parts[name].mean(1) for name, w in weights.items())
        clusters = []
        for name in weights:
            known = self._answered(name) if metric_of(metric).tokens else np.ones(len(self.grid.clusters[name]), bool)
            clusters.append([one for one, there in zip(self.grid.clusters[name], known, strict=True) if there])
        means = [parts[name].mean(0) for name in weights]
        questions = seeds.question_variance(means, list(weights.values()), clusters)
        count = len({one for some in clusters for one in some})
        pooled = pooled._replace(variance=scale**2 * pooled.variance)
        return seeds.estimate(figures, trained, pooled, questions, count)


def judged(measures: Measures) -> list[Found]:
    """All claims, those that can't be tested with the reason."""
    found = [_found(claim, measures) for claim in CLAIMS]
    p_values = {one.claim: float(one.difference.p()) for one in found if one.difference and not one.missing}
    adjusted = dict(zip(p_values, statistics.holm(list(p_values.values())), strict=True))
    return [_judged(one, adjusted[one.claim], len(adjusted)) if one.claim in adjusted else one for one in found]


def _found(claim: Claim, measures: Measures) -> Found:
    if missing := [row for row in (claim.better, claim.worse) if row not in measures.grid.rows]:
        return Found(claim, f"no finished run of {', '.join(missing)}")
    found = measures.difference(claim.better, claim.worse, claim.metric)
    if found is None:
        return Found(claim, measures.why_not(claim.better, claim.worse, claim.metric))
    difference, by_seed, common = found
    same = int(((by_seed < 0) if claim.less else (by_seed > 0)).sum())
    missing = "" if np.isfinite(difference.p()) else "no row has two seeds: training noise is not known"
    return Found(claim, missing, difference, common, same)


def _judged(found: Found, p_holm: float, claims: int) -> Found:
    assert found.difference is not None
    verdict = OPEN
    if p_holm < 1 - statistics.LEVEL:
        verdict = HOLDS if (found.difference.mean < 0) == found.claim.less else OPPOSITE
    detectable = found.difference.detectable(claims)
    return dataclasses.replace(found, p_holm=p_holm, detectable=detectable, verdict=verdict)


def paper_difference(better: str, worse: str, metric: str) -> dict[str, float]:
    """Model -> what the paper's page has for it, in points, or of lengths in per cent; {}: not known."""
    found = {}
    for value in KNOWN[better].paper:
        if value.metric != metric:
            continue
        if value.over == worse:
            found[NAMES[value.model]] = value.value
        for other in KNOWN[worse].paper:
            if not value.over and not other.over and (other.metric, other.model) == (metric, value.model):
                found[NAMES[value.model]] = value.value - other.value
    for value in KNOWN[worse].paper:
        if value.metric == metric and value.over == better:
            found[NAMES[value.model]] = -value.value
    return found


def _trained(figures: Figures) -> int:
    return int(bool(figures.seeds))


def _listed(numbers: Iterable[int]) -> str:
    return ", ".join(map(str, numbers))


def _those(figures: Figures, common: list[int] | None) -> slice | list[int]:
    if common is None:
        return slice(None)
    return [figures.seeds.index(seed) for seed in common]
