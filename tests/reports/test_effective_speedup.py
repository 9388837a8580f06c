import numpy as np
import pytest
from synthetic_sweep import write_run, write_sweep

from moepp.records import read_json, write_json
from moepp.reports.comparison import Design, compare
from moepp.reports.effective_speedup import crossing, effective_speedup, loss_at_length
from moepp.reports.figures import equal_time
from moepp.reports.results import load_sweep_results

LENGTHS = [0.75, 1.0, 1.25, 1.5]


def law(length):
    """Of the kind that language models follow, steep as at laptop scale."""
    return 3.0 + 1.6 * np.asarray(length) ** -0.3


@pytest.mark.parametrize("truth", [0.9, 1.2, 1.38])
def test_unbiased_and_covered_when_the_arm_wins_and_when_it_loses(truth):
    """Simulated truth: the arm is the baseline with `truth` times its tokens; seeds shift both alike."""
    generator, n, found, covered = np.random.default_rng(0), 5, [], 0
    for _ in range(300):
        seed_S = generator.normal(0, 0.02, n)
        base_SX = law(LENGTHS) + seed_S[:, None] + generator.normal(0, 0.01, (n, len(LENGTHS)))
        one = crossing(LENGTHS, base_SX, law(truth) + seed_S + generator.normal(0, 0.01, n))
        found.append(one.value or np.nan)
        covered += not one.beyond and (one.low or 0.0) <= truth <= (one.high or np.inf)
    assert np.nanmean(np.log(found)) == pytest.approx(np.log(truth), abs=0.006)
    assert np.isnan(found).mean() < 0.05
    assert 0.92 <= covered / 300 <= 0.98


def test_no_bound_is_printed_where_there_is_none():
    base_SX = law(LENGTHS) + np.array([[0.0], [0.1], [0.05]])
    arm_S = base_SX[:, -1] + np.array([-0.03, 0.02, -0.02])  # lower than the longest on average, within noise
    found = crossing(LENGTHS, base_SX, arm_S)
    assert (str(found), found.high) == ("–", None) and found.low < 1.5 and found.interval.endswith("to open")


@pytest.mark.parametrize(("shift", "length", "said"), [(-0.2, 1.5, "> 1.50"), (0.2, 0.75, "< 0.75")])
def test_a_bound_is_one_that_every_seed_supports(shift, length, said):
    base_SX = law(LENGTHS) + np.array([[0.0], [0.1], [0.05]])
    arm_S = law(length) + np.array([0.0, 0.101, 0.05]) + shift
    found = crossing(LENGTHS, base_SX, arm_S)
    assert (str(found), found.interval) == (said, "–")


def test_one_seed_has_no_interval():
    found = crossing(LENGTHS, law(LENGTHS)[None], np.array([law(1.1)]))
    assert found.value == pytest.approx(1.1, abs=0.005) and (found.low, found.high) == (None, None)


def test_the_loss_in_equal_time_is_read_between_finished_runs_only():
    base_SX, arm_S = law(LENGTHS)[None] + np.array([[0.0], [0.1]]), law(1.25) + np.array([0.0, 0.1])
    assert loss_at_length(LENGTHS, base_SX, arm_S, 1.25).mean == pytest.approx(0.0)
    assert loss_at_length(LENGTHS, base_SX, arm_S, 1.6) is None


@pytest.fixture
def directory(tmp_path):
    """Losses of 3.25, 3, 2.75 at 0.75, 1 and 1.5 times the tokens; the arm is twice as fast per token."""
    losses = {"vanilla": {0: 3.0, 1: 3.2}, "better": {0: 2.8749, 1: 3.0751}}
    write_sweep(tmp_path, losses, {"vanilla": (40.0, 1.0), "better": (20.0, 1.0)})
    plan = read_json(tmp_path / "sweep.json")
    for length, loss in ((0.75, 0.25), (1.5, -0.25)):
        for seed, own in losses["vanilla"].items():
            path = f"trials/vanilla-{length}-{seed}"
            write_run(tmp_path / path, own + loss)
            entry = {"arm": f"vanilla@{length:g}", "seed": seed, "path": path}
            plan["trials"].append({**entry, "length": length, "of_arm": "vanilla"})
    write_json(tmp_path / "sweep.json", plan)
    return tmp_path


def test_runs_of_other_lengths_are_no_arms(directory):
    results = load_sweep_results(directory)
    assert list(results.runs) == ["vanilla", "better"] and not results.missing
    assert list(results.at_lengths("vanilla")) == [0.75, 1.0, 1.5]


def test_tokens_and_time_against_the_baseline(directory):
    found = effective_speedup(load_sweep_results(directory), "better")
    assert found.tokens.value == pytest.approx(1.5**0.5, rel=1e-3)
    assert found.tokens.low < found.tokens.value < found.tokens.high
    assert found.time.value == pytest.approx(2 * 1.5**0.5, rel=1e-3)
    assert found.at_equal_time is None  # the baseline has no run of half the tokens
    assert effective_speedup(load_sweep_results(directory), "vanilla") is None


def test_the_figure_of_equal_time_sets_arms_beside_the_baselines_lengths(directory):
    shown = equal_time(compare(Design(("vanilla", "better")), load_sweep_results(directory))).data
    rows = [(arm, time, n, round(loss, 4)) for arm, time, n, loss, *_ in shown.rows]
    lengths = [("vanilla", 0.75, 2, 3.35), ("vanilla", 1.0, 2, 3.1), ("vanilla", 1.5, 2, 2.85)]
    assert rows == [*lengths, ("better", 0.5, 2, 2.975)] and "n = 2 seeds" in shown.caption


def test_one_length_says_nothing(tmp_path):
    results = load_sweep_results(write_sweep(tmp_path, {"vanilla": {0: 3.0}, "better": {0: 2.9}}))
    assert effective_speedup(results, "better") is None
    assert equal_time(compare(Design(("vanilla", "better")), results)) is None
