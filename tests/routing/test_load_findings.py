import numpy as np
import pytest
from scipy import stats
from synthetic_load import synthetic_load

from moepp.routing.load_findings import (
    adjacent_layers,
    adjacent_over_distant_layers,
    difficulty_and_ffn,
    ease_and_zero,
    ease_and_zero_within_tasks,
    end_layers,
    ends_over_middle,
    enough_examples,
    ffn_difference,
    layer_deviations,
    topics_differ,
)
from moepp.routing.loads import bits_per_byte, ffn_per_token, shares_KLN

TASKS, LAYERS = 8, 6


def same(value=1.4):
    return np.full((TASKS, LAYERS), value)


def load_of(ffn_KL=None, zero_K=None, bits_K=None, **more):
    ffn_KL = same() if ffn_KL is None else ffn_KL
    zero_K = np.full(TASKS, 0.1) if zero_K is None else zero_K
    bits_K = np.linspace(1, 3, TASKS) if bits_K is None else bits_K
    return synthetic_load(ffn_KL, zero_K, bits_K, **more)


def spread(ends, middle):
    """Tasks that differ by `ends` in the end layers and by `middle` in the others, in an order of each layer's own."""
    generator = np.random.default_rng(3)
    unit = stats.zscore(np.arange(TASKS), ddof=1)
    scale = [ends if layer in end_layers(LAYERS) else middle for layer in range(LAYERS)]
    return 1.4 + np.stack([s * generator.permutation(unit) for s in scale], axis=1)


def test_tables_hold_what_was_planted():
    ffn_KL = spread(0.1, 0.05)
    load = load_of(ffn_KL, examples=400)
    values, lows, highs = ffn_per_token(load, draws=200)
    assert values == pytest.approx(ffn_KL, abs=0.03)
    assert (lows < values).all() and (values < highs).all() and np.mean((lows < ffn_KL) & (ffn_KL < highs)) > 0.8
    shares = shares_KLN(load)
    assert shares.sum(-1) == pytest.approx(np.ones((TASKS, LAYERS)))
    assert shares[..., :2].sum(-1) == pytest.approx(values / 2)
    assert shares[..., 4] == pytest.approx(np.full((TASKS, LAYERS), 0.05), abs=0.01)
    assert bits_per_byte(load) == pytest.approx(np.linspace(1, 3, TASKS), abs=0.1)


def test_neighbours_that_agree_are_found_and_unrelated_layers_are_not():
    walk = np.random.default_rng(1).normal(0, 0.08, (TASKS, LAYERS)).cumsum(1) + 1.2
    found = adjacent_layers(load_of(walk))
    assert found.interval.value > 0.6 and found.interval.low > 0 and found.p < 0.01
    assert adjacent_over_distant_layers(load_of(walk)).interval.low > 0
    assert abs(adjacent_layers(load_of(spread(0.1, 0.1))).interval.value) < 0.5


SIMULATIONS, DRAWS = 200, 199
MOST_REJECTED = 0.08  # of SIMULATIONS at 5 %: chance alone goes beyond in 3 of 100


def small_load(ffn_KL, seed, examples=20):
    tasks = len(ffn_KL)
    return synthetic_load(ffn_KL, np.full(tasks, 0.1), np.linspace(1, 3, tasks), examples=examples, seed=seed)


def busy_examples(seed):
    """Some examples use more FFN experts in every layer; the tasks do not differ."""
    load = small_load(np.full((4, 3), 1.4), seed)
    busy = np.random.default_rng((seed, 1)).integers(0, 20, len(load.tokens_X)).astype(np.int32)
    load.chosen_XLN[:, :, 0] += busy[:, None]
    load.chosen_XLN[:, :, 2] -= busy[:, None]
    return load


def tasks_that_differ_anew_in_every_layer(seed):
    return small_load(1.4 + np.random.default_rng((seed, 2)).normal(0, 0.1, (6, 3)), seed)


@pytest.mark.parametrize(
    ("test", "null"),
    [(adjacent_layers, busy_examples), (adjacent_layers, tasks_that_differ_anew_in_every_layer),
     (topics_differ, busy_examples)],
)  # fmt: skip
def test_nothing_is_found_more_often_than_at_its_level(test, null):
    p = [test(null(seed), seed, DRAWS).p for seed in range(SIMULATIONS)]
    assert np.mean(np.array(p) < 0.05) <= MOST_REJECTED


@pytest.mark.parametrize("effect", [ends_over_middle, topics_differ])
def test_intervals_of_products_of_halves_cover_the_truth(effect):
    ffn_KL = 1.4 + np.random.default_rng(5).normal(0, 0.1, (4, 4))
    truth = effect(small_load(ffn_KL, 0, examples=20_000), draws=2).interval.value
    found = [effect(small_load(ffn_KL, seed), seed, DRAWS).interval for seed in range(SIMULATIONS)]
    assert np.mean([one.low <= truth <= one.high for one in found]) >= 0.9
    assert np.mean([one.value for one in found]) == pytest.approx(truth, abs=0.25 * abs(truth) + 0.005)


