import pytest

from moepp.statistics.claims import judge


@pytest.mark.parametrize(
    ("interval", "bound", "verdict"),
    [
        ((0.1, 0.3), {"above": 0.0}, "holds"),
        ((-0.1, 0.3), {"above": 0.0}, "undecided"),
        ((-0.3, -0.1), {"above": 0.0}, "fails"),
        ((0.1, 0.3), {"below": 0.0}, "fails"),
        ((0.1, 0.3), {"below": 0.5}, "holds"),
        ((None, None), {"below": 0.5}, "undecided"),
    ],
)
def test_a_claim_is_judged_by_its_whole_interval(interval, bound, verdict):
    assert judge(*interval, **bound) == verdict


def test_one_bound_is_needed():
    with pytest.raises(ValueError, match="either above or below"):
        judge(0.0, 1.0)
