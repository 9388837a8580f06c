"""Parts that are not the package's own on two devices, against the same run on one."""

import os
import socket

import lightning.pytorch as pl
import pytest
import torch
from registered import forgotten, plugin
from torch import nn

from moepp import load_run
from moepp.config import compose
from moepp.errors import UsageError
from moepp.strategies import MoEFSDPStrategy
from moepp.training.run import freeze, train
from moepp.training.settings import RunConfig, run_directory

PARTS = """
    import torch
    import torch.distributed as dist
    from torch import nn
    from moepp import register
    from moepp.models.decoder import Decoder

    @register.model("drawing")
    class Drawing(Decoder):
        '''Draws a buffer by no seed.'''

        def __init__(self, config, seed):
            super().__init__(config, seed)
            self.register_buffer("drawn", torch.randn(3))

        def forward(self, *arguments, **options):
            of_first = self.drawn.clone()
            dist.broadcast(of_first, 0)
            assert torch.equal(of_first, self.drawn)
            return super().forward(*arguments, **options)

    @register.expert("listed")
    class Listed(nn.Module):
        '''A list of modules, each called where a token has chosen it, and a rotation that nothing trains.'''

        def __init__(self, config, count):
            super().__init__()
            self.maps = nn.ModuleList(nn.Linear(config.dim, config.dim) for _ in range(count))
            self.unused = nn.Parameter(torch.ones(1))
            self.register_buffer("rotation", torch.linalg.qr(torch.randn(config.dim, config.dim))[0])

        def forward(self, x_RD, expert_R):
            y_RD = torch.zeros_like(x_RD)
            for index, map in enumerate(self.maps):
                if (chosen := expert_R == index).any():
                    y_RD[chosen] = map(x_RD[chosen] @ self.rotation)
            return y_RD

    @register.router("centred")
    class Centred(nn.Module):
        '''Of tokens minus their running mean, which is that of all devices.'''

        def __init__(self, config, first):
            super().__init__()
            self.weight_ND = nn.Parameter(torch.empty(config.experts.total, config.dim))
            self.register_buffer("mean_D", torch.zeros(config.dim))
            self.register_buffer("passes", torch.zeros((), dtype=torch.int64))

        def forward(self, x_TD, previous):
            logits_TN = (x_TD - self.mean_D) @ self.weight_ND.t()
            if self.training:
                mean_D = x_TD.detach().mean(0)
                if dist.is_initialized():
                    dist.all_reduce(mean_D)
                    mean_D /= dist.get_world_size()
                self.mean_D.lerp_(mean_D, 0.5)
                self.passes += 1
            return logits_TN, logits_TN
"""
RUNS = [
    ("ddp", [], 4),
    ("fsdp", ["model.activation_checkpointing=true"], 4),  # passes of the backward pass count for nothing
    ("expert_parallel", ["trainer.accumulate=2"], 8),  # nor do those that count a step's slots
]


@pytest.fixture(autouse=True)
def _forgotten():
    with forgotten():
        yield


def rank(number, port, config):
    """As torchrun would have started it; what is drawn by no seed differs by rank."""
    ranks = {"RANK": number, "LOCAL_RANK": number, "GROUP_RANK": 0, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "parts"}
    os.environ.update({name: str(value) for name, value in (ranks | address).items()})
    torch.manual_seed(number)
    train(config, run_directory(config))


def train_on_two(config):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    torch.multiprocessing.start_processes(rank, (port, config), 2, start_method="fork")


@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "expert_parallel"])
def test_all_devices_begin_with_the_first_ones_buffers(overrides, tmp_path, strategy):
    words = [f"plugins={plugin(tmp_path, 'mine', PARTS)}", "model.name=drawing", "trainer.steps=1"]
    train_on_two(freeze(compose(RunConfig, [*overrides, *words, f"strategy={strategy}", "trainer.devices=2"])))


@pytest.mark.parametrize(("strategy", "words", "passes"), RUNS)
def test_two_devices_train_as_one_does(overrides, tmp_path, strategy, words, passes):
    common = [
        *overrides, f"plugins={plugin(tmp_path, 'mine', PARTS)}", "model.router=centred",
        "model.experts.others.listed=9", "model.top_k=1", "model.gate=softmax", "data.batch_size=4", "data.seq_len=16",
        "trainer.steps=4", "trainer.val_every=4", "optim.name=SGD", "optim.warmup_steps=1", "optim.lr=0.1",
    ]  # fmt: skip
    once = [word for word in words if "checkpointing" not in word]  # no pass is repeated
    alone = freeze(compose(RunConfig, [*common, *once, "strategy=single", "name=one"]))
    together = freeze(compose(RunConfig, [*common, *words, f"strategy={strategy}", "trainer.devices=2", "name=two"]))
    train_on_two(together)
    train(alone, run_directory(alone))
    one, two = (load_run(run_directory(config)).model.state_dict() for config in (alone, together))
    assert one.keys() == two.keys() and one["blocks.0.ffn.router.passes"] == passes
    for key, value in one.items():
        torch.testing.assert_close(two[key], value, rtol=0, atol=1e-5, msg=lambda m, k=key: f"{k}: {m}")


def test_parameters_that_cannot_be_sharded_are_refused():
    module = pl.LightningModule()
    module.model = nn.ParameterDict({"temperature": torch.ones(()), "scale": torch.ones(1)})
    with pytest.raises(UsageError, match=r"shards no parameter of shape \[\]: give model.temperature the shape \[1\]"):
        MoEFSDPStrategy()._shard(module)
