from moepp.training.final import _speed


def test_the_first_interval_of_several_holds_the_warm_up_and_counts_for_memory_alone():
    lines = [
        {"perf/tokens_per_s": 10.0, "perf/peak_mem_gib": 3.0},
        {"train/loss": 1.0},
        {"perf/tokens_per_s": 100.0, "perf/peak_mem_gib": 2.0},
        {"perf/tokens_per_s": 120.0, "perf/peak_mem_gib": 2.0},
    ]
    assert _speed(lines) == {"tokens_per_s": 110.0, "peak_mem_gib": 3.0}
    assert _speed(lines[:2]) == {"tokens_per_s": 10.0, "peak_mem_gib": 3.0}
    assert _speed(lines[1:2]) == {}
