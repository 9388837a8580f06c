import subprocess
import sys

import pytest
from registered import REGISTRIES, forgotten

from moepp import register
from moepp.layers.settings import BalanceConfig, ExpertCounts, MoEConfig


@pytest.fixture(autouse=True)
def _forgotten():
    with forgotten():
        yield


def part(config, first, alpha: float = 0.1, *, steps: int):
    return alpha * steps


@pytest.mark.parametrize("registry", REGISTRIES, ids=lambda registry: registry.kind)
def test_every_name_of_the_packages_own_has_a_part(registry):
    for name in registry.defined:
        assert callable(registry[name])


def test_names_are_known_without_torch():
    code = (
        "import sys; from moepp import register; register.router.check('two_layer', {}); print('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"


def test_a_registered_part_stands_beside_the_packages_own():
    assert register.router("mine")(part) is part
    assert register.router["mine"] is part
    assert register.router.names()[-1] == "mine" and register.router.names()[0] == "linear"


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({}, "router mine needs router_options.steps"),
        ({"steps": 1, "alhpa": 1.0}, "router_options.alhpa: router mine takes alpha, steps; did you mean alpha?"),
        ({"steps": 1.5}, "router_options.steps=1.5 is no int"),
        ({"steps": True}, "router_options.steps=True is no int"),
        ({"steps": 1, "alpha": "much"}, "router_options.alpha=much is no float"),
    ],
)
def test_options_are_checked_against_the_signature(options, line):
    register.router("mine")(part)
    with pytest.raises(ValueError) as error:
        MoEConfig(router="mine", router_options=options)
    assert str(error.value) == line
    assert MoEConfig(router="mine", router_options={"steps": 2, "alpha": 1}).router == "mine"


@pytest.mark.parametrize(
    ("make", "line"),
    [
        (lambda: MoEConfig(router="linaer"), "router=linaer: no such router; choose from linear, two_layer"),
        (lambda: MoEConfig(selection="top"), "selection=top: no such selection; choose from top_k, top_p, relu"),
        (lambda: MoEConfig(gate="softmin"), "did you mean softmax?"),
        (lambda: BalanceConfig(form="swich"), "balance.form=swich: no such balance form"),
        (lambda: BalanceConfig(control="loss"), "balance.control=loss: no such control"),
        (lambda: ExpertCounts(others={"mine": 1}), "experts.others=mine: no such expert type"),
        (lambda: ExpertCounts(others={"copy": 1}), "one of the package's own types: set experts.copy"),
        (lambda: MoEConfig(gate_options={"a": 1}), "gate_options.a: gate released takes no options"),
    ],
)  # fmt: skip
def test_what_no_part_has_is_refused_in_one_line(make, line):
    with pytest.raises(ValueError) as error:
        make()
    assert line in str(error.value) and "\n" not in str(error.value)


def test_a_name_is_not_taken_twice():
    with pytest.raises(ValueError, match=r"'linear' of .*test_register: moepp.layers.router has one of that name"):
        register.router("linear")(part)


def test_a_kind_follows_the_packages_own_in_expert_order():
    register.expert("mine")(lambda config, count: None)
    counts = ExpertCounts(ffn=2, zero=1, copy=1, constant=1, others={"mine": 2})
    assert counts.kinds() == ["ffn", "ffn", "constant", "copy", "zero", "mine", "mine"]
    assert (counts.total, counts.zero_computation, counts.ids("zero"), counts.ids("mine")) == (
        7,
        5,
        range(4, 5),
        range(5, 7),
    )
