from moepp.training.averaging import LateAverage


def test_the_mean_is_of_snapshots_evenly_spread_over_the_last_fifth_and_the_last_step():
    assert sorted(LateAverage(5, steps=100).taken_at) == [84, 88, 92, 96, 100]
    assert sorted(LateAverage(3, steps=4).taken_at) == [2, 3, 4]  # where the last fifth has fewer
