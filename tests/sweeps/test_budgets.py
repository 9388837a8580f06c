import pytest

from moepp.errors import UsageError
from moepp.models.budget import Budget
from moepp.sweeps.budgets import relative_spread, require_match, table

ARMS = {"vanilla": Budget(1000, 500, 2e6, 4096), "moepp": Budget(1009, 520, 1e6, 4096)}


def test_what_lies_within_one_percent_is_equal():
    require_match("tokens", ARMS)
    require_match("total_params", ARMS)
    require_match("none", ARMS)


@pytest.mark.parametrize(
    ("match", "difference"),
    [
        ("active_params", r"4.0% in active_params \(500 of vanilla to 520 of moepp\)"),
        ("flops_per_token", r"100.0% in flops_per_token \(1M of moepp to 2M of vanilla\)"),
    ],
)
def test_a_broken_match_is_refused_with_the_arms_that_differ_most(match, difference):
    with pytest.raises(UsageError, match=f"the arms differ by {difference}, .* state match: none$") as error:
        require_match(match, ARMS)
    assert "\n" not in str(error.value)


def test_the_table_shows_every_budget_and_the_differences():
    head, vanilla, moepp, difference = table(ARMS)
    assert head.split() == ["arm", "total_params", "active_params", "flops_per_token", "tokens"]
    assert vanilla.split() == ["vanilla", "1,000", "500", "2,000,000", "4,096"]
    assert moepp.split() == ["moepp", "1,009", "520", "1,000,000", "4,096"]
    assert difference.split() == ["difference", "0.9%", "4.0%", "100.0%", "0.0%"]


def test_a_spread_from_zero():
    assert (relative_spread([0, 0]), relative_spread([0, 3])) == (0, 1)