def test_a_correlation_between_layers_is_understated_by_noise_but_not_overstated():
    generator = np.random.default_rng(5)
    ffn_KL = 1.4 + 0.07 * generator.normal(size=(6, 1)) + 0.07 * generator.normal(size=(6, 4))
    truth = adjacent_layers(small_load(ffn_KL, 0, examples=20_000), draws=2).interval.value
    found = [adjacent_layers(small_load(ffn_KL, seed), seed, DRAWS).interval for seed in range(100)]
    assert 0.6 * truth < np.mean([one.value for one in found]) < truth
    assert np.mean([one.low > truth for one in found]) <= 0.05


def test_layers_in_which_tasks_differ_most_are_found():
    load = load_of(spread(0.12, 0.03))
    assert end_layers(LAYERS) == [0, 5] and end_layers(24) == [0, 1, 2, 3, 4, 5, 23]
    found = ends_over_middle(load)
    assert found.interval.low > 0 and found.p < 0.01
    assert found.interval.value == pytest.approx(0.09, abs=0.02)
    assert layer_deviations(load)[[0, 5]] == pytest.approx([0.12, 0.12], abs=0.03)
    assert ends_over_middle(load_of(spread(0.03, 0.12))).interval.high < 0


def test_tasks_that_do_not_differ_have_no_deviation_left_once_noise_is_taken_off():
    assert abs(layer_deviations(load_of(examples=20))).max() < 0.03


def test_hard_tasks_with_many_ffn_experts_are_told_from_hard_tasks_without():
    rising = np.linspace(1.2, 1.6, TASKS)[:, None] * np.ones(LAYERS)
    rho = difficulty_and_ffn(load_of(rising)).interval
    assert rho.low > 0.5
    assert difficulty_and_ffn(load_of(rising[::-1])).interval.high < 0
    alternating = same() + 0.1 * (-1.0) ** np.arange(TASKS)[:, None]
    assert difficulty_and_ffn(load_of(alternating)).interval.high < 0.5


def test_zero_experts_that_track_ease_are_found_between_tasks_and_only_there():
    easy_first = load_of(zero_K=np.linspace(0.3, 0.05, TASKS))
    found = ease_and_zero(easy_first)
    assert found.interval.value > 0.9 and found.p < 0.01
    within = ease_and_zero_within_tasks(easy_first)
    assert within.interval.low < 0 < within.interval.high
    assert ease_and_zero(load_of(zero_K=np.linspace(0.05, 0.3, TASKS))).interval.value < -0.9


def test_zero_experts_that_track_ease_within_tasks_are_found():
    load = load_of(zero_K=np.full(TASKS, 0.3))
    zeros = load.chosen_XLN[:, :, 4].sum(1)
    load.nats_X[:] = 300 - zeros + np.random.default_rng(0).normal(0, 10, len(zeros))
    found = ease_and_zero_within_tasks(load)
    by_task = [stats.spearmanr(-load.nats_X[load.rows(task)], zeros[load.rows(task)])[0] for task in load.groups]
    assert found.interval.value == pytest.approx(np.mean(by_task)) and found.interval.low > 0.3


@pytest.mark.filterwarnings("error")
def test_tasks_whose_examples_are_all_alike_say_nothing_of_ease():
    load = load_of(zero_K=np.full(TASKS, 0.3))
    load.nats_X[:], load.bytes_X[:] = 300, 100
    assert np.isnan(ease_and_zero_within_tasks(load).interval.value)


def test_difference_of_two_tasks_is_tested_by_exchanging_examples():
    ffn_KL = same()
    ffn_KL[1] += 0.08
    load = load_of(ffn_KL)
    found = ffn_difference(load, "task 1", "task 0", slice(None))
    assert found.interval.value == pytest.approx(0.08, abs=0.03) and found.interval.low > 0 and found.p < 0.01
    assert ffn_difference(load, "task 0", "task 1", slice(2, 3)).interval.value < 0
    p = [ffn_difference(load_of(seed=s), "task 2", "task 3", slice(None)).p for s in range(20)]
    assert np.mean(np.array(p) < 0.05) <= 0.2


def test_topics_that_differ_are_found_and_topics_that_do_not_are_not():
    found = topics_differ(load_of(spread(0.15, 0.15)))
    assert found.p < 0.01 and found.interval.low > 0
    nothing = [topics_differ(load_of(examples=20, seed=s)) for s in range(10)]
    assert np.mean([f.p < 0.05 for f in nothing]) <= 0.3
    assert abs(np.mean([f.interval.value for f in nothing])) < found.interval.value / 4


def test_too_few_groups_or_examples_are_seen():
    assert enough_examples(load_of())
    assert not enough_examples(load_of(examples=1))
    assert not enough_examples(load_of().select(range(100)))
