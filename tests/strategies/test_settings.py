import pytest

from moepp.strategies.settings import StrategyConfig


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"expert_parallel_size": -1}, r"expert_parallel_size=-1 must not be negative"),
        ({"timeout_s": 0}, r"timeout_s=0 must be positive"),
    ],
)
def test_impossible_values_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        StrategyConfig(**values)
