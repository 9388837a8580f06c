"""Checkpoints in another form, without any engine installed."""

import pytest
import torch

from moepp import config as configs
from moepp.config import compose
from moepp.errors import UsageError
from moepp.models.build import build_model
from moepp.pretrain.convert import convert
from moepp.training.settings import RunConfig


@pytest.fixture
def run(tmp_path):
    """A record with a checkpoint, as far as loading needs one."""
    config = compose(RunConfig, ["size=smoke", "model.dense_first=1", "tracking=jsonl"])
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    configs.save(config, tmp_path / "run" / "config.yaml")
    state = {f"model.{name}": value for name, value in build_model(config.model, seed=0).state_dict().items()}
    torch.save({"state_dict": state}, tmp_path / "run" / "checkpoints" / "final.ckpt")
    return tmp_path / "run"


def test_weights_come_back_from_torchtitan_and_from_parts(run, tmp_path):
    file = run / "checkpoints" / "final.ckpt"
    convert(file, tmp_path / "titan", "torchtitan")
    convert(tmp_path / "titan", tmp_path / "parts", "parts", run)
    convert(tmp_path / "parts", tmp_path / "back.ckpt", "file")
    wanted, found = (torch.load(path)["state_dict"] for path in (file, tmp_path / "back.ckpt"))
    assert list(found) == list(wanted) and all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_what_cannot_be_converted_is_named(run, tmp_path):
    file = run / "checkpoints" / "final.ckpt"
    with pytest.raises(UsageError, match=r"final\.ckpt exists already"):
        convert(file, file, "parts")
    with pytest.raises(UsageError, match=r"final\.ckpt is not a checkpoint in parts"):
        convert(file, tmp_path / "other.ckpt", "file")
    with pytest.raises(UsageError, match=r"^there is no file and no folder .*one\.ckpt$"):
        convert(tmp_path / "one.ckpt", tmp_path / "other.ckpt", "file")
    convert(file, tmp_path / "parts", "parts")
    with pytest.raises(UsageError, match=r"has no layers\.0\.attention"):
        convert(tmp_path / "parts", tmp_path / "other.ckpt", "file", run)
