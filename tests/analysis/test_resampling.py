import numpy as np
import pytest
from scipy import stats

from moepp.analysis import resampling
from moepp.analysis.resampling import (
    bootstrap_mean,
    bootstrap_ratio,
    bootstrap_sums,
    chance,
    correlation,
    paired_bootstrap,
    percentile_interval,
    permutation_test,
    rank_correlation,
    shuffled_sums,
    sign_flip_test,
)


@pytest.fixture
def generator():
    return np.random.default_rng(7)


def test_bootstrap_mean_agrees_with_scipy(generator):
    values = generator.exponential(size=80)
    ours = bootstrap_mean(values, draws=20_000)
    theirs = stats.bootstrap(
        (values,), np.mean, n_resamples=20_000, method="percentile", random_state=1
    ).confidence_interval
    assert ours.value == values.mean()
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=0.01)


def covered(draw, truth, interval, trials=1000):
    hits = 0
    for _ in range(trials):
        found = interval(*draw())
        hits += found.low <= truth <= found.high
    return hits / trials


def test_bootstrap_of_the_mean_covers_what_it_says(generator):
    share = covered(lambda: [generator.normal(size=100)], 0.0, lambda x: bootstrap_mean(x, draws=400))
    assert share == pytest.approx(0.95, abs=0.02)


def test_bootstrap_over_five_values_does_not_so_seeds_take_students_t(generator):
    share = covered(lambda: [generator.normal(size=5)], 0.0, lambda x: bootstrap_mean(x, draws=400))
    assert share < 0.9


def test_bootstrap_ratio_covers_where_tokens_of_an_example_go_together(generator):
    """Examples of very different length whose tokens share a rate: tokens as units would cover far too little."""

    def draw():
        length = generator.integers(1, 40, size=120)
        rate = generator.normal(1.5, 0.2, size=120)
        return length * rate, length

    assert covered(draw, 1.5, lambda a, b: bootstrap_ratio(a, b, draws=400)) == pytest.approx(0.95, abs=0.02)


def test_paired_bootstrap_removes_what_an_example_does_to_both(generator):
    example = generator.normal(0, 5, size=200)
    a, b = example + generator.normal(0.3, 1, size=200), example + generator.normal(0, 1, size=200)
    paired, apart = paired_bootstrap(a, b), bootstrap_mean(a)
    assert paired.value == pytest.approx(np.mean(a - b)) and paired.excludes_zero
    assert paired.high - paired.low < 0.5 * (apart.high - apart.low)
    with pytest.raises(ValueError, match="200 and 199 scores make no pairs"):
        paired_bootstrap(a, b[1:])


def test_paired_bootstrap_covers(generator):
    share = covered(
        lambda: [generator.normal(0.5, 1, size=80), generator.normal(0, 1, size=80)],
        0.5,
        lambda a, b: paired_bootstrap(a, b, draws=400),
    )
    assert share == pytest.approx(0.95, abs=0.02)


def test_permutation_test_agrees_with_scipy(generator):
    a, b = generator.normal(0.5, 1, 40), generator.normal(0, 1, 60)
    theirs = stats.permutation_test(
        (a, b), lambda x, y, axis: x.mean(axis) - y.mean(axis), vectorized=True, n_resamples=20_000, random_state=1
    )
    assert permutation_test(a, b, draws=20_000) == pytest.approx(theirs.pvalue, abs=0.005)


def test_sign_flip_test_agrees_with_scipy(generator):
    differences = generator.normal(0.2, 1, 50)
    theirs = stats.permutation_test(
        (differences,),
        lambda x, axis: x.mean(axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=20_000,
        random_state=1,
    )
    assert sign_flip_test(differences, draws=20_000) == pytest.approx(theirs.pvalue, abs=0.01)


@pytest.mark.parametrize(
    "test", [lambda a, b, s: permutation_test(a, b, 199, s), lambda a, b, s: sign_flip_test(a - b, 199, s)]
)
def test_tests_reject_a_true_hypothesis_as_often_as_they_say(generator, test):
    p = [test(generator.normal(size=30), generator.normal(size=30), seed) for seed in range(1000)]
    assert np.mean(np.array(p) <= 0.05) == pytest.approx(0.05, abs=0.02)


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
