import numpy as np
import pytest
from scipy import stats

from moepp.statistics import resampling
from moepp.statistics.resampling import (
    bootstrap_sums,
    chance,
    correlation,
    percentile_interval,
    rank_correlation,
    shuffled_sums,
)


@pytest.fixture
def generator():
    return np.random.default_rng(7)


def interval(values_N, draws=400):
    sums_D = bootstrap_sums(values_N[:, None], draws)[:, 0]
    return percentile_interval(values_N.mean(), sums_D / len(values_N))


def test_the_bootstrap_agrees_with_scipy(generator):
    values = generator.exponential(size=80)
    ours = interval(values, draws=20_000)
    theirs = stats.bootstrap(
        (values,), np.mean, n_resamples=20_000, method="percentile", random_state=1
    ).confidence_interval
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=0.01)


def test_over_five_values_it_does_not_cover_so_seeds_take_students_t(generator):
    found = [interval(generator.normal(size=5), draws=200) for _ in range(400)]
    assert np.mean([one.low <= 0 <= one.high for one in found]) < 0.9


def test_chance_by_hand():
    null = np.array([-3.0, -1.0, 0.0, 1.0, 2.0])
    assert chance(2.0, null) == pytest.approx(3 / 6)  # -3, 2 and the observed one
    assert chance(2.0, null, two_sided=False) == pytest.approx(2 / 6)
    assert chance(9.0, null) == pytest.approx(1 / 6)


def test_shuffled_sums_keep_totals_and_group_sizes():
    values = np.stack([np.ones(9), np.arange(9.0)], axis=1)
    sums = shuffled_sums(values, (2, 7), draws=50)
    assert sums.shape == (50, 2, 2)
    assert (sums[:, 0, 0] == 2).all() and (sums[:, 1, 0] == 7).all()
    assert (sums[..., 1].sum(1) == 36).all() and len(set(sums[:, 0, 1])) > 5
    with pytest.raises(ValueError, match=r"\[2, 6\] rows do not make up 9"):
        shuffled_sums(values, (2, 6))


def test_the_same_seed_gives_the_same_draws_whatever_the_block(monkeypatch, generator):
    values = generator.normal(size=(30, 2))
    whole = bootstrap_sums(values, draws=70, seed=3)
    assert bootstrap_sums(values[:, :1], draws=70, seed=3) == pytest.approx(whole[:, :1])
    assert not (bootstrap_sums(values, draws=70, seed=4) == whole).any()
    monkeypatch.setattr(resampling, "BLOCK", 300)
    assert bootstrap_sums(values, draws=70, seed=3) == pytest.approx(whole)


def test_no_examples_cannot_be_resampled():
    with pytest.raises(ValueError, match="no examples"):
        bootstrap_sums(np.empty((0, 1)))


def test_percentiles_leave_out_what_is_not_finite():
    found = percentile_interval(1.0, np.array([np.nan, 0.0, 1.0, 2.0]))
    assert found.low == pytest.approx(0.05) and found.high == pytest.approx(1.95)
    assert np.isnan(percentile_interval(1.0, np.array([np.nan])).low)


def test_correlations_are_scipys(generator):
    x, y = generator.normal(size=(4, 12)), generator.integers(0, 5, size=(4, 12)).astype(float)
    assert correlation(x, y) == pytest.approx([stats.pearsonr(a, b)[0] for a, b in zip(x, y, strict=True)])
    assert rank_correlation(x, y) == pytest.approx([stats.spearmanr(a, b)[0] for a, b in zip(x, y, strict=True)])
    assert np.isnan(correlation(x[0], np.ones(12)))
