import json
from dataclasses import asdict

import pytest
import torch
from torch import nn

from moepp.models.build import build_model, describe_model
from moepp.models.decoder import Decoder
from moepp.models.protocol import CausalLM
from moepp.models.settings import DecoderConfig

SMALL = DecoderConfig(dim=32, hidden=24, layers=2, heads=4, vocab_size=61)


def test_a_description_of_plain_values_builds_the_same_model():
    model = Decoder(SMALL, seed=3)
    described = json.loads(json.dumps(describe_model(model)))
    built = build_model(described["model"], seed=3)
    assert isinstance(built, CausalLM) and asdict(built.config) == asdict(SMALL)
    ours, theirs = built.state_dict(), model.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_weights_that_are_loaded_next_are_not_drawn(monkeypatch):
    monkeypatch.setattr(Decoder, "reset_parameters", lambda *_: pytest.fail("initialised"))
    build_model(SMALL)


def test_a_model_on_the_meta_device_has_shapes_alone():
    with torch.device("meta"):
        model = Decoder(SMALL)
    assert all(parameter.is_meta for parameter in model.parameters())


def test_a_model_of_ones_own_is_not_described_as_another():
    class Mine(nn.Module):
        config = SMALL

    assert describe_model(Mine()) == {}


def test_an_unknown_model_is_refused():
    with pytest.raises(ValueError, match=r"^model\.name=decodre: no such model; .* did you mean decoder\?"):
        DecoderConfig(name="decodre")
