"""Runs of models of transformers on two devices, against the same run on one."""

import os
import socket

import pytest
import torch

pytest.importorskip("transformers", "5.24", reason="needs the extra hf")

from families import tiny

from moepp import load_run
from moepp.config import compose
from moepp.training.run import freeze, train
from moepp.training.settings import RunConfig, run_directory

RUNS = [  # new experts are calibrated on the batch of all devices
    ("ddp", ["model.retrofit.train=new"], 1e-5),
    ("ddp", ["model.retrofit.init=zeda", "model.retrofit.loss=forward_kl"], 1e-5),
    ("fsdp", ["model.retrofit.copy=1", "model.retrofit.scaled_copy=true"], 1e-5),
]


def rank(number, port, config):
    """As torchrun would have started it."""
    ranks = {"RANK": number, "LOCAL_RANK": number, "GROUP_RANK": 0, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "retrofit"}
    os.environ.update({name: str(value) for name, value in (ranks | address).items()})
    train(config, run_directory(config))


@pytest.mark.parametrize(("strategy", "words", "tolerance"), RUNS)
def test_two_devices_train_as_one_does(overrides, tmp_path, strategy, words, tolerance):
    folder = tmp_path / "mixtral"
    tiny("mixtral", num_hidden_layers=2).save_pretrained(folder)
    common = [
        *overrides, "model=hf", f"model.path={folder}", "model.retrofit.zero=1", "model.retrofit.constant=1",
        "model.retrofit.gating_residual=true", "model.balance.beta=0.5", "data.seq_len=16", "data.batch_size=8",
        "data.val_sequences=4", "trainer.steps=2", "trainer.val_every=2", "trainer.log_every=1", "optim.name=SGD",
        "optim.warmup_steps=1", "optim.lr=0.1",
    ]  # fmt: skip
    alone = freeze(compose(RunConfig, [*common, *words, "strategy=single", "name=one"]))
    together = freeze(compose(RunConfig, [*common, *words, f"strategy={strategy}", "trainer.devices=2", "name=two"]))
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    torch.multiprocessing.start_processes(rank, (port, together), 2, start_method="fork")
    train(alone, run_directory(alone))
    one, two = (load_run(run_directory(config)) for config in (alone, together))
    states = [run.model.state_dict() for run in (one, two)]
    assert states[0].keys() == states[1].keys()
    for key, value in states[0].items():
        torch.testing.assert_close(states[1][key], value, rtol=0, atol=tolerance, msg=lambda m, k=key: f"{k}: {m}")
    assert two.final["val_loss"] == pytest.approx(one.final["val_loss"], abs=tolerance)
