from dataclasses import asdict

import pytest

from moepp.config import CONF, compose
from moepp.models.budget import expected_ffn_per_token
from moepp.reports.targets import balanced_share, target_share
from moepp.training.settings import RunConfig

WITHOUT = ("dense", "remoe", "top_p")  # no slots, or a number of them that training decides


@pytest.mark.parametrize("model", sorted({path.stem for path in (CONF / "model").glob("*.yaml")} - {"hf"}))
def test_the_target_of_every_method_is_the_balanced_layers(model):
    config = compose(RunConfig, [f"model={model}"]).model
    expected = None if model in WITHOUT else pytest.approx(expected_ffn_per_token(config) / config.top_k)
    assert target_share(asdict(config)) == expected


def test_tau_and_counts_set_the_target():
    config = compose(RunConfig, ["size=2b", "model=moepp", "model.balance.tau=0.25"]).model
    assert target_share(asdict(config)) == balanced_share(0.25, 32, 8) == 0.5
    assert target_share(asdict(compose(RunConfig, ["model=vanilla"]).model)) == 1.0


def test_nothing_aims_where_nothing_balances():
    config = compose(RunConfig, ["model=moepp", "model.balance.beta=0.0"]).model
    assert target_share(asdict(config)) is None
