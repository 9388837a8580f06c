import math
from dataclasses import dataclass, field
from typing import Annotated, Literal

import pytest

from moepp.layers.bounds import Bounded, Count, Positive, Range, Share, Whole, refusals
from moepp.layers.settings import BalanceConfig, ExpertCounts, MoEConfig


@pytest.mark.parametrize(
    ("allowed", "said", "inside", "outside"),
    [
        (Range(), "must be finite", [0, -1e300, 10**400], [math.nan, math.inf, -math.inf]),
        (Range(0), "must not be negative, and finite", [0, 1], [-1, math.nan, math.inf]),
        (Range(above=0), "must be positive, and finite", [1e-300], [0, -1, math.nan]),
        (Range(above=0, most=1), "must be positive, and at most 1", [0.1, 1], [0, 1.01, math.nan]),
        (Range(0, below=1), "must not be negative, and below 1", [0, 0.9], [1, -0.1]),
        (Range(above=0, below=1), "must lie between 0 and 1", [0.5], [0, 1]),
        (Range(1, 1000), "must be at least 1, and at most 1,000", [1, 1000], [0, 1001]),
    ],
)
def test_a_range_says_what_it_allows(allowed, said, inside, outside):
    assert str(allowed) == said
    assert all(map(allowed.allows, inside)) and not any(map(allowed.allows, outside))


@dataclass
class Part:
    share: Share = 0.5


@dataclass
class Example(Bounded, key="whole"):
    rate: float = 1.0
    count: Count | None = None
    form: Literal["a", "b"] = "a"
    counts: dict[str, Whole] = field(default_factory=dict)
    steps: list[Annotated[int, Range(1, 9)]] = field(default_factory=list)
    parts: dict[str, Part] = field(default_factory=dict)
    scale: Positive | None = None


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rate": math.nan}, "whole.rate=nan must be finite"),
        ({"count": 0}, "whole.count=0 must be at least 1, and at most 16,777,216, or null"),
        ({"form": "c"}, "whole.form=c must be one of 'a', 'b'"),
        ({"counts": {"x": -1}}, "whole.counts.x=-1 must not be negative"),
        ({"steps": [1, 10]}, "whole.steps=10 must be at least 1, and at most 9"),
        ({"parts": {"p": Part(0.0)}}, "whole.parts.p.share=0.0 must be positive"),
        ({"scale": math.inf}, "whole.scale=inf must be positive, and finite, or null"),
    ],
)
def test_a_config_refuses_what_lies_outside(values, message):
    with pytest.raises(ValueError) as caught:
        Example(**values)
    assert str(caught.value).startswith(message)
    assert Example(count=None, counts={"x": 0}, steps=[9], scale=1e-9)


def test_nested_mappings_are_checked_as_what_they_become():
    assert list(refusals(Example, {"rate": 1.0, "form": "a", "parts": {"p": {"share": 2}}})) == [
        "parts.p.share=2 must be positive, and at most 1"
    ]


@pytest.mark.parametrize(
    ("made", "values", "key"),
    [
        (MoEConfig, {"dim": 0}, "dim=0"),
        (MoEConfig, {"hidden": 0}, "hidden=0"),
        (MoEConfig, {"capacity_factor": math.inf}, "capacity_factor=inf"),
        (MoEConfig, {"logits_norm": math.nan}, "logits_norm=nan"),
        (BalanceConfig, {"beta": 1e30}, "balance.beta"),
        (BalanceConfig, {"beta": math.nan}, "balance.beta"),
        (BalanceConfig, {"control_rate": math.nan}, "balance.control_rate"),
        (BalanceConfig, {"control_options": {"a": 1}}, "control_options=.* are of no control: set balance.control"),
        (ExpertCounts, {"ffn": 0}, "experts.ffn=0"),
    ],
)
def test_the_layer_alone_refuses_numbers_without_sense(made, values, key):
    with pytest.raises(ValueError, match=key):
        made(**values)


@pytest.mark.parametrize(
    ("made", "values", "message"),
    [
        (MoEConfig, {"top_k": 2.0}, "top_k=2.0 must be a whole number"),
        (MoEConfig, {"dim": "64"}, "dim='64' must be a whole number"),
        (MoEConfig, {"gating_residual": "no"}, "gating_residual='no' must be true or false"),
        (MoEConfig, {"capacity_factor": "1.1"}, "capacity_factor='1.1' must be a number, or null"),
        (MoEConfig, {"experts": {"ffn": 8}}, "experts={'ffn': 8} must be made by ExpertCounts(...)"),
        (MoEConfig, {"gate": None}, "gate=None: no such gate"),
        (ExpertCounts, {"ffn": True}, "experts.ffn=True must be a whole number"),
        (ExpertCounts, {"others": {"vector": 1.5}}, "experts.others.vector=1.5 must be a whole number"),
        (BalanceConfig, {"tau_of": None}, "balance.tau_of=None must hold values by their names"),
        (BalanceConfig, {"tau_of": {"zero": "0.5"}}, "balance.tau_of.zero='0.5' must be a number"),
    ],
)
def test_the_layer_alone_refuses_values_of_another_type(made, values, message):
    with pytest.raises(ValueError) as caught:
        made(**values)
    assert str(caught.value).startswith(message)
