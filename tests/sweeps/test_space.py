import math

import pytest

from moepp.errors import UsageError
from moepp.sweeps.space import expand


def test_a_grid_is_every_combination():
    assert expand({"grid": {"optim.lr": [1e-3, 3e-5], "model": ["vanilla", "moepp"]}}) == {
        "lr=0.001,model=vanilla": ["optim.lr=0.001", "model=vanilla"],
        "lr=0.001,model=moepp": ["optim.lr=0.001", "model=moepp"],
        "lr=3e-05,model=vanilla": ["optim.lr=3e-05", "model=vanilla"],
        "lr=3e-05,model=moepp": ["optim.lr=3e-05", "model=moepp"],
    }


def test_keys_that_end_alike_are_written_out():
    assert list(expand({"grid": {"a.x": [1], "b.x": [None]}})) == ["a.x=1,b.x=null"]


RANDOM = {
    "n": 40,
    "seed": 3,
    "keys": {
        "optim.lr": {"float": [1e-4, 1e-2], "log": True},
        "optim.weight_decay": {"float": [0, 0.2]},
        "model.top_k": {"int": [1, 3]},
        "model.gate": {"choice": ["softmax", "renormalized"]},
    },
}


def test_random_points_lie_in_their_ranges_and_repeat_with_the_seed():
    arms = expand({"random": RANDOM})
    assert len(arms) == 40 and arms == expand({"random": RANDOM})
    assert arms.keys().isdisjoint(expand({"random": RANDOM | {"seed": 4}}))
    points = [dict(change.split("=") for change in changes) for changes in arms.values()]
    rates = sorted(float(point["optim.lr"]) for point in points)
    assert rates[0] >= 1e-4 and rates[-1] < 1e-2
    assert 5e-4 < rates[20] < 2e-3  # the median of a log-uniform draw is the geometric mean
    assert {point["model.top_k"] for point in points} == {"1", "2", "3"}
    assert {point["model.gate"] for point in points} == {"softmax", "renormalized"}
    assert all(0 <= float(point["optim.weight_decay"]) <= 0.2 for point in points)


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ({"cma": {"n": 3}}, "space must hold one of grid, random and tpe, not cma"),
        ({"tpe": {"n": 3}}, "space.tpe must hold n, keys"),
        ({"tpe": {"n": 3, "keys": {"a": {"int": [1, 2], "arms": "vanilla"}}}}, "with arms: "),
        ({"grid": {"a": [1]}, "random": {}}, "not grid, random"),
        ({"grid": {}}, "space.grid must hold keys and values"),
        ({"grid": {"optim.lr": 3}}, "space.grid: optim.lr must be a list"),
        ({"random": {"n": 3}}, "space.random must hold n, keys"),
        ({"random": {"n": 0, "keys": {"a": {"int": [1, 2]}}}}, "n=0 .* n at least 1"),
        ({"random": {"n": 3, "keys": {"a": {"float": [0.0, math.nan]}}}}, "a must be {float"),
        ({"random": {"n": 3, "keys": {"a": {"float": [0.0, math.inf]}}}}, "a must be {float"),
        ({"grid": {name: list(range(100)) for name in "abc"}}, "1,000,000 points; at most 10,000"),
        ({"tpe": {"n": 3, "keys": {"a": {"int": [1, 2], "arms": [["x"]]}}}}, "with arms: "),
        ({"random": {"n": 3, "keys": {"a": [1, 2]}}}, "a must be {float"),
        ({"random": {"n": 3, "keys": {"a": {"int": [1, 2.5]}}}}, "a must be {float"),
        ({"random": {"n": 3, "keys": {"a": {"float": [0, 1], "log": True}}}}, "a must be {float"),
        ({"random": {"n": 3, "keys": {"a": {"float": [2, 1]}}}}, "a must be {float"),
        ({"random": {"n": 3, "keys": {"a": {"choice": []}}}}, "a must be {float"),
        ({"random": {"n": 3, "keys": {"a": {"int": [1, 2]}}}}, "there are no 3 different points; found 2"),
    ],
)
def test_what_is_no_space_is_one_line(space, message):
    with pytest.raises(UsageError, match=message) as error:
        expand(space)
    assert "\n" not in str(error.value)
