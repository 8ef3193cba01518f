"""Intervals and tests against closed forms, scipy.stats and simulation."""

import math

import numpy as np
import pytest
from scipy import stats

from capcur_jax.evaluation import statistics
from capcur_jax.evaluation.statistics import mean_interval, paired_difference

SEEDS = 600  # simulations; a coverage of 95 % then has an error of 0.9 points


def clustered(rng, groups, size, rate, together):
    """0/1 rows [groups * size]: with probability `together` a row has its cluster's value, else its own."""
    shared = rng.random(groups) < rate
    alone = rng.random((groups, size)) < rate
    rows = np.where(rng.random((groups, size)) < together, shared[:, None], alone)
    return rows.ravel().astype(float), np.repeat(np.arange(groups), size)


def sandwich(values, clusters):
    """The clustered error as a regression on a constant has it: (X'X)^-1 (sum of s s') (X'X)^-1, G / (G - 1)."""
    totals = [
        sum(v - np.mean(values) for v, c in zip(values, clusters, strict=True) if c == one)
        for one in sorted(set(clusters))
    ]
    return math.sqrt(len(totals) / (len(totals) - 1) * sum(t * t for t in totals)) / len(values)


def test_independent_rows_have_the_textbook_error():
    values = np.random.default_rng(0).normal(size=50)
    mean, low, high = mean_interval(values, bounded=False)
    expected = stats.t.interval(0.95, 49, values.mean(), stats.sem(values))
    assert (mean, low, high) == pytest.approx((values.mean(), *expected))
    assert statistics.standard_error(values) == pytest.approx(stats.sem(values))


def test_clusters_have_the_sandwich_error():
    values, clusters = clustered(np.random.default_rng(1), 30, 5, 0.6, 0.7)
    error = sandwich(values, clusters)
    mean, low, high = mean_interval(values, clusters, bounded=False)
    assert (
        (high - mean) / stats.t.ppf(0.975, 29)
        == pytest.approx(error)
        == pytest.approx(statistics.standard_error(values, clusters))
    )
    assert mean - low == pytest.approx(high - mean)
    assert error > 1.5 * stats.sem(values)


