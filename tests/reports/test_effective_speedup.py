from dataclasses import replace

import pytest
from synthetic_sweep import write_sweep

from moepp.reports.effective_speedup import effective_speedup, tokens_to_reach
from moepp.reports.results import load_sweep_results

CURVE = [(100, 5.0), (200, 4.0), (300, 3.5)]


@pytest.mark.parametrize(
    ("loss", "tokens", "bound"),
    [
        (4.5, 150, ""),
        (4.0, 200, ""),
        (3.6, 280, ""),
        (3.5, 300, ""),
        (3.4, 300, "≥ "),
        (5.5, 100, "≤ "),
        (5.0, 100, ""),
    ],
)
def test_the_tokens_at_which_a_curve_reaches_a_loss(loss, tokens, bound):
    assert tokens_to_reach(CURVE, loss) == (pytest.approx(tokens), bound)


def test_a_loss_that_rises_again_was_reached_before():
    assert tokens_to_reach([(1, 5.0), (2, 4.0), (3, 4.4), (4, 3.0)], 4.2) == (pytest.approx(1.8), "")


@pytest.fixture
def results(tmp_path):
    """The curves of synthetic runs fall by 0.5 each quarter of 100 steps: loss + 1.5, 1.0, 0.5, 0."""
    losses = {"vanilla": {0: 3.0, 1: 3.2}, "worse": {0: 3.25, 1: 3.45}, "mixed": {0: 2.9, 1: 3.45}}
    times = {"vanilla": (40.0, 1.0), "worse": (20.0, 1.0)}
    return load_sweep_results(write_sweep(tmp_path, losses, times))


def test_an_arm_that_ends_higher_is_reached_early(results):
    found = effective_speedup(results, "worse")
    assert found.tokens == pytest.approx(0.875) and found.bound == "" and found.censored == 0
    assert found.interval == pytest.approx((0.875, 0.875))


def test_a_loss_that_the_baseline_never_reaches_is_a_bound(results):
    found = effective_speedup(results, "mixed")
    assert (found.bound, found.censored, found.interval) == ("≥ ", 1, None)
    assert found.tokens == pytest.approx(0.875**0.5)  # the geometric mean of 1, censored, and 0.875


def test_speed_joins_quality(results):
    found = effective_speedup(results, "worse")
    assert found.speed == pytest.approx(2.0) and found.time == pytest.approx(1.75)
    untimed = effective_speedup(results, "mixed")
    assert (untimed.speed, untimed.time) == (None, None)


def test_without_shared_seeds_there_is_none(results):
    apart = {7: next(iter(results.runs["worse"].values()))}
    assert effective_speedup(replace(results, runs=results.runs | {"worse": apart}), "worse") is None
