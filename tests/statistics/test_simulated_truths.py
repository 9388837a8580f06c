"""What is printed, against truths that are known because they were drawn: coverage, false alarms, and what is said of
runs of which a fifth are stuck. Vectorised where thousands are needed.
"""

import numpy as np
import pytest
from scipy import stats

from moepp.reports.comparison import _differences
from moepp.statistics.clusters import cluster_error
from moepp.statistics.seeds import (
    Estimate,
    SharedError,
    mean_interval,
    median_interval,
    paired_difference,
    ratio_interval,
)
from moepp.statistics.stability import best_split, unstable_arms
from moepp.sweeps.spec import Contrast

GAP, STUCK = 0.7, 0.2  # nats, and the share of runs that are


@pytest.fixture
def generator():
    return np.random.default_rng(11)


def bimodal(generator, *shape):
    return generator.normal(4.6, 0.01, shape) + GAP * (generator.random(shape) < STUCK)


def coverage(intervals, truth):
    return np.mean([low <= truth <= high for low, high in intervals])


@pytest.mark.parametrize("n", [3, 5, 12])
def test_a_t_interval_over_seeds_covers(generator, n):
    found = [mean_interval(list(values)) for values in generator.normal(4.6, 0.02, (2000, n))]
    assert coverage([(one.low, one.high) for one in found], 4.6) == pytest.approx(0.95, abs=0.015)


def test_an_interval_of_seeds_crossed_with_examples_covers_other_seeds_and_examples(generator):
    """The same with the seeds' interval alone: it knows nothing of the examples that all seeds share."""
    crossed, alone = [], []
    for _ in range(1500):
        example_N = generator.normal(0, 1, 100)  # 0.1 on their mean
        seeds_SN = generator.normal(0, 0.1, (4, 1)) + example_N + generator.normal(0, 0.5, (4, 100))
        values = list(seeds_SN.mean(1))
        for kept, shared in ((crossed, {"shared": cluster_error(seeds_SN.mean(0))}), (alone, {})):
            found = paired_difference(values, [0.0] * 4, **shared)
            kept.append((found.low, found.high))
    assert 0.94 <= coverage(crossed, 0) <= 0.985  # leans to the safe side where few seeds and the examples weigh alike
    assert coverage(alone, 0) < 0.85


@pytest.mark.parametrize("scatter", [0.011, 0.002], ids=["seeds far above the text", "alike"])
@pytest.mark.parametrize("n", [3, 5, 6])
@pytest.mark.parametrize("significance", [0.05, 0.05 / 17], ids=["alone", "first of 17 in Holm's order"])
def test_a_difference_of_few_seeds_on_one_text_alarms_no_more_often_than_its_level(generator, scatter, n, significance):
    drawn, text, freedom = 40_000, 0.0024, 60
    seeds_DS = generator.normal(0, scatter, (drawn, n)) + generator.normal(0, text, (drawn, 1))
    error_D = text * np.sqrt(generator.chisquare(freedom, drawn) / freedom)
    columns = (seeds_DS.mean(1), seeds_DS.std(1, ddof=1), error_D)
    alarms = np.mean(
        [
            Estimate(mean, std, n, SharedError(error, freedom), 1 - significance).excludes_zero
            for mean, std, error in zip(*(column.tolist() for column in columns), strict=True)
        ]
    )
    most = significance + 3 * np.sqrt(significance / drawn)
    assert significance / 20 < alarms < most


def test_an_error_over_documents_covers_where_one_over_windows_does_not(generator):
    of_documents, of_windows = [], []
    for _ in range(1000):
        document_W = np.repeat(np.arange(25), 8)
        value_W = generator.normal(0, 1, 25)[document_W] + generator.normal(0, 1, 200)
        for kept, clusters in ((of_documents, document_W), (of_windows, None)):
            found = cluster_error(value_W, clusters)
            half = stats.t.ppf(0.975, found.freedom) * found.error
            kept.append((value_W.mean() - half, value_W.mean() + half))
    assert coverage(of_documents, 0) == pytest.approx(0.95, abs=0.02)
    assert coverage(of_windows, 0) < 0.75