def test_bounded_intervals_are_wilsons_of_the_effective_rows():
    values = np.array([1.0] * 30 + [0.0] * 10)
    _, low, high = mean_interval(values)
    rows, t = 39, stats.t.ppf(0.975, 39)  # p (1 - p) / (p (1 - p) / (n - 1))
    for edge in (low, high):  # Wilson's: where the mean is t errors of the edge away
        assert abs(0.75 - edge) == pytest.approx(t * math.sqrt(edge * (1 - edge) / rows))


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_all_right_or_all_wrong_is_not_certain(value):
    mean, low, high = mean_interval([value] * 20)
    assert mean == value and 0 <= low < high <= 1 and high - low == pytest.approx(0.18, abs=0.03)
    _, few_low, few_high = mean_interval([value] * 20, [at // 5 for at in range(20)])
    assert few_high - few_low > 2 * (high - low)  # four clusters say less than twenty


def test_a_single_cluster_says_nothing():
    assert mean_interval([0, 1, 1], ["x"] * 3) == pytest.approx((2 / 3, 0, 1))
    assert all(map(math.isnan, mean_interval([0, 1, 1], ["x"] * 3, bounded=False)[1:]))
    assert mean_interval([1]) == (1, 0, 1)
    found = paired_difference([0, 1], [1, 1], ["x"] * 2)
    assert (found.low, found.high, found.p, found.clusters) == (-1, 1, 1, 1) and math.isnan(found.detectable)


def test_an_empty_cluster_name_is_a_row_of_its_own():
    values = [1, 0, 1, 1, 0, 0]
    assert mean_interval(values, [""] * 6) == mean_interval(values)
    assert mean_interval(values, ["", "", "a", "a", "", ""]) == mean_interval(values, [0, 1, 2, 2, 3, 4])


@pytest.mark.parametrize("values, clusters, said", [
    ([], None, "at least one"), ([1, math.nan], None, "finite"), ([1], ["a", "b"], "clusters"), ([2], None, "0..1"),
])  # fmt: skip
def test_what_is_no_sample_is_refused(values, clusters, said):
    with pytest.raises(ValueError, match=said):
        mean_interval(values, clusters)


@pytest.mark.parametrize("rate, together, groups", [(0.5, 0.0, 60), (0.7, 0.8, 60), (0.95, 0.5, 80), (0.6, 0.9, 15)])
def test_intervals_cover_the_truth_in_95_of_100(rate, together, groups):
    rng, hits = np.random.default_rng(2), 0
    for _ in range(SEEDS):
        _, low, high = mean_interval(*clustered(rng, groups, 5, rate, together))
        hits += low <= rate <= high
    assert 0.925 <= hits / SEEDS <= 0.985


def test_rows_taken_for_independent_would_cover_too_little():
    rng, hits = np.random.default_rng(2), 0
    for _ in range(SEEDS):
        _, low, high = mean_interval(clustered(rng, 60, 5, 0.7, 0.8)[0])
        hits += low <= 0.7 <= high
    assert hits / SEEDS < 0.85


def test_the_jackknife_of_a_mean_is_its_clustered_interval():
    values, clusters = clustered(np.random.default_rng(3), 40, 5, 0.6, 0.5)
    found = statistics.jackknife_interval(lambda rows: values[rows].mean(), len(values), clusters)
    assert found == pytest.approx(mean_interval(values, clusters, bounded=False), rel=1e-9)


def test_the_jackknife_of_a_ratio_covers():
    def f1(rows):
        hits = (gold[rows] & said[rows]).sum()
        return 2 * hits / max(1, gold[rows].sum() + said[rows].sum())

    rng, hits, calls = np.random.default_rng(4), 0, 150
    truth = 2 * 0.4 / (0.5 + 0.5)  # of gold, half are said to be so; 80 % of them rightly
    for _ in range(calls):
        gold = rng.random(600) < 0.5
        said = np.where(rng.random(600) < 0.8, gold, ~gold)
        _, low, high = statistics.jackknife_interval(f1, 600, [f"image {row // 2}" for row in range(600)], highest=1.0)
        hits += low <= truth <= high <= 1
    assert 0.9 <= hits / calls <= 0.99
    assert statistics.jackknife_interval(lambda rows: 0.5, 3, ["a"] * 3, lowest=0, highest=1) == (0.5, 0, 1)


def test_pairs_without_clusters_are_tested_by_mcnemar():
    a = [1] * 40 + [0] * 12 + [1] * 3 + [0] * 5
    b = [1] * 40 + [1] * 12 + [0] * 3 + [0] * 5
    found = paired_difference(a, b)
    assert (found.wins, found.losses, found.ties, found.rows, found.test) == (12, 3, 45, 60, "mcnemar")
    assert found.p == pytest.approx(stats.binomtest(3, 15).pvalue) and found.difference == pytest.approx(9 / 60)
    gains = np.subtract(b, a)
    assert (found.low, found.high) == pytest.approx(stats.t.interval(0.95, 59, gains.mean(), stats.sem(gains)))


def test_pairs_with_clusters_are_tested_by_their_totals():
    rng = np.random.default_rng(5)
    a, clusters = clustered(rng, 25, 4, 0.5, 0.6)
    b, _ = clustered(rng, 25, 4, 0.6, 0.6)
    found = paired_difference(a, b, clusters)
    error = sandwich(b - a, clusters)
    assert found.test == "t" and found.clusters == 25
    assert found.p == pytest.approx(2 * stats.t.sf(abs((b - a).mean()) / error, 24))
    assert found.high - found.difference == pytest.approx(stats.t.ppf(0.975, 24) * error)
    # Clusters of equal size: a paired t test of their means is the same test.
    means = (b - a).reshape(25, 4).mean(1)
    assert found.p == pytest.approx(stats.ttest_1samp(means, 0).pvalue)
    back = paired_difference(b, a, clusters)
    assert (back.difference, back.low, back.p, back.wins) == pytest.approx(
        (-found.difference, -found.high, found.p, found.losses)
    )


def test_equal_answers_differ_by_nothing_that_could_be_seen():
    found = paired_difference([1, 0] * 50, [1, 0] * 50)
    assert found.difference == 0 and found.p == 1 and found.ties == 100
    assert found.high == -found.low == pytest.approx(0.03, abs=0.002)  # the rule of three
    assert 0 < found.detectable < 0.06
    same = paired_difference([0] * 6, [1] * 6, list("aabbcc"))
    assert same.difference == 1 and same.high == 1 and same.low < 0.9 and same.p == pytest.approx(0.25)


def test_numbers_without_bounds_have_pairs_too():
    found = paired_difference([10, 20, 30.5], [11, 19, 33.5], bounded=False)
    assert found.p == pytest.approx(stats.ttest_rel([11, 19, 33.5], [10, 20, 30.5]).pvalue) and found.difference == 1
    with pytest.raises(ValueError, match="bounded=False"):
        paired_difference([10], [11])
    with pytest.raises(ValueError, match="no pairs"):
        paired_difference([1, 0], [1])


def test_no_difference_is_found_in_5_of_100_and_the_detectable_one_in_80():
    rng = np.random.default_rng(6)
    errors, groups, size = [], 60, 5
    for _ in range(200):  # the error of such rows
        a, clusters = clustered(rng, groups, size, 0.5, 0.6)
        errors.append(statistics.standard_error(clustered(rng, groups, size, 0.5, 0.6)[0] - a, clusters))
    detectable = statistics.smallest_detectable(float(np.mean(errors)), groups)
    found = {0.0: 0, detectable: 0}
    for shift in found:
        for _ in range(SEEDS):
            a, clusters = clustered(rng, groups, size, 0.5, 0.6)
            b, _ = clustered(rng, groups, size, 0.5 + shift, 0.6)
            found[shift] += paired_difference(a, b, clusters).p < 0.05
    assert 0.025 <= found[0.0] / SEEDS <= 0.075
    assert 0.75 <= found[detectable] / SEEDS <= 0.86


def test_detectable_differences_fall_with_the_root_of_the_rows():
    one, four = (statistics.smallest_detectable(0.1 / math.sqrt(n), 1000 * n) for n in (1, 4))
    assert one / four == pytest.approx(2, rel=0.01) and one == pytest.approx(0.1 * (1.96 + 0.84), rel=0.01)
    assert math.isnan(statistics.smallest_detectable(0.1, 1))


@pytest.mark.parametrize("wins, losses", [(0, 0), (5, 0), (3, 9), (50, 50), (400, 300)])
def test_mcnemar_is_the_binomial_test(wins, losses):
    expected = stats.binomtest(wins, wins + losses).pvalue if wins + losses else 1.0
    assert statistics.mcnemar(wins, losses) == pytest.approx(expected)


def test_holm_by_hand():
    assert statistics.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert statistics.holm([0.9, 0.6]) == [1.0, 1.0] and statistics.holm([]) == []
    with pytest.raises(ValueError, match="p-value"):
        statistics.holm([math.nan])


def test_holm_keeps_false_finds_of_a_family_below_5_in_100():
    rng = np.random.default_rng(7)
    false = sum(min(statistics.holm(rng.random(8).tolist())) < 0.05 for _ in range(2000))
    assert 0.03 <= false / 2000 <= 0.065
