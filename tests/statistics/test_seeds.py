import random

import numpy as np
import pytest
from scipy import stats

from moepp.statistics.seeds import (
    Estimate,
    SharedError,
    holm,
    mean_interval,
    minimal_detectable_difference,
    paired_difference,
    spans,
    variance_ratio_interval,
)

LOSSES, BASELINE = [3.21, 3.25, 3.19], [3.24, 3.27, 3.20]


def test_interval_is_students_t_as_scipy_computes_it():
    estimate = mean_interval(LOSSES)
    low, high = stats.t.interval(0.95, 2, loc=sum(LOSSES) / 3, scale=stats.sem(LOSSES))
    assert (estimate.low, estimate.high) == pytest.approx((low, high))
    assert estimate.half_width == pytest.approx(4.302653 * stats.sem(LOSSES), rel=1e-6)  # t, not the normal 1.96


def test_one_value_has_a_mean_and_no_interval():
    estimate = mean_interval([3.2])
    assert (estimate.mean, estimate.n) == (3.2, 1)
    assert estimate.std is estimate.half_width is estimate.low is estimate.p_value is None
    assert not estimate.excludes_zero


def test_no_value_has_no_mean():
    with pytest.raises(ValueError, match="no values"):
        mean_interval([])


def test_paired_difference_is_the_paired_t_test():
    estimate, reference = paired_difference(LOSSES, BASELINE), stats.ttest_rel(LOSSES, BASELINE)
    assert estimate.p_value == pytest.approx(reference.pvalue)
    assert (estimate.low, estimate.high) == pytest.approx(tuple(reference.confidence_interval(0.95)))


@pytest.mark.parametrize("error", [0.0, 1e-9, 0.0024, 0.5])
@pytest.mark.parametrize("significance", [0.05, 0.003, 1e-12])
def test_p_is_the_level_at_which_the_interval_of_seeds_and_text_ends_at_zero(error, significance):
    level, shared = 1 - significance, SharedError(error, 60)
    half_width = Estimate(0.0, 0.011, 3, shared, level).half_width
    seeds, text = stats.t.isf(significance / 2, 2) * 0.011 / 3**0.5, stats.t.isf(significance / 2, 60) * error
    assert half_width == pytest.approx((seeds**2 + text**2) ** 0.5, rel=1e-3)  # 1 - 1e-12 has four digits of 1e-12
    assert Estimate(half_width, 0.011, 3, shared).p_value == pytest.approx(significance, rel=1e-3)


@pytest.mark.parametrize("std, error, p", [(0.0, 0.01, 0.0456), (0.01, 1e-300, 0.0742), (0.0, 0.0, 0.0)])
def test_an_error_that_is_none_leaves_the_test_of_the_other(std, error, p):
    assert Estimate(0.02, std, 3, SharedError(error, 10**6)).p_value == pytest.approx(p, abs=1e-4)


def test_a_mean_far_beyond_its_errors_has_a_p_that_is_not_above_either_and_none_below():
    for mean in (1e-15, 1e-3, 1.0, 1e6):
        found = Estimate(mean, 1e-5, 20, SharedError(1e-5, 5000))
        assert 0.0 <= found.p_value <= 1.0
        assert found.p_value >= Estimate(mean, 1e-5, 20).p_value


@pytest.mark.parametrize("scatter", [0.011, 0.0005])
def test_the_detectable_difference_of_seeds_and_text_is_found_with_the_stated_power(scatter):
    generator, found = np.random.default_rng(0), []
    effect = Estimate(0.0, scatter, 5, SharedError(0.0024, 60)).detectable_difference()
    for _ in range(10_000):
        seeds = effect + generator.normal(0, 0.0024) + generator.normal(0, scatter, 5)
        error = 0.0024 * (generator.chisquare(60) / 60) ** 0.5
        found.append(Estimate(seeds.mean(), seeds.std(ddof=1), 5, SharedError(error, 60)).excludes_zero)
    assert np.mean(found) == pytest.approx(0.8, abs=0.015)
    assert Estimate(0.0, None, 1).detectable_difference() is None


