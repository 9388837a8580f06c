import numpy as np
import pytest
from scipy import stats

from moepp.statistics import resampling
from moepp.statistics.resampling import (
    bootstrap_sums,
    chance,
    correlation,
    paired_bootstrap,
    percentile_interval,
    rank_correlation,
    shuffled_sums,
)


@pytest.fixture
def generator():
    return np.random.default_rng(7)


def interval(a_N, b_N, size_N=None, draws=400):
    value_M, draws_DM = paired_bootstrap(a_N[:, None], b_N[:, None], size_N, draws)
    return percentile_interval(value_M[0], draws_DM[:, 0])


def test_paired_bootstrap_agrees_with_scipy(generator):
    a, b = generator.exponential(size=80), generator.exponential(size=80)
    ours = interval(a, b, draws=20_000)
    theirs = stats.bootstrap(
        (a - b,), np.mean, n_resamples=20_000, method="percentile", random_state=1
    ).confidence_interval
    assert ours.value == pytest.approx(np.mean(a - b))
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=0.01)


def covered(draw, truth, trials=1000):
    hits = 0
    for _ in range(trials):
        found = interval(*draw())
        hits += found.low <= truth <= found.high
    return hits / trials


def test_paired_bootstrap_covers_what_it_says(generator):
    share = covered(lambda: (generator.normal(0.5, 1, size=100), generator.normal(0, 1, size=100)), 0.5)
    assert share == pytest.approx(0.95, abs=0.02)


def test_over_five_values_it_does_not_so_seeds_take_students_t(generator):
    assert covered(lambda: (generator.normal(size=5), np.zeros(5)), 0.0) < 0.9


def test_paired_bootstrap_of_a_ratio_covers(generator):
    """Answers of very different length, whose bytes share a rate: bytes as units would cover far too little."""

    def draw():
        size = generator.integers(1, 40, size=120)
        rates = generator.normal(1.5, 0.2, size=(2, 120))
        return size * (rates[0] + 0.1), size * rates[1], size

    assert covered(draw, 0.1) == pytest.approx(0.95, abs=0.02)


def test_paired_bootstrap_removes_what_an_example_does_to_both(generator):
    example = generator.normal(0, 5, size=200)
    a, b = example + generator.normal(0.3, 1, size=200), example + generator.normal(0, 1, size=200)
    paired, apart = interval(a, b), interval(a, np.zeros(200))
    assert paired.excludes_zero and paired.high - paired.low < 0.5 * (apart.high - apart.low)
    with pytest.raises(ValueError, match="200 and 199 scores make no pairs"):
        interval(a, b[1:])


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