def test_the_error_of_a_ratio_covers(generator):
    """Answers of very different length, whose bytes share a rate: bytes as units would cover far too little."""
    found = []
    for _ in range(1000):
        size_N = generator.integers(1, 40, 120).astype(float)
        value_N = size_N * generator.normal(0.1, 0.3, 120)
        shared, value = cluster_error(value_N, size_N=size_N), value_N.sum() / size_N.sum()
        half = stats.t.ppf(0.975, shared.freedom) * shared.error
        found.append((value - half, value + half))
    assert coverage(found, 0.1) == pytest.approx(0.95, abs=0.02)


def test_the_interval_of_a_speed_up_covers(generator):
    times = np.exp(generator.normal((0.3, 0.0), 0.1, (1500, 5, 2)))
    found = [ratio_interval(list(pairs[:, 0]), list(pairs[:, 1])) for pairs in times]
    assert coverage([(one.low, one.high) for one in found], np.exp(0.3)) == pytest.approx(0.95, abs=0.015)


@pytest.mark.parametrize("n", [3, 6, 13])
def test_the_median_covers_at_the_level_that_it_states_whatever_the_distribution(generator, n):
    truth = stats.norm.ppf(0.5 / (1 - STUCK), 4.6, 0.01)  # of the mixture: the stuck ones lie far above
    found = [median_interval(list(values)) for values in bimodal(generator, 2000, n)]
    assert coverage([(one.low, one.high) for one in found], truth) == pytest.approx(found[0].level, abs=0.02)


def test_on_bimodal_losses_the_t_interval_fails_and_most_such_arms_are_flagged(generator):
    missed = [mean_interval(list(values)) for values in bimodal(generator, 2000, 3)]
    assert coverage([(one.low, one.high) for one in missed], 4.6 + GAP * STUCK) == pytest.approx(0.5, abs=0.12)
    flagged, seen = 0, 0
    for _ in range(300):
        values = bimodal(generator, 6)
        if np.ptp(values) > GAP / 2:
            seen += 1
            flagged += "a" in unstable_arms({"a": list(values), "b": list(generator.normal(4.6, 0.01, 6))})
    assert flagged / seen > 0.95


@pytest.mark.parametrize(("arms", "n"), [(8, 3), (2, 6), (4, 20)])
def test_stable_arms_are_seldom_called_unstable(generator, arms, n):
    tables = generator.normal(4.6, 0.01, (300, arms, n))
    alarms = [bool(unstable_arms({str(arm): list(values) for arm, values in enumerate(table)})) for table in tables]
    assert np.mean(alarms) < 0.08  # 5 % and two standard errors


@pytest.mark.parametrize("draw", [lambda g, *s: g.normal(4.6, 0.02, s), bimodal], ids=["normal", "bimodal"])
@pytest.mark.parametrize("n", [3, 8])
def test_a_null_table_of_seven_arms_has_a_false_alarm_in_at_most_5_of_100(generator, draw, n):
    against = {str(arm): Contrast([str(arm)], ["0"]) for arm in range(1, 8)}
    alarms = []
    for table in draw(generator, 250, 8, n):
        loss = {str(arm): dict(enumerate(values)) for arm, values in enumerate(table)}
        unstable = unstable_arms({arm: list(by_seed.values()) for arm, by_seed in loss.items()})
        alarms.append(any(found.significant for found in _differences(against, loss, unstable).values()))
    assert np.mean(alarms) < 0.08


def test_the_best_split_by_hand():
    share, lower = best_split([5.0, 1.0, 1.2, 5.2])
    assert lower == 2 and share == pytest.approx(2 * 0.02 / (2 * 0.02 + 4 * 2**2))
