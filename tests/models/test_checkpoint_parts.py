import pytest
import torch

from moepp.layers.settings import BalanceConfig
from moepp.models import checkpoint_parts as parts
from moepp.models.decoder import Decoder, InitialState
from moepp.models.settings import DecoderConfig

CHECKPOINT = {
    "global_step": 3,
    "state_dict": {"second": torch.arange(12.0).view(3, 4), "a.first": torch.arange(5), "scalar": torch.tensor(7.0)},
    "optimizer_states": [
        {
            "state": {
                0: {"step": torch.tensor(3.0), "exp_avg": torch.ones(3, 4)},
                1: {"step": torch.tensor(3.0), "momentum_buffer": None, "exp_avg": torch.ones(5)},
            },
            "param_groups": [{"lr": 0.1, "betas": (0.9, 0.95), "params": [0, 1]}],
        }
    ],
}


@pytest.fixture
def folder(tmp_path):
    torch.save(CHECKPOINT, tmp_path / "one.ckpt")
    parts.divide(tmp_path / "one.ckpt", tmp_path / "parts.ckpt")
    return tmp_path / "parts.ckpt"


def same(found, wanted):
    if torch.is_tensor(wanted):
        return torch.equal(found, wanted)
    if isinstance(wanted, dict):
        return found.keys() == wanted.keys() and all(same(found[key], wanted[key]) for key in wanted)
    if isinstance(wanted, list):
        return len(found) == len(wanted) and all(map(same, found, wanted))
    return found == wanted


def test_a_file_divided_and_joined_is_the_file(folder, tmp_path):
    parts.join(folder, tmp_path / "back.ckpt")
    found = torch.load(tmp_path / "back.ckpt", weights_only=True)
    assert same(found, CHECKPOINT) and list(found["state_dict"]) == list(CHECKPOINT["state_dict"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back.ckpt", "one.ckpt", "parts.ckpt"]


def test_what_is_not_whole_is_named(folder):
    assert parts.missing_bytes(folder) == ""
    (part,) = folder.glob("*.distcp")
    part.write_bytes(part.read_bytes()[:-1])
    assert parts.missing_bytes(folder) == part.name


@pytest.mark.parametrize("changes", [{}, {"balance": BalanceConfig(control="loss_free")}, {"router": "two_layer"}])
def test_the_initial_state_is_that_of_a_decoder_with_the_seed(changes):
    config = DecoderConfig(dim=8, hidden=8, layers=2, heads=2, vocab_size=16, residual_init="identity", **changes)
    with torch.device("meta"):
        state = InitialState(Decoder(config, seed=None), seed=3)
    assert same(dict(state), dict(Decoder(config, seed=3).state_dict()))