def test_pairing_removes_what_the_seed_does_to_both():
    seeds = [0.0, 0.5, -0.4, 0.9]
    paired = paired_difference(
        [3 + s + e for s, e in zip(seeds, (0.11, 0.10, 0.09, 0.10), strict=True)], [3 + s for s in seeds]
    )
    assert paired.excludes_zero and paired.mean == pytest.approx(0.1)


def test_pairs_must_match():
    with pytest.raises(ValueError):
        paired_difference([1.0, 2.0], [1.0])


def test_identical_differences_are_certain_and_identical_arms_are_equal():
    assert paired_difference([2.0, 3.0], [1.0, 2.0]).p_value == 0.0
    assert paired_difference([2.0, 3.0], [2.0, 3.0]).p_value == 1.0


def test_the_interval_covers_the_true_mean_95_times_in_100():
    generator = random.Random(0)
    trials = 4000
    covered = sum(not mean_interval([generator.gauss(0, 1) for _ in range(3)]).excludes_zero for _ in range(trials))
    assert covered / trials == pytest.approx(0.95, abs=0.01)  # the normal quantile would cover 0.81


def test_holm_by_hand():
    # Sorted .005 .01 .03 .04 times 4 3 2 1 = .02 .03 .06 .04; the last may not fall below the one before.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


@pytest.mark.parametrize("n, level", [(3, 0.95), (3, 1 - 0.05 / 7), (5, 0.95)])
def test_a_detectable_difference_is_found_with_the_stated_power(n, level):
    effect = minimal_detectable_difference(std=2.0, n=n, level=level)
    critical = stats.t.ppf((1 + level) / 2, n - 1)
    assert 1 - stats.nct.cdf(critical, n - 1, effect / 2.0 * n**0.5) == pytest.approx(0.8, abs=1e-4)


def test_two_independent_samples_find_their_detectable_difference_that_often():
    effect = minimal_detectable_difference(std=2**0.5, n=4, paired=False)  # of a difference of two unit deviations
    generator = np.random.default_rng(0)
    a, b = generator.standard_normal((2, 20_000, 4))
    assert np.mean(stats.ttest_ind(a + effect, b, axis=1).pvalue < 0.05) == pytest.approx(0.8, abs=0.01)
    assert effect < minimal_detectable_difference(std=2**0.5, n=4)  # more degrees of freedom


@pytest.mark.parametrize("correlation", [0.0, 0.9])
def test_the_interval_of_two_variances_of_pairs_covers_their_ratio_95_times_in_100(correlation):
    generator = np.random.default_rng(0)
    cov = [[4.0, 2 * correlation], [2 * correlation, 1.0]]  # a ratio of 4
    pairs = generator.multivariate_normal([0, 0], cov, size=(3000, 5))
    found = [variance_ratio_interval(a.tolist(), b.tolist()) for a, b in pairs.transpose(0, 2, 1)]
    assert sum(low < 4 < high for low, high in found) / 3000 == pytest.approx(0.95, abs=0.012)


def test_at_an_end_of_the_interval_pitmans_correlation_has_p_5_percent():
    a, b = [3.0, 3.4, 2.9, 3.8, 3.1], [1.0, 1.3, 0.7, 1.2, 1.1]
    for end in variance_ratio_interval(a, b):
        scaled = [end**0.5 * y for y in b]
        sums, differences = ([x + sign * y for x, y in zip(a, scaled, strict=True)] for sign in (1, -1))
        assert stats.pearsonr(sums, differences).pvalue == pytest.approx(0.05)


@pytest.mark.parametrize(("a", "b"), [([1.0, 2.0], [1.0, 3.0]), ([1.0, 1.0, 1.0], [1.0, 2.0, 3.0])])
def test_variances_without_spread_or_of_two_pairs_have_no_interval(a, b):
    with pytest.raises(ValueError, match="three pairs"):
        variance_ratio_interval(a, b)


def test_one_pair_detects_nothing():
    assert minimal_detectable_difference(1.0, 1) is None


def test_seeds_in_a_row_are_listed_by_their_ends():
    assert spans([439, *range(420, 439), 3, 5, 6]) == "3, 5, 6, 420 to 439"
